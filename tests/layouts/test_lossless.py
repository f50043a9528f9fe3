"""Pivots say what two factors say, with fewer numbers."""

import itertools

import pytest
import torch

from fasc.compression.compress import carry_out
from fasc.layouts import LAYOUTS
from fasc.layouts.pivoted import PivotedLinear
from fasc.methods import METHODS
from fasc.model.groups import Unit
from fasc.model.layers import Layer
from fasc.stages.plan import plan
from fasc.statistics.collect import collect_moments
from tests.conftest import tiny_model


@pytest.fixture(scope="module")
def statistics(tokens):
    return collect_moments(tiny_model(), tokens, METHODS["fasc"].needs_in(("group", "layer")))


def compressed(statistics, layouts, dtype=torch.float32, **options):
    """Every layer factored at the same ranks, whatever the layouts are."""
    model = tiny_model(dtype=dtype)
    made = plan(model, statistics, layouts=(*layouts, "merged"), allocation="uniform", **options)
    carry_out(model, statistics, made)
    return model, made


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("plain,pivoted", list(itertools.product(("shared", "factors"), ("pivoted", "pivoted-columns"))))
def test_the_same_ranks_give_the_same_logits_to_the_precision_of_the_weights(statistics, tokens, dtype, plain, pivoted):
    outputs, ranks = [], []
    for layouts in ((plain, pivoted), (plain,)):
        model, made = compressed(statistics, layouts, dtype, rank_fraction=0.4)
        ranks.append([(edit.layers, edit.rank) for edit in made.edits])
        with torch.no_grad():
            outputs.append(model(input_ids=tokens).logits.float())
    assert ranks[0] == ranks[1]
    assert pivoted in {edit.layout for edit in compressed(statistics, (plain, pivoted), dtype, rank_fraction=0.4)[1].edits}
    assert (outputs[0] - outputs[1]).norm() / outputs[1].norm() < (1e-5 if dtype == torch.float32 else 0.06)


def test_pivots_of_a_shared_group_are_taken_over_all_members(statistics):
    model, _ = compressed(statistics, ("shared", "pivoted"), rank_fraction=0.5)
    attention = model.model.layers[0].self_attn
    members = [attention.q_proj, attention.k_proj, attention.v_proj]
    assert all(isinstance(member, PivotedLinear) for member in members)
    own = [member.stop - member.start for member in members]
    assert sum(own) == 16
    assert min(own) < max(own)
    assert attention.q_proj.down.weight.shape == (16, 32)


def test_columns_are_kept_where_that_is_cheaper_and_each_weight_is_that_of_two_factors(statistics):
    """A wide layer's inputs are fewer than its outputs, so their order is cheaper."""
    options = {"method": "two-sided", "rank_fraction": 0.4}
    plain, _ = compressed(statistics, ("factors",), **options)
    pivoted, made = compressed(statistics, ("factors", "pivoted", "pivoted-columns"), **options)
    edits = [edit for edit in made.edits if edit.layout != "merged"]
    assert {edit.layout for edit in edits} == {"pivoted", "pivoted-columns"}
    for edit in edits:
        assert (edit.layout == "pivoted-columns") == (edit.unit.d_in <= edit.unit.d_out)
        one, other = (model.get_submodule(edit.layers[0]) for model in (plain, pivoted))
        torch.testing.assert_close(other.product(), one.product(), rtol=0, atol=1e-5)


def test_pivots_are_never_more_numbers_than_the_dense_weight_or_two_factors():
    for d_in, d_out, rank in itertools.product((8, 24), (8, 64), range(1, 8)):
        unit = Unit("u", (Layer("u", d_in, d_out, bias=False),))
        factors = LAYOUTS["factors"].parameters(unit, rank)
        for name in ("pivoted", "pivoted-columns"):
            layout = LAYOUTS[name]
            weights = layout.parameters(unit, rank) - layout.indices(unit, rank)
            assert weights == factors - rank**2
            assert weights - d_out <= d_in * d_out
