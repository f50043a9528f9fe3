"""The memory forecast is what the tensors weigh."""

import pytest

from fasc.compression.compress import carry_out
from fasc.edits.narrow import Narrow
from fasc.planning.needs import needs_for
from fasc.planning.options import BudgetConfig, MethodConfig
from fasc.stages.plan import plan
from fasc.statistics.collect import collect_moments
from tests.conftest import tiny_model


def test_the_memory_forecast_is_what_the_tensors_weigh(tokens):
    model, budget = tiny_model(), BudgetConfig(param_fraction=0.6)
    statistics = collect_moments(model, tokens, needs_for(MethodConfig(), budget))
    made = plan(model, statistics, param_fraction=0.6)
    forecast = made.forecast_memory
    assert forecast["model"] == sum(p.numel() * 4 for p in model.parameters())
    matrices = [group.input.matrix for group in statistics.groups.values()]
    matrices += [gradient.covariance.matrix for group in statistics.groups.values() for gradient in group.gradients.values()]
    assert forecast["moments"] == 4 * sum(matrix.numel() for matrix in matrices)
    narrow = [edit for edit in made.edits if isinstance(edit, Narrow)]
    assert narrow
    assert forecast["channels"] == sum(4 * edit.width**2 for edit in narrow)
    dense = list(model.parameters())
    carry_out(model, statistics, made)
    new = [p for p in [*model.parameters(), *model.buffers()] if all(p is not old for old in dense) and p.dim()]
    assert forecast["compressed"] == pytest.approx(sum(p.numel() * p.element_size() for p in new), rel=0.05)
