"""Advice is given on what is slower, and never advice that was followed already."""

from dataclasses import replace

import pytest

from fasc.evaluation.comparison import Comparison
from fasc.evaluation.remarks import remarks
from fasc.planning.options import BudgetConfig

SLOW = [Comparison(what, "tokens/s", 100.0, 90.0, 0.9, 0.9, 0.9) for what in ("decode, batch 1", "decode, batch 4")]


@pytest.mark.parametrize(
    "asked", [{}, {"overhead": 65536}, {"channel_multiple": 512}, {"overhead": 65536, "channel_multiple": 256}]
)
def test_only_what_the_checkpoint_did_not_ask_for_is_advised(asked):
    one_token, many = remarks(SLOW, 1.25, 75, {"cpu"}, BudgetConfig(param_fraction=0.8, **asked))
    assert ("--overhead 65536" in one_token) == ("overhead" not in asked)
    assert ("--channel-multiple 256" in many) == ("channel_multiple" not in asked)
    assert [text.split(" is not faster (0.90 ×)")[0] for text in (one_token, many)] == ["decode, batch 1", "decode, batch 4"]


def test_what_is_faster_needs_no_remark():
    assert remarks([replace(one, ratio=1.1) for one in SLOW], 1.25, 75, {"cpu"}) == []


def test_more_products_are_blamed_only_where_there_are_more():
    assert "75 more matrix products" in remarks(SLOW, 1.25, 75, {"cpu"})[0]
    assert "kernel launches" in remarks(SLOW, 1.25, 75, {"cuda"})[0]
    narrow = " ".join(remarks(SLOW, 1.25, 0, {"cpu"}))
    assert "more matrix products" not in narrow
    assert "--overhead" not in narrow
