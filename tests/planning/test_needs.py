"""What is measured for a method and a budget is enough, and nothing of it can be left out."""

import pytest

from fasc.compression.compress import carry_out
from fasc.errors import BudgetError, StatisticsError, UsageError
from fasc.methods import METHODS
from fasc.planning.needs import needs_for
from fasc.planning.options import BudgetConfig, MethodConfig
from fasc.pruning import PRUNINGS
from fasc.stages.plan import plan
from fasc.statistics.collect import collect_moments
from fasc.statistics.moments import Need
from tests.conftest import tiny_model

BUDGETS = {"rank": {"rank_fraction": 0.5}, "parameters": {"param_fraction": 0.7}, "loss": {"max_kl": 5.0}}


def compressed(tokens, needs, name, budget):
    """The plan as carried out on a model whose statistics hold these moments and no others."""
    model = tiny_model()
    statistics = collect_moments(model, tokens, needs)
    return carry_out(model, statistics, plan(model, statistics, method=name, damping=1e-2, **budget))


@pytest.mark.parametrize("budget", BUDGETS.values(), ids=BUDGETS)
@pytest.mark.parametrize("name", sorted(METHODS))
def test_the_moments_that_a_method_and_a_budget_need_are_enough_and_none_is_too_many(tokens, name, budget):
    needs = needs_for(MethodConfig(name=name), BudgetConfig(**budget))
    assert compressed(tokens, needs, name, budget).edits
    for need in needs - {Need("input", "group")}:  # which is measured in any case
        with pytest.raises((StatisticsError, BudgetError)):
            compressed(tokens, needs - {need}, name, budget)


@pytest.mark.parametrize("name", sorted(METHODS))
def test_without_a_budget_everything_is_measured_that_any_budget_needs(name):
    everything = needs_for(MethodConfig(name=name), None)
    for budget in BUDGETS.values():
        assert needs_for(MethodConfig(name=name), BudgetConfig(**budget)) <= everything


@pytest.mark.parametrize("name", sorted(PRUNINGS))
def test_pruning_needs_no_more_than_its_score(tokens, name):
    needs = needs_for(MethodConfig(name=name), BudgetConfig(param_fraction=0.7))
    assert compressed(tokens, needs, name, {"param_fraction": 0.7}).edits
    for need in needs - {Need("input", "group")}:
        with pytest.raises(StatisticsError):
            compressed(tokens, needs - {need}, name, {"param_fraction": 0.7})
    for wrong in ({"max_kl": 0.1}, {"rank_fraction": 0.5}):
        with pytest.raises(BudgetError, match="cannot keep"):
            needs_for(MethodConfig(name=name), BudgetConfig(**wrong))
    with pytest.raises(UsageError, match="prunes and finds no subspaces"):
        needs_for(MethodConfig(name=name, propagate=True), BudgetConfig(param_fraction=0.7))
