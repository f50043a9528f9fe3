"""What may be left out joins the candidates: each at its cost, and nothing where a model has no such parts."""

from itertools import product

import numpy as np
import pytest
import torch

from fasc.compression.compress import carry_out
from fasc.edits.skip import Skip
from fasc.errors import BudgetError
from fasc.layouts import layouts_named
from fasc.model.groups import Unit
from fasc.model.layers import Layer
from fasc.planning.candidates import Alternative, Rules, candidates
from fasc.planning.lagrangian import allocate_by_loss
from fasc.planning.options import MethodConfig
from fasc.planning.plan import Plan
from fasc.stages.compress import needs_of
from fasc.stages.plan import plan
from fasc.statistics.collect import collect_moments
from tests.conftest import tiny_model

NO_PRODUCTS = ("dense", "channels", "heads", "values", "skip")


def test_a_plan_with_more_to_leave_out_loses_no_more_and_keeps_its_budget(statistics):
    for budget in ({"param_fraction": 0.8}, {"flop_fraction": 0.7}, {"max_bytes": 68_000}):
        losses = []
        for words in (("dense", "channels"), ("dense", "channels", "heads"), NO_PRODUCTS[:-1], NO_PRODUCTS):
            try:
                losses.append(plan(tiny_model(), statistics, layouts=words, **budget).predicted_loss)
            except BudgetError:  # too little to leave out
                losses.append(np.inf)
        assert losses == sorted(losses, reverse=True)
        assert losses[-1] < losses[0]


@pytest.mark.parametrize("budget", [{"param_fraction": 0.75}, {"flop_fraction": 0.75}, {"max_kl": 4.0}])
def test_what_the_plan_says_of_size_and_work_is_what_the_model_has(statistics, budget):
    model = tiny_model()
    made = plan(model, statistics, layouts=NO_PRODUCTS, **budget)
    assert {edit.edit for edit in made.edits} & {"heads", "values", "skip"}
    assert Plan.from_dict(made.to_dict()) == made
    carry_out(model, statistics, made)
    assert model.num_parameters() == made.totals["parameters"]
    linear = sum(module.weight.numel() for module in model.model.layers.modules() if isinstance(module, torch.nn.Linear))
    dense = sum(layer.d_in * layer.d_out for layer in made.layers)
    assert linear / dense == pytest.approx(made.totals["multiply_add_fraction"])
    for name, asked in budget.items():
        kept = {"param_fraction": "param_fraction", "flop_fraction": "multiply_add_fraction", "max_kl": "predicted_loss"}[name]
        assert made.totals[kept] <= asked


def test_held_out_moments_forecast_what_others_chose(statistics, tokens):
    from fasc.statistics.collect import collect_moments

    other = collect_moments(tiny_model(), tokens.flip(0, 1)[:12], statistics.needs)
    words = {"layouts": NO_PRODUCTS, "param_fraction": 0.75}
    assert (
        plan(tiny_model(), statistics, held_out=other, **words).predicted_loss
        != plan(tiny_model(), statistics, **words).predicted_loss
    )


def test_a_plan_says_what_this_model_has_nothing_of(measured):
    made = plan(tiny_model("gpt2"), measured("gpt2"), layouts=("pivoted", *NO_PRODUCTS), param_fraction=0.8)
    assert made.lacking == ("heads", "values")
    assert "heads, values: its parts cannot be told apart" in str(made)
    assert "told apart" not in str(plan(tiny_model("gpt2"), measured("gpt2"), param_fraction=0.8))


@pytest.mark.parametrize("wrong", [{"rank_fraction": 0.5}, {"param_fraction": 0.8, "propagate": True}])
def test_where_nothing_weighs_them_they_are_refused(statistics, wrong):
    with pytest.raises(BudgetError, match="`heads` is chosen by the forecast loss of the whole model"):
        plan(tiny_model(), statistics, layouts=("dense", "pivoted", "heads"), **wrong)


def test_a_floor_keeps_sublayers_and_the_share_of_heads(statistics):
    made = plan(tiny_model(), statistics, layouts=("pivoted", *NO_PRODUCTS), param_fraction=0.7, floor=0.6)
    assert not any(isinstance(edit, Skip) for edit in made.edits)
    assert all(edit.count / edit.heads >= 0.6 for edit in made.edits if edit.edit == "heads")


def choice(seed):
    """A unit with ranks, the same with a smaller unit after an edit, and nothing of it at a cost of its own."""
    generator = np.random.default_rng(seed)

    def unit(width):
        one = Unit(f"u{seed}", (Layer(f"u{seed}", 24, width, bias=False),))
        losses = 0.01 * np.append(np.cumsum(np.sort(generator.exponential(size=width)))[::-1], 0.0)
        return candidates(one, Rules(tuple(layouts_named(["dense", "pivoted"]))), losses)

    skip = Skip(
        sublayer="a",
        kind="mlp",
        layers=(("a.x", 24, 24, False), ("a.y", 24, 24, False)),
        returns=0,
        others=0,
        predicted_loss=0.4 * generator.uniform(),
    )
    return [Alternative((unit(24),)), Alternative((unit(16),), (skip.with_loss(0.02),)), Alternative((), (skip,), cost=24.0)]


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("share", [0.3, 0.6, 0.85])
def test_the_allocation_is_that_of_brute_force(seed, share):
    choices = [choice(3 * seed), choice(3 * seed + 1)]
    limit = share * 2 * 24 * 24

    def totals(alternative):
        if not alternative.units:
            return [(alternative.loss, alternative.cost)]
        (unit,) = alternative.units
        return [(alternative.loss + loss, cost) for loss, cost in zip(unit.losses, unit.costs, strict=True)]

    ways = [[total for alternative in group for total in totals(alternative)] for group in choices]
    best = min(sum(one[0] for one in pick) for pick in product(*ways) if sum(one[1] for one in pick) <= limit)
    made = allocate_by_loss(choices, limit, limited="cost")
    assert made.objective == pytest.approx(best, rel=5e-3)
    least = allocate_by_loss(choices, best, limited="loss")
    assert least.objective <= limit * (1 + 1e-9)


@pytest.mark.parametrize("architecture", ["llama", "qwen3", "gemma2"])
def test_what_is_left_is_factored_and_rounded_like_any_layer(architecture, tokens):
    """Everything at once, carried out: the bytes are those of the plan, and a cache gives what no cache gives."""
    options = MethodConfig(name="fasc", bits=(3, 4, 8))
    statistics = collect_moments(tiny_model(architecture), tokens, needs_of((options,)))
    layouts = ("factors", "shared", "pivoted", "pivoted-columns", *NO_PRODUCTS)
    model = tiny_model(architecture)
    made = plan(model, statistics, layouts=layouts, bits=(3, 4, 8), bits_group=16, max_kl=9.0, damping=1e-2)
    kinds = {edit.edit for edit in made.edits}
    assert "quantise" in kinds
    assert kinds & {"heads", "values", "skip"}
    carry_out(model, statistics, made)
    unique = {id(tensor): tensor for tensor in model.state_dict(keep_vars=True).values()}
    held = sum(tensor.numel() * tensor.element_size() for tensor in unique.values())
    assert held == made.totals["bytes"]
    prompt, generate = tokens[:2, :6], {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 2}
    assert torch.equal(model.generate(prompt, **generate), model.generate(prompt, use_cache=False, **generate))


def test_values_and_heads_are_factored_where_that_is_asked_for(statistics):
    model = tiny_model()
    made = plan(model, statistics, layouts=("factors", "pivoted", "heads", "values"), param_fraction=0.45, damping=1e-2)
    touched = [set(edit.touches) for edit in made.edits if edit.edit in ("heads", "values")]
    assert any(set(edit.touches) & names for edit in made.edits if edit.edit == "factor" for names in touched)
    carry_out(model, statistics, made)
    assert model(input_ids=torch.arange(9)[None]).logits.isfinite().all()
