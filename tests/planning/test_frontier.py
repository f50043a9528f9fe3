"""The frontier: width alone, bits alone, both; both are never worse than either."""

import pytest

from fasc.errors import BudgetError
from fasc.planning.frontier import Point, frontier, verdict
from fasc.planning.needs import needs_for
from fasc.planning.options import MethodConfig
from fasc.reporting.frontier import frontier_figure, frontier_table
from fasc.stages.plan import frontier as frontier_of_model
from fasc.statistics.collect import collect_moments
from tests.conftest import tiny_model


class _Forecast:
    def __init__(self, loss):
        self.predicted_loss = loss
        self.totals = {"multiply_add_fraction": 0.5}


def point(size=1_000_000, **losses):
    return Point(size, {way: _Forecast(loss) for way, loss in losses.items()})


@pytest.fixture(scope="module")
def points(tokens):
    model = tiny_model()
    statistics = collect_moments(model, tokens, needs_for(MethodConfig(bits=(4,)), None))
    return frontier_of_model(model, statistics, bits=(3, 4, 6, 8), shares=(0.95, 0.9, 0.8, 0.7), bits_group=16)


def test_both_lose_no_more_than_either_and_less_with_more_bytes(points):
    for one in points:
        losses = [loss for way in ("width", "bits") if (loss := one.loss(way)) is not None]
        assert one.loss("both") <= min(losses, default=float("inf")) * 1.001
        assert one.plans["both"].totals["bytes"] <= one.bytes
    joint = [one.loss("both") for one in points]
    assert joint == sorted(joint)


def test_it_is_printed_drawn_and_written(points, tmp_path):
    assert frontier_table(points).row_count == len(points)
    assert frontier_figure(points, tmp_path / "frontier.png").stat().st_size > 1000
    assert points[0].to_dict()["totals"]["both"]["bytes"] <= points[0].bytes


@pytest.mark.parametrize(
    "losses,buy",
    [
        ({"width": 0.2, "bits": 0.01, "both": 0.01}, "bits"),
        ({"width": 0.01, "bits": 0.02, "both": 0.01}, "width"),
        ({"width": 9.0, "bits": 3.0, "both": 0.9}, "both"),
        ({"both": 0.9}, "both"),
    ],
)
def test_the_better_buy_is_the_simplest_that_loses_no_more(losses, buy):
    assert point(**losses).better_buy == buy
    assert point(**losses).sentence()


def test_the_verdict_says_where_bits_end():
    ample, scarce = point(2_000_000, bits=0.1, both=0.1), point(1_000_000, bits=3.0, both=1.0)
    assert (
        verdict([ample, scarce])
        == "Bits alone are the better buy down to 2.0 MB; from 1.0 MB on, fewer weights in more bits each."
    )
    assert "at each of these sizes" in verdict([ample])
    assert "at each of these sizes" in verdict([scarce])


def test_a_frontier_without_bits_is_refused():
    with pytest.raises(BudgetError, match="no bits to choose from"):
        frontier(lambda options, budget: None, MethodConfig(), 100)
