"""Selections choose between two methods for every unit, say why, and each unit is compressed by its own method."""

import pytest
import torch
from pydantic import ValidationError

from fasc.compression.compress import carry_out
from fasc.compression.trial import Trial
from fasc.errors import BudgetError, StatisticsError, UsageError
from fasc.methods import METHODS
from fasc.paper.selection import select_methods
from fasc.planning.needs import needs_for, selection_needs
from fasc.planning.options import BY_RHO, BudgetConfig, MethodConfig
from fasc.planning.plan import Plan
from fasc.stages.plan import plan
from fasc.statistics.collect import collect_moments
from tests.conftest import tiny_model

HALF = BudgetConfig(rank_fraction=0.5)


def selecting(by, threshold=0.5, **more):
    if by in BY_RHO and "selection_share" not in more:
        more["selection_threshold"] = threshold
    return MethodConfig(name="fasc", damping=1e-3, selection=by, **more)


@pytest.fixture(scope="module")
def statistics(tokens):
    return collect_moments(tiny_model(), tokens, needs_for(selecting("rho"), HALF))


@pytest.fixture
def made(statistics):
    return plan(tiny_model(), statistics, method=selecting("none"), rank_fraction=0.5)


@pytest.mark.parametrize("by", ["rho", "predicted", "kl"])
def test_a_selection_chooses_for_each_unit_and_says_why(statistics, made, tokens, by):
    model = tiny_model()
    options = selecting(by)
    assert selection_needs(options) <= needs_for(options, HALF)
    chosen = select_methods(model, statistics, made, options, lambda: Trial(model, statistics, tokens[:4]))
    assert len(chosen.edits) == len(made.edits) == 8
    for edit, before in zip(chosen.edits, made.edits, strict=True):
        assert (edit.selection["by"], edit.selection["own"]) == (by, "fasc")
        better = edit.selection["score"] > 0.5 if by == "rho" else edit.selection["score"] <= 0
        assert edit.method == ("fasc" if better else "svd")
        assert (edit.rank, edit.layout) == (before.rank, before.layout), "ranks and layouts stay"
    if by == "predicted":
        assert {edit.method for edit in chosen.edits} == {"fasc"}
    assert Plan.from_dict(chosen.to_dict()).edits == chosen.edits


def test_the_threshold_of_rho_leaves_all_or_none_to_the_method(statistics, made):
    model = tiny_model()
    everything = select_methods(model, statistics, made, selecting("rho", 0.0))
    assert {edit.method for edit in everything.edits} == {"fasc"}
    nothing = select_methods(model, statistics, made, selecting("rho", 100.0))
    assert {edit.method for edit in nothing.edits} == {"svd"}
    assert nothing.predicted_loss > made.predicted_loss


def test_the_measured_selection_is_that_of_the_lower_divergence(statistics, made, tokens):
    """By hand for one unit: both methods in turn, everything else dense."""
    model = tiny_model()
    trial = Trial(model, statistics, tokens[:4])
    chosen = select_methods(model, statistics, made, selecting("kl"), lambda: trial).edits[-1]
    before = made.edits[-1]
    nats = {
        name: trial.measure([before.model_copy(update={"method": name, "options": options})]).nats
        for name, options in (("fasc", {"damping": 1e-3}), ("svd", {}))
    }
    assert chosen.selection["score"] == pytest.approx(nats["fasc"] - nats["svd"], rel=1e-4)
    assert chosen.method == min(nats, key=nats.get)


def test_a_selected_plan_compresses_each_unit_with_its_own_method(statistics, made):
    model, plain = tiny_model(), tiny_model()
    carry_out(model, statistics, select_methods(model, statistics, made, selecting("rho", 100.0)))
    carry_out(plain, statistics, plan(plain, statistics, method="svd", rank_fraction=0.5))
    for name, value in plain.state_dict().items():
        assert torch.equal(value, model.state_dict()[name]), name


def test_the_other_method_gets_the_options_that_it_has(statistics, made):
    """``reading`` is an option of the one, ``damping`` of both."""
    options = MethodConfig(name="fasc-eq6", reading="oblique", damping=1e-3, selection="rho", selection_threshold=100.0)
    other = select_methods(tiny_model(), statistics, made, options).edits[0]
    assert (other.method, other.options) == ("svd", {"damping": 1e-3})
    own = select_methods(tiny_model(), statistics, made, options.but(selection_threshold=0.0)).edits[0]
    assert (own.method, own.options["reading"]) == ("fasc-eq6", "oblique")


def test_what_a_selection_needs_and_does_not_have_is_said(statistics, made, tokens):
    model = tiny_model()
    with pytest.raises(UsageError, match="held-out"):
        select_methods(model, statistics, made, selecting("kl"))
    bare = collect_moments(model, tokens, METHODS["fasc"].needs)
    with pytest.raises(StatisticsError, match="no cross covariance") as refused:
        select_methods(model, bare, made, selecting("rho"))
    assert "--diagnosis" in refused.value.hint
    assert select_methods(model, bare, made, selecting("none")) is made


@pytest.mark.parametrize("share", [0.01, 0.25, 0.5, 1.0])
def test_a_share_takes_so_many_units_with_the_highest_or_the_lowest_rho_and_leaves_the_others(statistics, made, share):
    model = tiny_model()
    everything = select_methods(model, statistics, made, selecting("rho", 0.0))
    ordered = sorted(everything.edits, key=lambda edit: edit.selection["score"])
    count = max(1, round(share * len(ordered)))
    for by, expected in (("rho", ordered[-count:]), ("low-rho", ordered[:count])):
        chosen = select_methods(model, statistics, made, selecting(by, selection_share=share, selection_else="none"))
        assert {edit.unit for edit in chosen.edits} == {edit.unit for edit in expected}
        assert {edit.method for edit in chosen.edits} == {"fasc"}


def test_units_that_a_selection_leaves_keep_their_weights(statistics, made):
    model, dense = tiny_model(), tiny_model().state_dict()
    chosen = select_methods(model, statistics, made, selecting("low-rho", selection_share=0.25, selection_else="none"))
    carry_out(model, statistics, chosen)
    small = model.state_dict()
    changed = [name for name in dense if name not in small or not torch.equal(dense[name], small[name])]
    layers = {f"{layer}.weight" for edit in chosen.edits for layer in edit.places}
    assert layers
    assert set(changed) == layers


def test_no_other_method_needs_a_selection_by_rho():
    with pytest.raises(BudgetError, match="`predicted`"):
        selection_needs(selecting("predicted", selection_else="none"))


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"selection_share": 0.2}, "selection_share means nothing beside selection none"),
        ({"selection_threshold": 0.2}, "selection_threshold means nothing beside selection none"),
        ({"selection_else": "whitened"}, "selection_else means nothing beside selection none"),
        ({"selection": "predicted", "selection_share": 0.2}, "selection_share means nothing beside selection predicted"),
        ({"selection": "kl", "selection_threshold": 0.2}, "selection_threshold means nothing beside selection kl"),
        ({"selection": "rho", "selection_threshold": 0.2, "selection_share": 0.2}, "give one"),
    ],
)
def test_what_a_selection_would_pass_over_is_refused(given, message):
    with pytest.raises(ValidationError, match=message):
        MethodConfig(**given)
