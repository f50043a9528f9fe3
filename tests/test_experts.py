"""Experts as layers of their own: the same model, a row for each expert, and moments of the tokens that it gets."""

import torch

from fasc import pipeline
from fasc.compression.compress import compress
from fasc.diagnosis.diagnose import diagnose, diagnosis_needs
from fasc.methods import METHODS
from fasc.model.experts import expert_layers
from fasc.model.groups import find_groups
from fasc.model.load import model_fingerprint
from fasc.model.options import LayersConfig
from fasc.planning.options import BudgetConfig, MethodConfig
from fasc.statistics.collect import collect_moments as collect
from fasc.statistics.options import CalibrationConfig

BOTH = [MethodConfig(damping=1e-2), MethodConfig(name="svd")]


def test_a_model_with_expert_layers_computes_the_same_and_is_left_as_it_was(mixture, tokens):
    modules, weights = [name for name, _ in mixture.named_modules()], model_fingerprint(mixture)
    with torch.no_grad():
        expected = mixture(input_ids=tokens).logits
        with expert_layers(mixture) as holders:
            assert len(holders) == 2
            assert model_fingerprint(mixture) == weights
            torch.testing.assert_close(mixture(input_ids=tokens).logits, expected, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(mixture(input_ids=tokens).logits, expected)
    assert [name for name, _ in mixture.named_modules()] == modules


def test_a_dense_model_has_none(model):
    with expert_layers(model) as holders:
        assert holders == []


def test_every_expert_is_a_group_even_if_a_short_text_misses_it(mixture):
    with expert_layers(mixture):
        groups = find_groups(mixture, LayersConfig())
    found = {(group.block, group.layers[0].expert, group.kind) for group in groups if group.layers[0].expert is not None}
    assert found == {(block, expert, kind) for block in (0, 1) for expert in range(4) for kind in ("gate_up_proj", "down_proj")}


def test_diagnose_has_a_row_per_expert_with_the_moments_of_its_tokens(mixture, tokens):
    seen = {}

    def watch(_module, args):
        seen.setdefault("x", []).append(args[0].detach().double())

    with expert_layers(mixture):
        name = "model.layers.1.mlp.experts.2.gate_up_proj"
        statistics = collect(mixture, tokens, diagnosis_needs(BOTH), calibration=CalibrationConfig(batch_tokens=160))
        handle = mixture.get_submodule(name).register_forward_pre_hook(watch)
        with torch.no_grad():
            mixture(input_ids=tokens)
        handle.remove()
        table = diagnose(mixture, statistics, BOTH, rank_fraction=0.5)
    inputs = torch.cat(seen["x"])
    group = statistics.groups[name]
    assert group.tokens == len(inputs)
    torch.testing.assert_close(group.input.mean.double(), inputs.mean(0), rtol=1e-3, atol=1e-4)
    row = next(row for row in table.rows if row["group"] == name)
    assert (row["expert"], row["tokens"]) == (2, len(inputs))
    assert row["rho"] > 0
    assert row["predicted_loss"]["fasc"] <= row["predicted_loss"]["svd"]
    per_block = [row["tokens"] for row in table.rows if row["block"] == 0 and row["kind"] == "gate_up_proj"]
    assert sum(per_block) == 2 * tokens.numel(), "each token goes to two experts"


def test_experts_are_not_compressed(mixture, tokens):
    with expert_layers(mixture):
        statistics = collect(mixture, tokens, METHODS["fasc"].needs)
    plan = pipeline.plan(mixture, MethodConfig(damping=1e-2), BudgetConfig(rank_fraction=0.5), statistics=statistics)
    assert plan.units
    assert not any("experts" in unit.unit for unit in plan.units)
    compress(mixture, statistics, plan, MethodConfig(damping=1e-2))
    with torch.no_grad():
        assert torch.isfinite(mixture(input_ids=tokens).logits).all()
