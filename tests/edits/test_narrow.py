"""Fewer channels per MLP: which, what that costs, and that the narrower model is what the plan says."""

import json
import subprocess
import sys
import weakref
from dataclasses import replace

import pytest
import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, BitNetConfig, CohereConfig, GPTNeoXConfig

from fasc import pipeline
from fasc.planning.plan import ChannelCut
from fasc.statistics.collect import collect
from fasc.statistics.moments import as_float64
from fasc.forecast.channels import (
    counts_of,
    cut_channels,
    cut_loss,
    cutting_of,
    narrowed,
    narrowed_group,
    removed_parameters,
)
from fasc.compression.compress import compress
from fasc.compression.merge import merge
from fasc.compression.recover import recover
from fasc.diagnosis.validate import validate_plans
from fasc.compression.options import RecoveryConfig
from fasc.model.options import LayersConfig
from fasc.planning.options import BudgetConfig, MethodConfig
from fasc.forecast.half_j import loss_on
from fasc.errors import BudgetError, ModelError, UsageError
from fasc.linalg.elimination import eliminate, refit
from fasc.methods import METHODS, decompose_unit, stacked_weight, unit_in
from fasc.model.coupling import find_channels
from fasc.model.checkpoint import CheckpointNotes, save_checkpoint, verify_structure
from fasc.model.groups import find_groups
from tests.conftest import PARALLEL, tiny_model
from tests.reference import greedy_elimination

OPTIONS = MethodConfig(damping=1e-2)
ONLY = OPTIONS.model_copy(update={"layouts": ("dense", "channels")})
NEEDS = METHODS["fasc"].needs_in(("group", "layer"))


@pytest.fixture(scope="module")
def statistics(tokens):
    known = {}

    def get(architecture="llama"):
        if architecture not in known:
            known[architecture] = collect(tiny_model(architecture), tokens, NEEDS)
        return known[architecture]

    return get


def logits(model, tokens):
    with torch.no_grad():
        return model(input_ids=tokens).logits


def mlps(model):
    return find_channels(model, find_groups(model, LayersConfig()))


def cut_of(channels, kept):
    makers = tuple(layer.name for layer in channels.makers)
    return ChannelCut(channels.reader.layers[0].name, makers, channels.count, kept, removed_parameters(channels, kept))


def cut(model, statistics, kept, damping=1e-2):
    """Every MLP with so many channels; the cuttings."""
    found = [cutting_of(model, statistics, cut_of(one, kept), damping) for one in mlps(model)]
    for one in found:
        cut_channels(model, statistics, one)
    return found


def problem(size=30, outputs=7, seed=0):
    generator = torch.Generator().manual_seed(seed)
    root = torch.randn(size, size, generator=generator, dtype=torch.float64)
    covariance = root @ root.mT / size + 0.01 * torch.eye(size, dtype=torch.float64)
    return torch.randn(outputs, size, generator=generator, dtype=torch.float64), covariance


@pytest.mark.parametrize("seed", range(3))
def test_features_go_in_the_order_of_the_obvious_greedy_and_cost_what_it_says(seed):
    weight, covariance = problem(seed=seed)
    order, losses = greedy_elimination(weight, covariance, 3)
    found = eliminate(weight, covariance, 3)
    assert found.order.tolist() == order
    torch.testing.assert_close(found.losses(), torch.tensor(losses, dtype=torch.float64))
    assert found.kept(10, 30).tolist() == sorted(set(range(30)) - set(order[:20]))


def test_the_errors_covariance_is_the_sum_of_what_each_removal_adds():
    weight, covariance = problem(size=90)
    found = eliminate(weight, covariance, 20)
    kept = found.kept(40, 90)
    error = weight.clone()
    error[:, kept] -= weight @ refit(covariance, kept)
    taken = found.residuals[:50]
    torch.testing.assert_close(taken.mT @ taken, error @ covariance @ error.mT)


def test_features_that_others_determine_cost_nothing():
    weight, covariance = problem(size=20)
    mix = torch.randn(25, 20, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    mix[:20] = torch.eye(20)
    bigger = mix @ covariance @ mix.mT + 1e-10 * torch.eye(25)
    found = eliminate(torch.cat([weight, weight[:, :5]], 1), bigger, 15)
    assert float(found.losses()[5]) < 1e-7
    assert float(found.losses()[6]) > 1e-4


def test_every_architectures_mlps_are_found_and_the_model_is_left_as_it_was(tokens, architecture):
    model = tiny_model(architecture).train()
    before = logits(model.eval(), tokens)
    model.train()
    found = mlps(model)
    assert [one.count for one in found] == [128 if architecture == "gpt2" else 48] * 2
    assert all("down" in one.reader.name or "c_proj" in one.reader.name for one in found)
    assert all("mlp" in layer.name for one in found for layer in one.layers)
    assert model.training
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    torch.testing.assert_close(logits(model.eval(), tokens), before, rtol=0, atol=0)


SMALL = {
    "vocab_size": 128,
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 0,
    "eos_token_id": 1,
}


def test_channels_that_a_norm_mixes_are_not_taken_for_separate_ones():
    torch.manual_seed(0)
    assert mlps(AutoModelForCausalLM.from_config(BitNetConfig(**SMALL)).eval()) == []


def test_heads_are_not_taken_for_channels():
    """Every projection of this model is 32 × 32; queries, keys and values are as wide as what the output projection reads."""
    torch.manual_seed(0)
    found = mlps(AutoModelForCausalLM.from_config(GPTNeoXConfig(**SMALL)).eval())
    assert [one.reader.kind for one in found] == ["dense_4h_to_h"] * 2


@pytest.mark.parametrize("name", PARALLEL)
def test_an_mlp_beside_its_attention_is_told_from_it(name):
    model = tiny_model(name)
    found = mlps(model)
    assert len(found) == 2
    for one in found:
        assert all("mlp" in layer.name for layer in one.layers)
        assert any("mlp" not in layer.name for layer in one.group.layers)
        assert one.count == 48


def test_queries_as_wide_as_the_channels_beside_them_are_told_from_the_makers():
    torch.manual_seed(0)
    found = mlps(AutoModelForCausalLM.from_config(CohereConfig(**SMALL)).eval())
    assert [[layer.kind for layer in one.layers] for one in found] == [["gate_proj", "up_proj", "down_proj"]] * 2


@pytest.mark.parametrize("name", PARALLEL)
def test_cutting_beside_the_attention_leaves_the_attention_as_it_was(name, tokens):
    model = tiny_model(name)
    moments = collect(model, tokens, NEEDS)
    one = mlps(model)[0]
    others = [layer for layer in one.group.layers if layer not in one.makers]
    before = {layer.name: model.get_submodule(layer.name).weight.clone() for layer in others}
    found = cutting_of(model, moments, cut_of(one, 24), 1e-2)
    narrow = narrowed(moments, [found]).groups[one.group.name]
    assert [layer for layer in narrow.group.layers if layer in others] == others
    for layer in narrow.group.layers:
        gradient = narrow.gradients[layer.name]
        assert len(gradient.covariance.mean) == (layer.d_out if gradient.side == "output" else layer.d_in)
    cut_channels(model, moments, found)
    for layer in others:
        assert torch.equal(model.get_submodule(layer.name).weight, before[layer.name])
    assert logits(model, tokens).isfinite().all()


@pytest.mark.parametrize("name", PARALLEL)
@pytest.mark.parametrize("propagate", [False, True])
def test_a_parallel_model_with_fewer_channels_keeps_its_budget_and_loads_as_it_was_saved(
    name, propagate, tokens, tokenizer, tmp_path
):
    model = tiny_model(name)
    moments = collect(model, tokens, NEEDS)
    options = OPTIONS.model_copy(update={"propagate": propagate})
    plan = pipeline.plan(model, options, BudgetConfig(param_fraction=0.6), statistics=moments)
    assert plan.cuts
    assert plan.totals["param_fraction"] <= 0.6
    done = compress(model, moments, plan, options)
    orders = sum(buffer.numel() for key, buffer in model.named_buffers() if key.endswith(".order"))
    assert model.num_parameters() + orders == plan.totals["parameters"]
    save_checkpoint(model, tokenizer, tmp_path / "out", CheckpointNotes({}, {}, done.to_dict(), ""))
    verify_structure(tmp_path / "out")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    assert torch.equal(logits(loaded, tokens), logits(model, tokens))


def test_an_mlp_of_which_only_a_part_was_chosen_stays_whole():
    model = tiny_model()
    groups = find_groups(model, LayersConfig(exclude=("*up_proj",)))
    assert find_channels(model, groups) == []


def test_channels_that_are_always_zero_are_cut_without_loss(tokens, architecture):
    model = tiny_model(architecture)
    dead = {}
    with torch.no_grad():
        for one in mlps(model):
            gone = torch.arange(one.count)[::3]
            dead[one.reader.name] = gone
            module = model.get_submodule(one.reader.name)
            (module.weight if architecture == "gpt2" else module.weight.T)[gone] = 0
    before = logits(model, tokens)
    found = collect(model, tokens, NEEDS)
    for one in cut(model, found, kept=48 - 16 if architecture != "gpt2" else 128 - 43):
        gone = set(range(one.channels.count)) - set(one.kept.tolist())
        assert gone == set(dead[one.channels.reader.name].tolist())
    torch.testing.assert_close(logits(model, tokens), before, rtol=0, atol=2e-3 * float(before.abs().max()))


def test_the_reader_keeps_its_mean_output(statistics, tokens, architecture):
    model, dense = tiny_model(architecture), tiny_model(architecture)
    means = []
    for one in (dense, model):
        if one is model:
            cut(model, statistics(architecture), kept=24)
        seen = []
        first = mlps(dense)[0].reader.name
        handle = one.get_submodule(first).register_forward_hook(lambda _m, _a, output, seen=seen: seen.append(output))
        logits(one, tokens)
        handle.remove()
        means.append(seen[0].flatten(0, 1).mean(0))
    torch.testing.assert_close(means[1], means[0], rtol=1e-4, atol=1e-4)


def test_a_cut_costs_what_is_forecast(statistics):
    """½ tr(M E Σ Eᵀ) with E = W − W T, by hand; and of its rank, on what is left."""
    model, found = tiny_model(), statistics()
    free = MethodConfig(damping=1e-9, layouts=("dense", "channels"))
    plan = pipeline.plan(model, free, BudgetConfig(param_fraction=0.85), statistics=found)
    assert plan.cuts
    for planned in plan.cuts:
        one = cutting_of(model, found, planned, free.damping)
        assert len(one.kept) == planned.kept
        group = found.groups[planned.reader]
        weight = stacked_weight(model, found, unit_in(group.group, group.group.layers))
        _, xx = as_float64(group.input)
        _, hh = as_float64(group.gradients[planned.reader].covariance)
        error = weight.clone()
        error[:, one.kept] -= weight @ one.estimate
        by_hand = 0.5 * float(torch.trace(error.mT @ hh @ error @ xx))
        assert planned.predicted_loss == pytest.approx(by_hand, rel=1e-4)
        assert cut_loss(model, found, one) == pytest.approx(by_hand, rel=1e-9)
    assert plan.predicted_loss == pytest.approx(sum(one.predicted_loss for one in plan.cuts), rel=1e-9)


def test_the_forecast_of_what_is_left_is_that_of_its_decomposition(statistics, architecture):
    model, found = tiny_model(architecture), statistics(architecture)
    plan = pipeline.plan(model, OPTIONS, BudgetConfig(param_fraction=0.5), statistics=found)
    done = compress(model, found, plan, OPTIONS)
    assert plan.cuts and any(unit.layout != "dense" for unit in plan.units)
    assert done.predicted_loss == pytest.approx(plan.predicted_loss, rel=2e-2)


def test_gradients_on_the_outputs_of_the_makers_are_carried_over(statistics):
    """A kept channel is read for those that go: its gradient is Tᵀ h."""
    model, found = tiny_model(), statistics()
    one = cutting_of(model, found, cut_of(mlps(model)[0], 20), 1e-2)
    makers = found.groups[one.channels.group.name]
    h = torch.randn(200, 96, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    gradient = replace(
        makers.gradients[makers.group.name],
        side="output",
        covariance=type(makers.input)(h.mean(0).float(), torch.cov(h.T).float()),
    )
    given = replace(found, groups={**found.groups, makers.group.name: replace(makers, gradients={makers.group.name: gradient})})
    narrow = narrowed(given, [one]).groups[makers.group.name].gradients[makers.group.name]
    less = torch.cat([h[:, :48] @ one.estimate, h[:, 48:] @ one.estimate], 1)
    torch.testing.assert_close(narrow.covariance.matrix, torch.cov(less.T).float(), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(narrow.covariance.mean, less.mean(0).float(), rtol=1e-4, atol=1e-5)


def test_a_plan_with_cuts_loses_less_and_keeps_the_budget(statistics, tokens, architecture):
    found = statistics(architecture)
    without = OPTIONS.model_copy(update={"layouts": tuple(name for name in OPTIONS.layouts if name != "channels")})
    dense = tiny_model(architecture)
    for fraction in (0.8, 0.5):
        model = tiny_model(architecture)
        budget = BudgetConfig(param_fraction=fraction)
        plan = pipeline.plan(model, OPTIONS, budget, statistics=found)
        assert plan.predicted_loss <= pipeline.plan(model, without, budget, statistics=found).predicted_loss + 1e-12
        assert plan.totals["param_fraction"] <= fraction
        assert plan.dense_parameters == pipeline.plan(model, without, budget, statistics=found).dense_parameters
        compress(model, found, plan, OPTIONS)
        orders = sum(buffer.numel() for name, buffer in model.named_buffers() if name.endswith(".order"))
        assert model.num_parameters() + orders == plan.totals["parameters"]
        assert model.num_parameters() < dense.num_parameters()


@pytest.mark.parametrize("propagate", [False, True])
def test_a_new_process_gives_identical_logits(statistics, tokens, tokenizer, tmp_path, architecture, propagate):
    model = tiny_model(architecture)
    options = OPTIONS.model_copy(update={"propagate": propagate})
    plan = pipeline.plan(model, options, BudgetConfig(param_fraction=0.6), statistics=statistics(architecture))
    assert plan.cuts
    done = compress(model, statistics(architecture), plan, options)
    save_checkpoint(model, tokenizer, tmp_path / "out", CheckpointNotes({}, {}, done.to_dict(), ""))
    expected = logits(model, tokens)
    if propagate or architecture not in ("llama", "gpt2"):  # a new process is slow: once for each kind of layer
        assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval(), tokens), expected)
        return
    save_file({"tokens": tokens, "logits": expected}, tmp_path / "expected.safetensors")
    script = (
        "import sys, torch, fasc\n"
        "from transformers import AutoModelForCausalLM\n"
        "from safetensors.torch import load_file\n"
        "seen = load_file(sys.argv[2])\n"
        "model = AutoModelForCausalLM.from_pretrained(sys.argv[1]).eval()\n"
        "with torch.no_grad():\n"
        "    assert torch.equal(model(input_ids=seen['tokens']).logits, seen['logits'])\n"
    )
    command = [sys.executable, "-c", script, str(tmp_path / "out"), str(tmp_path / "expected.safetensors")]
    subprocess.run(command, check=True, capture_output=True)


def test_a_config_of_another_model_is_refused(statistics, tokenizer, tmp_path):
    model = tiny_model()
    cut_plan = pipeline.plan(model, ONLY, BudgetConfig(param_fraction=0.85), statistics=statistics())
    compress(model, statistics(), cut_plan, ONLY)
    save_checkpoint(model, tokenizer, tmp_path / "out", CheckpointNotes({}, {}, {}, ""))
    file = tmp_path / "out" / "config.json"
    config = json.loads(file.read_text())
    config["quantization_config"]["units"][0]["channels"][0] = 50
    file.write_text(json.dumps(config))
    with pytest.raises(ModelError, match="of 50 channels"):
        AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    config["quantization_config"]["units"][0]["channels"] = [48, cut_plan.cuts[0].kept + 1]
    file.write_text(json.dumps(config))
    with pytest.raises(ModelError, match=f"the weights hold {cut_plan.cuts[0].kept}"):
        verify_structure(tmp_path / "out")


def test_narrow_mlps_are_ordinary_layers_and_compile(statistics):
    model = tiny_model()
    compress(model, statistics(), pipeline.plan(model, ONLY, BudgetConfig(param_fraction=0.85), statistics=statistics()), ONLY)
    layers = [module for name, module in model.named_modules() if name.endswith(("gate_proj", "up_proj", "down_proj"))]
    assert all(isinstance(layer, torch.nn.Linear) and not list(layer.children()) for layer in layers)
    assert {layer.in_features for layer in layers} | {layer.out_features for layer in layers} != {32, 48}
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    ids = torch.arange(12)[None]
    torch.testing.assert_close(compiled(input_ids=ids).logits, model(input_ids=ids).logits, rtol=1e-4, atol=1e-4)


def test_merging_leaves_the_channels_alone(statistics, model_folder, text_file, tmp_path):
    from fasc.model.options import ModelConfig
    from fasc.recipe import Recipe
    from fasc.statistics.options import CalibrationConfig

    recipe = Recipe(
        source=ModelConfig(model=str(model_folder)),
        calibration=CalibrationConfig(corpus=str(text_file), sequences=16, sequence_length=16),
        methods=(OPTIONS,),
        budgets=(BudgetConfig(param_fraction=0.6),),
    )
    done = pipeline.compress_model(recipe, tmp_path / "merged", merged=True)
    assert not done.cuts
    model = tiny_model()
    compress(model, statistics(), pipeline.plan(model, ONLY, BudgetConfig(param_fraction=0.85), statistics=statistics()), ONLY)
    with pytest.raises(UsageError, match="cannot be merged"):
        merge(model, statistics(), 1e-2)


def test_recovery_trains_narrower_layers_too(statistics, tokens):
    model, dense = tiny_model(), tiny_model()
    plan = pipeline.plan(model, ONLY, BudgetConfig(param_fraction=0.85), statistics=statistics())
    compress(model, statistics(), plan, ONLY)
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    text = torch.randint(3, 128, (64, 20), generator=torch.Generator().manual_seed(5))
    recover(model, dense, text, RecoveryConfig(batch_tokens=80, learning_rate=1e-3))
    changed = {name for name, parameter in model.named_parameters() if not torch.equal(parameter, before[name])}
    layers = {layer for one in plan.cuts for layer in one.layers}
    assert changed == {name for name in before if name.rpartition(".")[0] in layers}


def test_validation_measures_the_cut_model_and_leaves_the_dense_one(statistics, tokens):
    model = tiny_model()
    before = logits(model, tokens)
    held_out = collect(model, tokens.flip(0)[:8], NEEDS)
    budgets = [BudgetConfig(param_fraction=0.6)]
    (row,) = validate_plans(model, statistics(), tokens[:8], OPTIONS, budgets, held_out=held_out)
    torch.testing.assert_close(logits(model, tokens), before, rtol=0, atol=0)
    other = tiny_model()
    compress(other, statistics(), pipeline.plan(other, OPTIONS, budgets[0], statistics=statistics()), OPTIONS)
    p, q = (torch.log_softmax(logits(one, tokens[:8]).double(), -1) for one in (model, other))
    assert row["kl"] == pytest.approx(float((p.exp() * (p - q)).sum(-1).mean()), rel=1e-3)
    assert row["half_j_held_out"] > 0


def test_held_out_moments_forecast_cuts_and_what_is_left(statistics, tokens):
    model, found = tiny_model(), statistics()
    other = collect(model, torch.randint(3, 128, (24, 20), generator=torch.Generator().manual_seed(8)), NEEDS)
    plan = pipeline.plan(model, OPTIONS, BudgetConfig(param_fraction=0.6), statistics=found, held_out=other)
    assert plan.cuts
    expected = 0.0
    cuttings = [cutting_of(model, found, one, OPTIONS.damping) for one in plan.cuts]
    for planned, one in zip(plan.cuts, cuttings, strict=True):
        assert planned.predicted_loss == pytest.approx(cut_loss(model, other, one), rel=1e-6)
        expected += planned.predicted_loss
    narrow = narrowed(found, cuttings)
    for one in cuttings:
        cut_channels(model, found, one)
    for unit in plan.units:
        if unit.unit in {one.reader for one in plan.cuts} and unit.layout != "dense":
            full = decompose_unit(model, narrow, unit, OPTIONS)
            assert unit.predicted_loss == pytest.approx(
                float(loss_on(model, narrowed(other, cuttings), unit, full)[unit.rank]), rel=1e-3
            )


def test_without_a_global_budget_nothing_is_cut(statistics):
    model, found = tiny_model(), statistics()
    for options, budget in (
        (OPTIONS.model_copy(update={"allocation": "uniform"}), BudgetConfig(param_fraction=0.6)),
        (OPTIONS, BudgetConfig(rank_fraction=0.5)),
        (OPTIONS.model_copy(update={"gate": "predicted"}), BudgetConfig(param_fraction=0.6)),
        (MethodConfig(name="svd"), BudgetConfig(param_fraction=0.6)),
    ):
        assert not pipeline.plan(model, options, budget, statistics=found).cuts
    kept = [one.kept for one in pipeline.plan(model, OPTIONS, BudgetConfig(param_fraction=0.7, floor=0.6), statistics=found).cuts]
    assert all(count >= 0.6 * 48 for count in kept)
    dear = pipeline.plan(model, OPTIONS, BudgetConfig(param_fraction=0.8, overhead=10**6), statistics=found)
    assert dear.cuts, "a narrower layer is an ordinary one and makes no product more"
    assert all(unit.layout == "dense" for unit in dear.units)


def test_the_last_blocks_channels_stay(statistics, architecture):
    plan = pipeline.plan(tiny_model(architecture), OPTIONS, BudgetConfig(param_fraction=0.5), statistics=statistics(architecture))
    assert [".0." in one.reader for one in plan.cuts] == [True]


def test_numbers_of_channels_are_multiples_and_few():
    assert counts_of(1536, 8)[:2] == [1472, 1408]
    assert min(counts_of(1536, 8)) == 384
    assert all(count % 8 == 0 for count in counts_of(11008, 8))
    assert len(counts_of(14336, 8)) <= 24
    assert counts_of(48, 8)[0] == 46
    assert counts_of(1536, 8, 256) == [1280, 1024, 768, 512]
    assert counts_of(48, 8, 16) == [32, 16], "also where the multiple of ranks would not count"
    assert len(counts_of(14336, 8, 256)) <= 24


def test_numbers_of_channels_are_the_multiples_asked_for(statistics):
    model, found = tiny_model(), statistics()
    for multiple in (8, 16):
        plan = pipeline.plan(model, OPTIONS, BudgetConfig(param_fraction=0.6, channel_multiple=multiple), statistics=found)
        assert plan.cuts
        assert all(one.kept % multiple == 0 for one in plan.cuts)
        assert 0.995 * 0.6 <= plan.totals["param_fraction"] <= 0.6
    with pytest.raises(BudgetError, match=r"no multiple of 48 .*`model\.layers\.0\.mlp\.down_proj`"):
        pipeline.plan(model, OPTIONS, BudgetConfig(param_fraction=0.6, channel_multiple=48), statistics=found)


def test_the_multiple_holds_in_every_architecture(statistics, architecture):
    budget = BudgetConfig(param_fraction=0.5, channel_multiple=16)
    plan = pipeline.plan(tiny_model(architecture), OPTIONS, budget, statistics=statistics(architecture))
    assert plan.cuts
    assert all(one.kept % 16 == 0 and 0 < one.kept < one.channels for one in plan.cuts)
    assert plan.totals["param_fraction"] <= 0.5


def test_narrow_groups_have_the_parameters_that_were_not_removed():
    for architecture in ("llama", "gpt2", "phi3"):
        model = tiny_model(architecture)
        for one in mlps(model):
            narrow = [layer for group in (one.group, one.reader) for layer in narrowed_group(group, one, 20).layers]
            count = [sum(layer.d_in * layer.d_out + layer.bias * layer.d_out for layer in part) for part in (one.layers, narrow)]
            assert count[0] - count[1] == removed_parameters(one, 20)


@pytest.mark.parametrize("propagate", [False, True])
def test_the_estimates_of_only_one_mlp_are_in_memory(tokens, monkeypatch, propagate):
    model = tiny_model("llama", layers=4)
    statistics = collect(model, tokens, METHODS["fasc"].needs_in(METHODS["fasc"].scopes))
    options = MethodConfig(name="fasc", propagate=propagate)
    plan = pipeline.plan(model, options, BudgetConfig(param_fraction=0.5), statistics=statistics)
    assert len(plan.cuts) >= 2
    made = []

    def watched(*given):
        assert all(one() is None for one in made)
        estimate = refit(*given)
        made.append(weakref.ref(estimate))
        return estimate

    monkeypatch.setattr("fasc.forecast.channels.refit", watched)
    compress(model, statistics, plan, options)
    assert len(made) == len(plan.cuts)
