"""ρ with its interval, forecasts, validation and gates."""

import csv
import json

import numpy as np
import pytest
import torch

from fasc import pipeline
from fasc.statistics.collect import collect
from fasc.statistics.extras import SKETCH, SequenceSketches
from fasc.compression.trial import UnitTester
from fasc.paper.selection import gate_needs, gate_plan
from fasc.diagnosis.validate import held_out_moments, summarise, validate, validate_plans
from fasc.planning.options import BudgetConfig, MethodConfig
from fasc.statistics.options import CalibrationConfig
from fasc.diagnosis.bootstrap import rho_interval
from fasc.diagnosis.diagnose import diagnose, diagnosis_needs
from fasc.paper.exclusions import excluded
from fasc.errors import UsageError
from fasc.model.scopes import TailRunner, restored
from fasc.model.blocks import block_names
from fasc.model.groups import InputGroup
from fasc.model.layers import Layer
from tests.conftest import tiny_model

BOTH = (MethodConfig(name="fasc", damping=1e-3), MethodConfig(name="svd"))


@pytest.fixture(scope="module")
def statistics(tokens):
    return collect(tiny_model(), tokens, diagnosis_needs([*BOTH, MethodConfig(name="whitened")]))


def sketches_of(x, g, sequences):
    group = InputGroup((Layer("a", x.shape[1], x.shape[1], bias=False),))
    extra = SequenceSketches(group, torch.device("cpu"))
    length = len(x) // sequences
    extra.add(x, {"a": (g, g)}, [length] * sequences)
    return extra.publish(len(x))


def rho_of(x, g):
    centred, gradients = x - x.mean(0), g - g.mean(0)
    cross, xx, gg = centred.mT @ gradients, centred.mT @ centred, gradients.mT @ gradients
    return float(cross.norm() / (xx.norm() * gg.norm()).sqrt())


def test_the_interval_agrees_with_a_bootstrap_on_the_data_itself():
    """Against resampling the tokens' own sequences, without any sketch: never narrower."""
    g = torch.Generator().manual_seed(0)
    sequences, length, d = 40, 8, 64
    x = torch.randn(sequences * length, d, generator=g) + torch.randn(sequences, 1, d, generator=g).expand(
        -1, length, -1
    ).flatten(0, 1)
    h = 0.5 * x + torch.randn(sequences * length, d, generator=g)
    rho = rho_of(x, h)
    low, high = rho_interval(sketches_of(x, h, sequences), rho)
    rng = np.random.default_rng(1)
    slow = []
    for _ in range(300):
        picks = torch.from_numpy(rng.integers(sequences, size=sequences))
        rows = (picks[:, None] * length + torch.arange(length)).flatten()
        slow.append(rho_of(x[rows], h[rows]))
    by_hand = np.quantile(slow, [0.025, 0.5, 0.975])
    assert low < rho < high
    exact = (by_hand[2] - by_hand[0]) * rho / by_hand[1]
    assert 0.9 * exact < high - low < 1.7 * exact, "the sketch's own noise can only widen it"


def test_sketches_are_linear_and_keep_norms():
    g = torch.Generator().manual_seed(0)
    x, h = torch.randn(60, 40, generator=g), torch.randn(60, 40, generator=g)
    whole, parts = sketches_of(x, h, 1), sketches_of(x, h, 6)
    torch.testing.assert_close(parts["sequences/xg"].sum(0), whole["sequences/xg"][0], rtol=1e-4, atol=1e-4)
    assert parts["sequences/xg"].shape == (6, SKETCH, SKETCH)
    assert float(whole["sequences/xg"].norm() / (x.mT @ h).norm()) == pytest.approx(1, abs=0.25)


def test_more_sequences_narrow_the_interval():
    g = torch.Generator().manual_seed(0)
    widths = []
    for sequences in (16, 64, 256):
        x = torch.randn(sequences * 8, 16, generator=g)
        h = x + torch.randn(sequences * 8, 16, generator=g)
        rho = rho_of(x, h)
        low, high = rho_interval(sketches_of(x, h, sequences), rho)
        widths.append(high - low)
    assert widths[0] > widths[1] > widths[2]


def test_the_table_holds_the_contract(statistics, tmp_path):
    diagnosis = diagnose(tiny_model(), statistics, [*BOTH, MethodConfig(name="whitened")], rank_fraction=0.5)
    for row in json.loads(json.dumps(list(diagnosis.rows))):
        assert {"group", "block", "kind", "rho", "rho_floor", "rho_debiased", "rho_low", "rho_high", "predicted_loss"} <= set(row)
        assert row["rho_low"] <= row["rho"] <= row["rho_high"]
        assert set(row["predicted_loss"]) == {"fasc", "svd", "whitened"}
        assert row["predicted_loss"]["fasc"] <= row["predicted_loss"]["svd"] * (1 + 1e-3)
        assert 0 <= row["angle"] <= 90
        assert row["gradient_norm"] > 0
    flat = diagnosis.table()
    assert {"predicted_loss.fasc", "input.stable_rank", "group"} <= set(flat[0])
    assert not any(isinstance(value, (dict, list)) for row in flat for value in row.values())
    with diagnosis.save_csv(tmp_path / "d.csv").open() as stream:
        assert [row["group"] for row in csv.DictReader(stream)] == [row["group"] for row in diagnosis.rows]


def test_exclusions_are_those_of_the_paper_and_free_of_scale(statistics):
    rows = [
        {"group": f"model.layers.{b}.{name}", "block": b, "layers": layers, "gradient_norm": norm}
        for b in range(6)
        for name, layers, norm in (("self_attn.q+k", ["q", "k"], 1.0), ("mlp.down", ["d"], 1e-6 if b == 3 else 1.0))
    ]
    found = excluded(rows, "paper")
    assert [row["group"] for row, reason in zip(rows, found, strict=True) if reason] == [
        "model.layers.0.self_attn.q+k",
        "model.layers.1.self_attn.q+k",
        "model.layers.2.self_attn.q+k",
        "model.layers.3.mlp.down",
        "model.layers.5.mlp.down",
    ]
    scaled = [row | {"gradient_norm": 1e9 * row["gradient_norm"]} for row in rows]
    assert excluded(scaled, "paper") == found
    assert excluded(rows, "none") == [None] * len(rows)


def test_the_tail_gives_what_the_whole_model_gives(architecture, tokens):
    model = tiny_model(architecture)
    names = block_names(model, [name for name, _ in model.named_modules()])
    runner = TailRunner(model, tokens, names)
    with torch.no_grad():
        expected = model(input_ids=tokens, use_cache=False).logits
        assert torch.equal(runner.logits, expected)
        for name in names:
            torch.testing.assert_close(runner.logits_from(name), expected, rtol=0, atol=1e-4)
        block = model.get_submodule(names[1])
        layer = next(name for name, module in block.named_modules() if hasattr(module, "weight") and module.weight.dim() == 2)
        before = block.get_submodule(layer)
        with restored(model, [f"{names[1]}.{layer}"]):
            before.weight.mul_(0.5)
            changed = model(input_ids=tokens, use_cache=False).logits
            torch.testing.assert_close(runner.logits_from(names[1]), changed, rtol=0, atol=1e-4)
            before.weight.mul_(2)
        assert torch.equal(model(input_ids=tokens, use_cache=False).logits, expected)


def test_validation_measures_the_true_divergence(statistics, tokens):
    """One group by hand: compress it alone and take the divergence of the whole model."""
    from fasc.compression.compress import compress
    from fasc.model.options import LayersConfig

    model = tiny_model()
    held_out = torch.randint(3, 128, (4, 16), generator=torch.Generator().manual_seed(5))
    rows = validate(model, statistics, held_out, BOTH, [0.25, 0.75])
    assert len(rows) == 8 * 2 * 2
    row = next(r for r in rows if r["group"].endswith("1.mlp.down_proj") and r["method"] == "fasc" and r["rank_fraction"] == 0.25)
    alone = tiny_model()
    options = MethodConfig(name="fasc", damping=1e-3, layouts=("factors",))
    plan = pipeline.plan(alone, options, BudgetConfig(rank_fraction=0.25), layers=LayersConfig(include=("*.1.mlp.down_proj",)))
    compress(alone, statistics, plan, options)
    with torch.no_grad():
        p = model(input_ids=held_out).logits.double().log_softmax(-1)
        q = alone(input_ids=held_out).logits.double().log_softmax(-1)
    assert row["kl"] == pytest.approx(float((p.exp() * (p - q)).sum(-1).mean()), rel=1e-3)
    summary = summarise(rows)
    forecasts = {one["forecast"] for one in summary}
    assert forecasts == {"½J → KL", "rho → log KL gain", "rho_debiased → log KL gain", "J gain → KL gain"}
    whole = next(
        one for one in summary if one["forecast"] == "½J → KL" and one["method"] == "fasc" and one["rank_fraction"] is None
    )
    assert whole["n"] == 16
    assert whole["pearson"] > 0.5, "½J orders the groups of a random model, too"


def test_validation_of_a_whole_plan_is_that_of_the_compressed_model(statistics, tokens):
    from fasc.compression.compress import compress

    model, options, budget = tiny_model(), MethodConfig(damping=1e-3), BudgetConfig(param_fraction=0.6, rank_multiple=1)
    held_out = torch.randint(3, 128, (4, 16), generator=torch.Generator().manual_seed(5))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    budgets = [budget, BudgetConfig(param_fraction=0.9, rank_multiple=1)]
    same = held_out_moments(model, statistics, tokens, CalibrationConfig(batch_tokens=160))
    row, milder = validate_plans(model, statistics, held_out, options, budgets, held_out=same)
    assert row["half_j_held_out"] == pytest.approx(row["half_j"], rel=0.02), "moments of the same tokens say the same"
    assert all(torch.equal(value, model.state_dict()[name]) for name, value in before.items())
    assert row["half_j"] > milder["half_j"] > 0
    whole = tiny_model()
    done = compress(whole, statistics, pipeline.plan(whole, options, budget, statistics=statistics), options)
    assert row["half_j"] == pytest.approx(done.predicted_loss)
    with torch.no_grad():
        p = model(input_ids=held_out).logits.double().log_softmax(-1)
        q = whole(input_ids=held_out).logits.double().log_softmax(-1)
    assert row["kl"] == pytest.approx(float((p.exp() * (p - q)).sum(-1).mean()), rel=1e-3)
    taken = (p - q)[:, :-1].gather(-1, held_out[:, 1:, None])
    assert row["nll_increase"] == pytest.approx(float(taken.mean()), rel=1e-3)


@pytest.mark.parametrize("gate", ["rho", "predicted", "kl"])
def test_gates_choose_per_unit_and_say_why(tokens, gate):
    model = tiny_model()
    options = MethodConfig(name="fasc", damping=1e-3, gate=gate, gate_threshold=0.5)
    budget = BudgetConfig(rank_fraction=0.5)
    statistics = collect(model, tokens, pipeline.needs_of([options], [budget]))
    assert gate_needs(options) <= {tuple(need) for need in statistics.meta["needs"]} | gate_needs(options)
    plan = pipeline.plan(model, options, budget, statistics=statistics)
    gated = gate_plan(model, statistics, plan, options, lambda: UnitTester(model, statistics, tokens[:4]))
    for unit in gated.units:
        assert unit.method in ("fasc", "svd")
        assert unit.gate["gate"] == gate
        better = unit.gate["score"] > 0.5 if gate == "rho" else unit.gate["score"] <= 0
        assert unit.method == ("fasc" if better else "svd")
    if gate == "predicted":
        assert {unit.method for unit in gated.units} == {"fasc"}
    if gate == "rho":
        everything = options.model_copy(update={"gate_threshold": 0.0})
        assert {unit.method for unit in gate_plan(model, statistics, plan, everything).units} == {"fasc"}
        nothing = options.model_copy(update={"gate_threshold": 100.0})
        none = gate_plan(model, statistics, plan, nothing)
        assert {unit.method for unit in none.units} == {"svd"}
        assert none.predicted_loss > plan.predicted_loss
    if gate == "kl":
        with pytest.raises(UsageError, match="held-out"):
            gate_plan(model, statistics, plan, options)


def test_a_gated_plan_compresses_each_unit_with_its_own_method(tokens):
    from fasc.compression.compress import compress

    model = tiny_model()
    options = MethodConfig(name="fasc", damping=1e-3, gate="rho", gate_threshold=100.0)
    budget = BudgetConfig(rank_fraction=0.5)
    statistics = collect(model, tokens, pipeline.needs_of([options], [budget]))
    plan = pipeline.plan(model, options, budget, statistics=statistics)
    compress(model, statistics, gate_plan(model, statistics, plan, options), options)
    plain = tiny_model()
    compress(plain, statistics, pipeline.plan(plain, "svd", budget, statistics=statistics), MethodConfig(name="svd"))
    for name, value in plain.state_dict().items():
        assert torch.equal(value, model.state_dict()[name]), name


def test_the_diagnosis_forecasts_what_the_plan_does(statistics):
    model = tiny_model()
    table = diagnose(model, statistics, BOTH, rank_fraction=0.5)
    for options in BOTH:
        plan = pipeline.plan(model, options, BudgetConfig(rank_fraction=0.5, rank_multiple=1), statistics=statistics)
        losses = {unit.unit: unit.predicted_loss for unit in plan.units}
        for row in table.rows:
            assert row["predicted_loss"][options.name] == pytest.approx(losses[row["group"]], rel=1e-6), row["group"]


def test_noise_falls_with_the_tokens_and_dependence_stays(tokens):
    from fasc.statistics.extras import SequenceSketches
    from fasc.diagnosis.bootstrap import rho_by_tokens
    from fasc.model.groups import InputGroup
    from fasc.model.layers import Layer

    generator = torch.Generator().manual_seed(0)
    found = {}
    for coupled in (False, True):
        sketches = SequenceSketches(InputGroup((Layer("a.0.b", 24, 24, bias=False),)), torch.device("cpu"))
        for _ in range(64):
            x = torch.randn(20, 24, generator=generator)
            g = torch.randn(20, 24, generator=generator) + (x if coupled else 0)
            sketches.add(x, {"a": (g, g)}, [20])
        found[coupled] = rho_by_tokens(sketches.publish(1280), 0.5)
        assert list(found[coupled]) == [160, 320, 640, 1280]
        assert found[coupled][1280] == pytest.approx(0.5)
    assert found[False][160] == pytest.approx(0.5 * 8**0.5, rel=0.2), "1/√n"
    assert found[True][160] == pytest.approx(0.5, rel=0.25)
