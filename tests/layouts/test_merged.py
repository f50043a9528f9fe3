"""Merged: for tables by rank, a rank that saves nothing stored as one dense matrix."""

import torch

from fasc.layouts import LAYOUTS, layouts_named
from tests.conftest import logits
from tests.layouts.units import unit_of


def test_it_must_be_asked_for():
    assert "merged" not in [layout.name for layout in layouts_named(None)]
    assert layouts_named(("merged",)) == [LAYOUTS["merged"]]


def test_it_is_taken_only_where_nothing_else_saves(in_layout, tokens):
    model, plan = in_layout("merged", rank_fraction=0.5, layouts=("factors", "shared", "merged"))
    assert {edit.layout for edit in plan.edits} == {"merged", "factors", "shared"}
    for edit in plan.edits:
        smaller = LAYOUTS["factors"].parameters(edit.unit, edit.rank) < edit.unit.parameters
        assert smaller == (edit.layout != "merged")
        assert edit.stored.parameters(edit.unit, edit.rank) <= edit.unit.parameters + edit.unit.d_out
    pivoted, _ = in_layout("pivoted", rank_fraction=0.5)
    torch.testing.assert_close(logits(model, tokens), logits(pivoted, tokens), rtol=0, atol=1e-4)


def test_it_has_any_rank_at_one_cost():
    unit = unit_of("three layers")
    assert {LAYOUTS["merged"].parameters(unit, rank) for rank in (1, 4, 11)} == {24 * 12 + 24}
