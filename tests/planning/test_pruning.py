"""Plans of pruning methods keep their budget, and refuse what pruning has no answer to."""

import pytest

from fasc.errors import BudgetError, ModelError, UsageError
from fasc.model.groups import find_groups
from fasc.model.options import LayersConfig
from fasc.planning.make import plan_model
from fasc.planning.needs import needs_for
from fasc.planning.options import BudgetConfig, MethodConfig
from fasc.planning.plan import Plan
from fasc.pruning import PRUNINGS, Structured
from tests.conftest import tiny_model
from tests.pruning.pruned import pruned


@pytest.mark.parametrize("name", sorted(PRUNINGS))
@pytest.mark.parametrize("fraction", [0.35, 0.6, 0.9])
def test_the_budget_is_not_exceeded_and_the_plan_says_what_is_left(tokens, name, fraction):
    model = tiny_model()
    _, made, done = pruned(model, tokens, name, param_fraction=fraction)
    layers = [model.get_submodule(layer.name) for layer in made.layers]
    assert sum(int((layer.weight != 0).sum()) for layer in layers) == done.parameters
    assert 0 < made.totals["param_fraction"] <= fraction
    structured = isinstance(PRUNINGS[name], Structured)
    assert made.totals["param_fraction"] > fraction - (0.05 if structured else 1 / 32)  # rows of 32 weights
    assert made.totals["rank_fraction"] is None
    stored = sum(p.numel() for p in model.parameters()) * 4
    assert made.totals["bytes"] == stored
    assert Plan.from_dict(made.to_dict()).edits == made.edits


def test_structured_pruning_keeps_about_the_same_share_of_heads_and_channels_in_every_block(tokens):
    _, made, _ = pruned(tiny_model(layers=3), tokens, "llm-pruner", param_fraction=0.6)
    counts = {(edit.part, edit.parts, edit.count) for edit in made.edits}
    assert len(made.edits) == 6
    assert len(counts) == 2, "one number of heads and one of channels"
    shares = {part: count / parts for part, parts, count in counts}
    assert abs(shares["heads"] - shares["channels"]) <= 0.25, "of two key-value heads one can go, or none"


@pytest.mark.parametrize("architecture", ["gpt2", "phi3"])
def test_llm_pruner_names_what_it_cannot_take_apart(architecture, tokens):
    with pytest.raises(ModelError, match="belongs to no attention or MLP it knows"):
        pruned(tiny_model(architecture), tokens, "llm-pruner", param_fraction=0.6)


def test_llm_pruner_needs_every_block(model):
    groups = find_groups(model, LayersConfig(include=("*layers.0.*",)))
    with pytest.raises(ModelError, match="not all blocks are so, or were chosen"):
        plan_model(model, groups, MethodConfig(name="llm-pruner"), BudgetConfig(param_fraction=0.6))


@pytest.mark.parametrize(
    ("name", "options", "budget", "error", "words"),
    [
        ("magnitude", {}, {"rank_fraction": 0.5}, BudgetError, "it has no rank"),
        ("wanda", {}, {"max_bytes": "1MB"}, BudgetError, "its zeros are stored"),
        ("llm-pruner", {}, {"max_kl": 0.1}, BudgetError, "no forecast"),
        ("llm-pruner", {}, {"param_fraction": 0.01}, BudgetError, "holds no head"),
        ("magnitude", {"propagate": True}, {"param_fraction": 0.5}, UsageError, "finds no subspaces"),
        ("magnitude", {"allocation": "fisher"}, {"param_fraction": 0.5}, UsageError, "finds no subspaces"),
        ("wanda", {"selection": "rho"}, {"param_fraction": 0.5}, UsageError, "finds no subspaces"),
    ],
)
def test_what_makes_no_sense_is_refused_with_a_hint(model, name, options, budget, error, words):
    groups = find_groups(model, LayersConfig())
    with pytest.raises(error, match=words) as refused:
        plan_model(model, groups, MethodConfig(name=name, **options), BudgetConfig(**budget))
    assert refused.value.hint
    if words != "holds no head":
        with pytest.raises(error, match=words):
            needs_for(MethodConfig(name=name, **options), BudgetConfig(**budget))


def test_bytes_are_a_budget_of_structured_pruning(model, tokens, tmp_path):
    _, made, _ = pruned(model, tokens, "llm-pruner", max_bytes=60_000)
    assert 0.95 * 60_000 < made.totals["bytes"] + made.model.header_bytes <= 60_000
    model.save_pretrained(tmp_path)
    assert (tmp_path / "model.safetensors").stat().st_size <= 60_000
