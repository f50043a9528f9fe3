"""One width for the experts of a block: kept by every plan, and the least loss that can be had so."""

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

import fasc
from fasc.edits.narrow import Narrow
from fasc.errors import BudgetError
from fasc.model.experts import expert_layers
from fasc.model.options import LayersConfig
from fasc.planning.alternatives import alternatives_of
from fasc.planning.make import plan_model
from fasc.planning.needs import rules_of, scopes_of
from fasc.planning.options import BudgetConfig, MethodConfig
from fasc.planning.removable import find_removable
from fasc.stages.compress import compress
from fasc.stages.plan import groups_of, plan
from tests.conftest import logits

pytestmark = pytest.mark.parametrize("mixture", ["mixtral", "qwen3_moe"], indirect=True)  # channels of gpt_oss are interleaved

OPTIONS = {"layouts": "dense,channels,factors", "damping": 1e-2, "rank_multiple": 1}


@pytest.fixture
def statistics(mixture, tokens):
    return fasc.collect(mixture, corpus=tokens, sequences=24, sequence_length=20)


def widths(made, count=4):
    """Of every expert of block 0."""
    found = {edit.consumer.name: edit.width for edit in made.edits if isinstance(edit, Narrow)}
    return [found.get(f"model.layers.0.mlp.experts.{index}.down_proj") for index in range(count)]


@pytest.mark.parametrize("share", [0.9, 0.7, 0.5])
def test_all_experts_of_a_block_keep_as_many_channels(mixture, statistics, share):
    free = plan(mixture, statistics, param_fraction=share, **OPTIONS)
    made = plan(mixture, statistics, param_fraction=share, equal_experts=True, **OPTIONS)
    assert len(set(widths(made))) == 1
    assert made.totals["param_fraction"] <= share
    assert made.predicted_loss >= free.predicted_loss * (1 - 1e-4)
    assert set(made.to_dict()["budget"]) == {"param_fraction", "equal_experts", "rank_multiple"} | set(free.to_dict()["budget"])


def test_without_it_their_widths_differ(mixture, statistics):
    assert len(set(widths(plan(mixture, statistics, param_fraction=0.7, **OPTIONS)))) > 1


@pytest.mark.parametrize("share", [0.8, 0.5])
def test_the_plan_is_the_best_that_keeps_one_width(mixture, statistics, share):
    """Against all totals of parameters, width by width."""
    layers = LayersConfig(include=("model.layers.0.mlp.experts.*",))
    options = MethodConfig(layouts=("dense", "channels", "factors"), damping=1e-2)
    budget = BudgetConfig(param_fraction=share, rank_multiple=1, equal_experts=True)
    known = {}
    with expert_layers(mixture):
        groups = [group for group in groups_of(mixture, statistics, layers) if group.block == 0]
        everything = [*groups, *(group for group in groups_of(mixture, statistics, LayersConfig()) if group.block == 1)]
        everything = [group for group in everything if group.layers[0].expert is not None]
        made = plan_model(mixture, everything, options, budget, statistics, known=known)
        removable = find_removable(mixture, everything, frozenset({"channels"}))
        free = budget.model_copy(update={"equal_experts": False})
        choices = alternatives_of(
            everything, removable, scopes_of(options, free), rules_of(options, free), next(iter(known.values())), 1e-2
        )
    limit = int(share * made.dense_parameters)
    first = [one for one in choices if len(one) > 1]
    others = [one for one in choices if len(one) == 1]
    assert (len(first), len(others)) == (4, 8)
    tail = best(limit, [unit for (one,) in others for unit in one.units])
    found = []
    for which in range(len(first[0])):
        alternatives = [one[which] for one in first]
        assert len({edit.width for one in alternatives for edit in one.before}) <= 1
        table = tail
        for one in alternatives:
            table = best(limit, one.units, table) + one.loss
        found.append(table.min())
    assert made.predicted_loss == pytest.approx(min(found), rel=2e-4)


def best(limit, units, table=None):
    """The least loss with at most so many parameters, for every number up to a limit."""
    table = np.zeros(limit + 1) if table is None else table
    for unit in units:
        new = np.full(limit + 1, np.inf)
        for cost, loss in zip(unit.costs.astype(int), unit.losses, strict=True):
            if cost <= limit:
                new[cost:] = np.minimum(new[cost:], table[: limit + 1 - cost] + loss)
        table = new
    return table


def test_such_a_model_is_compressed_saved_and_loaded(mixture, statistics, tokens, tmp_path):
    made = plan(mixture, statistics, param_fraction=0.8, equal_experts=True, **OPTIONS | {"layouts": "dense,channels"})
    small = compress(mixture, statistics, made)
    (width,) = set(widths(made))
    for index in range(4):
        assert mixture.get_submodule(f"model.layers.0.mlp.experts.{index}.down_proj").in_features == width
    small.save(tmp_path / "small")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "small").eval()
    assert torch.equal(logits(again, tokens), logits(small.model, tokens))


def test_an_expert_without_moments_is_refused_because_it_would_keep_its_width(mixture, statistics):
    with pytest.raises(BudgetError, match="1 of the 4 experts of `model.layers.0.mlp.experts` have no moments") as raised:
        plan(mixture, statistics, param_fraction=0.7, equal_experts=True, exclude=("*.layers.0.mlp.experts.2.*",), **OPTIONS)
    assert "--expert-floor" in raised.value.hint


def test_means_of_experts_have_no_width(mixture, statistics):
    with pytest.raises(BudgetError, match="has no width"):
        plan(mixture, statistics, param_fraction=0.7, equal_experts=True, layouts="dense,channels,experts")
