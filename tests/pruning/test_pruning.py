"""Pruning removes what its score says, no more than the budget, and what structured pruning leaves is an ordinary model."""

import pytest
import torch
from transformers import AutoModelForCausalLM

from fasc.planning.plan import RankPlan
from fasc.statistics.collect import collect
from fasc.compression.compress import compress
from fasc.planning.make import needs_for, plan_model
from fasc.model.options import LayersConfig
from fasc.planning.options import BudgetConfig, MethodConfig
from fasc.statistics.options import CalibrationConfig
from fasc.errors import BudgetError, ModelError, UnknownNameError, UsageError
from fasc.model.groups import find_groups
from fasc.pruning import PRUNINGS, find_method
from fasc.pruning._coupling import couplings
from tests.conftest import tiny_model
from tests.reference import moments_by_hand

SEPARATE = ("gemma2", "gemma3", "llama", "mistral", "qwen2", "qwen3")
"""Architectures with separate q, k, v projections."""


def statistics_of(model, tokens, name):
    needs = needs_for(MethodConfig(name=name), BudgetConfig(param_fraction=0.5))
    return collect(model, tokens, needs, calibration=CalibrationConfig(batch_tokens=160))


def pruned(model, tokens, name, **budget):
    statistics = statistics_of(model, tokens, name)
    groups = [group.group for group in statistics.groups.values()]
    plan = plan_model(model, groups, MethodConfig(name=name), BudgetConfig(rank_multiple=1, **budget), statistics)
    return statistics, plan, compress(model, statistics, plan, MethodConfig(name=name))


@pytest.mark.parametrize("fraction", [0.3, 0.5, 0.8, 1.0])
def test_magnitude_keeps_the_largest_weights_of_each_layer(tokens, fraction):
    dense, model = tiny_model(), tiny_model()
    _, plan, _ = pruned(model, tokens, "magnitude", param_fraction=fraction)
    for unit in plan.units:
        before, after = (m.get_submodule(unit.layers[0]).weight.detach() for m in (dense, model))
        kept = sorted(before.abs().flatten().tolist(), reverse=True)[: int(fraction * before.numel())]
        assert int((after != 0).sum()) == len(kept) == unit.kept
        assert torch.equal(after, torch.where(before.abs() >= kept[-1], before, 0.0))


def test_wanda_compares_within_a_row_by_the_norm_of_the_inputs(tokens):
    dense, model = tiny_model("qwen2"), tiny_model("qwen2")
    _, plan, _ = pruned(model, tokens, "wanda", param_fraction=0.5)
    names = [unit.layers[0] for unit in plan.units]
    x, _ = moments_by_hand(dense, tokens, names)
    for unit in plan.units:
        before, after = (m.get_submodule(unit.layers[0]).weight.detach() for m in (dense, model))
        norms = x[unit.layers[0]].square().sum(0).sqrt()
        keep = (unit.kept - unit.dense_biases) // unit.d_out
        for row, found in zip(before, after, strict=True):
            largest = (row.abs() * norms).argsort(descending=True)[:keep]
            assert set(found.nonzero().flatten().tolist()) == set(largest.tolist())


@pytest.mark.parametrize("name", sorted(PRUNINGS))
@pytest.mark.parametrize("fraction", [0.35, 0.6, 0.9])
def test_the_budget_is_not_exceeded_and_the_plan_says_what_is_left(tokens, name, fraction):
    model = tiny_model()
    _, plan, done = pruned(model, tokens, name, param_fraction=fraction)
    layers = [model.get_submodule(unit.layers[0]) for unit in plan.units]
    assert sum(int((layer.weight != 0).sum()) for layer in layers) == done.parameters
    assert 0 < plan.totals["param_fraction"] <= fraction
    assert plan.totals["param_fraction"] > fraction - (0.05 if PRUNINGS[name].structured else 1 / 32)  # rows of 32 weights
    stored = sum(p.numel() for p in model.parameters()) * 4
    assert plan.totals["bytes"] == stored
    assert RankPlan.from_dict(plan.to_dict()) == plan


@pytest.mark.parametrize("architecture", SEPARATE)
def test_a_narrow_model_is_the_dense_one_without_the_removed_parts(architecture, tokens, tmp_path):
    masked, model = tiny_model(architecture), tiny_model(architecture)
    statistics, _, _ = pruned(model, tokens, "llm-pruner", param_fraction=0.6)
    before = couplings(masked, find_groups(masked, LayersConfig()))
    removed = 0
    with torch.no_grad():
        for one in before:
            consumer = masked.get_submodule(one.consumer.name)
            size = one.consumer.d_in // one.parts
            score = statistics.groups[one.consumer_group].extras["taylor"].view(one.parts, size).sum(1)
            keep = model.get_submodule(one.consumer.name).in_features // size
            for part in score.argsort(descending=True)[keep:].tolist():
                consumer.weight[:, part * size : (part + 1) * size] = 0
                removed += 1
    assert removed
    expected = masked(input_ids=tokens).logits
    torch.testing.assert_close(model(input_ids=tokens).logits, expected, rtol=1e-4, atol=1e-4)
    model.save_pretrained(tmp_path / "narrow")
    loaded, info = AutoModelForCausalLM.from_pretrained(tmp_path / "narrow", output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["mismatched_keys"]
    assert type(loaded) is type(model)
    torch.testing.assert_close(loaded(input_ids=tokens).logits, expected, rtol=1e-4, atol=1e-4)


def test_importance_is_the_first_order_change_of_the_loss_by_a_column(tokens):
    model = tiny_model()
    statistics = statistics_of(model, tokens, "llm-pruner")
    name = "model.layers.1.mlp.down_proj"
    weight = model.get_submodule(name).weight
    total = torch.zeros(weight.shape[1], dtype=torch.float64)
    for sequence in tokens:
        logits = model(input_ids=sequence[None]).logits[0, :-1]
        loss = torch.nn.functional.cross_entropy(logits, sequence[1:], reduction="sum")
        (gradient,) = torch.autograd.grad(loss, weight)
        total += (weight * gradient).sum(0).abs().double().detach()
    found = statistics.groups[name].extras["taylor"].double()
    torch.testing.assert_close(found, total / len(tokens), rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("architecture", ["gpt2", "phi3"])
def test_llm_pruner_names_what_it_cannot_cut(architecture, tokens):
    with pytest.raises(ModelError, match="separate q, k, v"):
        pruned(tiny_model(architecture), tokens, "llm-pruner", param_fraction=0.6)


def test_llm_pruner_needs_every_block(model):
    groups = find_groups(model, LayersConfig(include=("*layers.0.*",)))
    with pytest.raises(ModelError, match="not all blocks were chosen"):
        couplings(model, groups)


@pytest.mark.parametrize(
    ("name", "options", "budget", "error", "words"),
    [
        ("magnitude", {}, {"rank_fraction": 0.5}, BudgetError, "it has no rank"),
        ("wanda", {}, {"max_bytes": "1MB"}, BudgetError, "its zeros are stored"),
        ("llm-pruner", {}, {"max_kl": 0.1}, BudgetError, "no forecast"),
        ("llm-pruner", {}, {"param_fraction": 0.01}, BudgetError, "the least is"),
        ("magnitude", {"propagate": True}, {"param_fraction": 0.5}, UsageError, "finds no subspaces"),
        ("wanda", {"gate": "rho"}, {"param_fraction": 0.5}, UsageError, "finds no subspaces"),
    ],
)
def test_what_makes_no_sense_is_refused(model, name, options, budget, error, words):
    groups = find_groups(model, LayersConfig())
    with pytest.raises(error, match=words):
        plan_model(model, groups, MethodConfig(name=name, **options), BudgetConfig(**budget))


def test_both_kinds_of_method_are_found_by_name():
    assert find_method("fasc").name == "fasc"
    assert find_method("wanda").name == "wanda"
    with pytest.raises(UnknownNameError, match="did you mean `magnitude`"):
        find_method("magnitud")
