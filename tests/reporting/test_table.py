"""Tables and figures say what their numbers are."""

import pytest

from fasc.reporting.entries import Entry
from fasc.reporting.table import compact_score, comparison, format_score


def score(benchmark, value, metric="mean"):
    return {"benchmark": benchmark, "metric": metric, "value": value, "low": value / 2, "high": value * 2, "n": 9}


def test_each_corpus_has_its_own_column_and_the_arrow_of_its_benchmark():
    found = [score("perplexity@c4", 12.0), score("kl@c4", 0.5), score("kl", 0.25), score("lama", 0.5, "accuracy")]
    header, rows = comparison([Entry("dense", found, None)])
    assert header[1:5] == ["perplexity@c4 ↓", "KL@c4 ↓", "KL ↓", "lama ↑"]
    assert rows[0][1:3] == ["12.00 [6.00, 24.00]", "0.500 [0.250, 1.000]"]


@pytest.mark.parametrize("corpus", ["", "@c4", "@folder/file.txt"])
def test_the_corpus_changes_no_digit(corpus):
    assert format_score(score(f"kl{corpus}", 0.1234)) == "0.123 [0.062, 0.247]"
    assert compact_score(score(f"kl{corpus}", 0.1234)) == "0.123 ±0.123"


def test_a_gate_says_how_many_units_got_the_method():
    totals = {
        "rank_fraction": 0.5,
        "param_fraction": 0.6,
        "parameters": 10,
        "model_fraction": 0.7,
        "bytes": 40,
        "dense_bytes": 60,
    }
    plan = {"method": "fasc", "totals": totals, "model": {"parameters": 15}}
    gated = plan | {"groups": [{"method": "fasc"}, {"method": "svd"}, {"method": "svd"}]}
    plain = plan | {"groups": [{"method": None}]}
    entries = [Entry("gated", [], gated), Entry("plain", [], plain)]
    header, rows = comparison(entries)
    assert header[-1] == "units of its own method"
    assert [row[-1] for row in rows] == ["1 of 3", "–"]
    assert "units of its own method" not in comparison(entries[1:])[0]
