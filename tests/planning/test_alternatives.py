"""What may become of the MLPs: which may lose channels, and how many."""

import pytest

from fasc.errors import BudgetError
from fasc.planning.alternatives import widths_of
from fasc.stages.plan import plan
from tests.conftest import tiny_model


def narrows(made):
    return [edit for edit in made.edits if edit.edit == "narrow"]


@pytest.mark.parametrize(
    "options",
    [
        {"allocation": "uniform", "param_fraction": 0.6},
        {"rank_fraction": 0.5},
        {"selection": "predicted", "param_fraction": 0.6},
        {"method": "svd", "param_fraction": 0.6},
        {"layouts": ("dense", "factors", "shared"), "param_fraction": 0.6},
    ],
    ids=["a uniform share", "a rank fraction", "a selection of methods", "energies that are no loss", "layouts without channels"],
)
def test_without_a_global_budget_nothing_is_narrowed(measured, options):
    assert not narrows(plan(tiny_model(), measured(), **options))


def test_a_floor_holds_for_channels(measured):
    widths = [edit.width for edit in narrows(plan(tiny_model(), measured(), param_fraction=0.7, floor=0.6, damping=1e-2))]
    assert widths
    assert all(width >= 0.6 * 48 for width in widths)


def test_a_narrower_layer_is_an_ordinary_one_and_counts_no_product(measured):
    made = plan(tiny_model(), measured(), param_fraction=0.8, overhead=10**6, damping=1e-2)
    assert made.edits == tuple(narrows(made)) != ()


def test_the_last_blocks_channels_stay(measured, architecture):
    made = plan(tiny_model(architecture), measured(architecture), param_fraction=0.5, damping=1e-2)
    assert [".0." in edit.consumer.name for edit in narrows(made)] == [True]


def test_numbers_of_channels_are_multiples_and_few():
    assert widths_of(1536, 8)[:2] == [1472, 1408]
    assert min(widths_of(1536, 8)) == 384
    assert all(width % 8 == 0 for width in widths_of(11008, 8))
    assert len(widths_of(14336, 8)) <= 24
    assert widths_of(48, 8)[0] == 46
    assert widths_of(1536, 8, 256) == [1280, 1024, 768, 512]
    assert widths_of(48, 8, 16) == [32, 16], "also where the multiple of ranks would not count"
    assert len(widths_of(14336, 8, 256)) <= 24


@pytest.mark.parametrize("multiple", [8, 16])
def test_numbers_of_channels_are_the_multiples_asked_for(measured, multiple):
    made = plan(tiny_model(), measured(), param_fraction=0.6, channel_multiple=multiple, damping=1e-2)
    assert narrows(made)
    assert all(edit.width % multiple == 0 for edit in narrows(made))
    assert 0.995 * 0.6 <= made.totals["param_fraction"] <= 0.6


def test_a_multiple_that_leaves_no_choice_is_refused(measured):
    with pytest.raises(BudgetError, match=r"no multiple of 48 .*`model\.layers\.0\.mlp\.down_proj`"):
        plan(tiny_model(), measured(), param_fraction=0.6, channel_multiple=48)


def test_the_multiple_holds_in_every_architecture(measured, architecture):
    made = plan(tiny_model(architecture), measured(architecture), param_fraction=0.5, channel_multiple=16, damping=1e-2)
    assert narrows(made)
    assert all(edit.width % 16 == 0 and 0 < edit.width < edit.channels for edit in narrows(made))
    assert made.totals["param_fraction"] <= 0.5
