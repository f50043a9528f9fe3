"""Channel pruning costs what is forecast, by the moments that chose and by others."""

import pytest
import torch

from fasc.forecast.channels import narrowing_loss
from fasc.forecast.half_j import fisher_loss_curve
from fasc.methods import METHODS
from fasc.model.groups import stacked_weight
from fasc.stages.plan import plan
from fasc.statistics.collect import collect_moments
from fasc.statistics.moments import as_float64
from fasc.statistics.narrowing import narrowed
from tests.conftest import tiny_model


def of_kind(made, kind):
    return [edit for edit in made.edits if edit.edit == kind]


def by_hand(model, statistics, narrowing):
    """½ tr(Eᵀ Σ_hh E Σ_xx) with E = W − W T."""
    group = statistics.groups[narrowing.coupling.consumer.name]
    weight = stacked_weight(model, narrowing.coupling.consumer.unit())
    _, xx = as_float64(group.input)
    gradient = group.gradients[narrowing.coupling.consumer.name]
    _, metric = as_float64(gradient.covariance)
    error = weight.clone()
    error[:, narrowing.channels] -= weight @ narrowing.estimate
    if gradient.side == "input":  # Σ_gg = Wᵀ Σ_hh W
        back = torch.linalg.pinv(weight)
        metric = back.mT @ metric @ back
    return 0.5 * float(torch.trace(error.mT @ metric @ error @ xx))


def test_the_forecast_is_the_loss_by_hand(measured):
    model, statistics = tiny_model(), measured()
    made = plan(model, statistics, param_fraction=0.85, damping=1e-9, layouts=("dense", "channels"))
    assert of_kind(made, "narrow") == list(made.edits) != []
    for edit in made.edits:
        narrowing = edit.choose(model, statistics)
        assert narrowing.width == edit.width
        expected = by_hand(model, statistics, narrowing)
        assert edit.predicted_loss == pytest.approx(expected, rel=1e-4)
        assert narrowing_loss(model, statistics, narrowing) == pytest.approx(expected, rel=1e-9)
    assert made.predicted_loss == pytest.approx(sum(edit.predicted_loss for edit in made.edits), rel=1e-9)


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_held_out_moments_forecast_the_pruning_and_the_rank_of_what_is_left(measured, name):
    model, chosen = tiny_model(name), measured(name)
    other = torch.randint(3, 128, (24, 20), generator=torch.Generator().manual_seed(8))
    unseen = collect_moments(model, other, METHODS["fasc"].needs_in(("group", "layer")))
    made = plan(model, chosen, param_fraction=0.2, damping=1e-2, held_out=unseen)
    (narrow,) = of_kind(made, "narrow")
    narrowing = narrow.choose(model, chosen)
    assert narrow.predicted_loss == pytest.approx(narrowing_loss(model, unseen, narrowing), rel=1e-6)
    (factor,) = [edit for edit in of_kind(made, "factor") if edit.layers == (narrow.consumer.name,)]
    narrow.carry_out(model, chosen, narrowing)
    weight = stacked_weight(model, factor.unit)
    full = factor.solver.decompose(weight, narrowed(chosen, narrowing).unit(factor.unit))
    expected = fisher_loss_curve(full, weight, narrowed(unseen, narrowing).unit(factor.unit))[factor.rank]
    assert factor.predicted_loss == pytest.approx(float(expected), rel=1e-3)
