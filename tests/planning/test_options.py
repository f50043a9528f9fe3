"""A budget is one number with a unit, and has a name of its own."""

import math

import pytest

from fasc.errors import UsageError
from fasc.options import parse
from fasc.planning.options import BUDGETS, BudgetConfig, MethodConfig


def test_budgets_that_differ_in_anything_have_names_that_tell_the_rows_of_a_run_apart():
    asked = [
        {},
        {"floor": 0.25},
        {"overhead": 4096},
        {"rank_multiple": 1},
        {"floor": 0.25, "rank_multiple": 16},
        {"channel_multiple": 256},
    ]
    labels = [BudgetConfig(param_fraction=0.8, **more).label for more in asked]
    assert labels == [
        "params0.8",
        "params0.8-floor0.25",
        "params0.8-overhead4096",
        "params0.8-multiple1",
        "params0.8-floor0.25-multiple16",
        "params0.8-channels256",
    ]
    kinds = [{"rank_fraction": 0.5}, {"model_fraction": 0.5}, {"max_bytes": "400 MB"}, {"max_kl": 0.5}]
    kinds += [{"max_perplexity_increase": "50%"}, {"param_fraction": 0.5}, {"flop_fraction": 0.5}]
    assert {next(iter(one)) for one in kinds} == set(BUDGETS)
    assert len({BudgetConfig(**one).label for one in kinds}) == len(kinds)


@pytest.mark.parametrize(
    "given,bytes_",
    [
        (1000, 1000),
        ("1000", 1000),
        ("400MB", 400_000_000),
        ("400 MB", 400_000_000),
        ("380MiB", 380 * 2**20),
        ("1.5GB", 1_500_000_000),
    ],
)
def test_bytes_are_read_with_their_unit(given, bytes_):
    assert BudgetConfig(max_bytes=given).bytes_limit == bytes_


@pytest.mark.parametrize("given", ["5%", "0.05", 0.05, " 5 % "])
def test_an_increase_of_the_perplexity_is_a_loss_in_nats(given):
    assert BudgetConfig(max_perplexity_increase=given).loss_limit == pytest.approx(math.log(1.05))


@pytest.mark.parametrize(
    "wrong",
    [
        {"param_fraction": 0},
        {"param_fraction": 1.01},
        {"rank_fraction": -0.5},
        {"model_fraction": float("nan")},
        {"max_bytes": "many"},
        {"max_bytes": "0MB"},
        {"max_bytes": -5},
        {"max_bytes": "1e999MB"},
        {"max_bytes": float("inf")},
        {"max_kl": 0},
        {"max_kl": float("inf")},
        {"max_kl": float("nan")},
        {"max_perplexity_increase": "-5%"},
        {"max_perplexity_increase": "nan"},
        {"max_perplexity_increase": "a lot"},
        {"param_fraction": 0.5, "floor": 1},
        {"param_fraction": 0.5, "rank_multiple": 0},
        {"param_fraction": 0.5, "overhead": -1},
        {"param_fraction": 0.5, "max_kl": 0.1},
        {"fraction": 0.5},
    ],
    ids=str,
)
def test_a_budget_out_of_range_is_refused_in_one_line_that_names_it(wrong):
    with pytest.raises(UsageError) as refused:
        parse(BudgetConfig, wrong, "budget")
    assert "\n" not in str(refused.value)
    assert any(name in refused.value.message for name in wrong)
    with pytest.raises(UsageError):
        parse(BudgetConfig, wrong, "")  # as the verbs call it


def test_half_the_rank_is_the_budget_where_none_is_given():
    assert BudgetConfig() == BudgetConfig(rank_fraction=0.5)


def test_a_changed_method_keeps_what_was_said_of_it_and_what_the_method_declares_itself():
    given = MethodConfig(name="fasc", damping=0.01, layouts=("dense", "pivoted"))
    changed = given.but(allocation="uniform")
    assert changed.own == given.own == {"damping": 0.01}
    assert (changed.allocation, changed.layouts, given.allocation) == ("uniform", ("dense", "pivoted"), None)
