"""Tables and figures say what their numbers are."""

from io import StringIO

import pytest
from rich.console import Console

from fasc.reporting.entries import Entry
from fasc.reporting.table import compact_score, comparison, format_score, markdown_table, terminal_table


def score(benchmark, value, metric="mean"):
    return {"benchmark": benchmark, "metric": metric, "value": value, "low": value / 2, "high": value * 2, "n": 9}


def test_each_corpus_has_its_own_column_and_the_arrow_of_its_benchmark():
    scores = [score("perplexity@c4", 12.0), score("kl@c4", 0.5), score("kl", 0.25), score("lama", 0.5, "accuracy")]
    header, rows = comparison([Entry("dense", scores, None)])
    assert header[1:5] == ["perplexity@c4 ↓", "KL@c4 ↓", "KL ↓", "lama ↑"]
    assert rows[0][1:3] == ["12.00 [6.00, 24.00]", "0.500 [0.250, 1.000]"]


@pytest.mark.parametrize("corpus", ["", "@c4", "@folder/file.txt"])
def test_the_corpus_changes_no_digit(corpus):
    assert format_score(score(f"kl{corpus}", 0.1234)) == "0.123 [0.062, 0.247]"
    assert compact_score(score(f"kl{corpus}", 0.1234)) == "0.123 ±0.123"


TOTALS = {
    "rank_fraction": 0.5,
    "param_fraction": 0.6,
    "parameters": 10_000_000,
    "model_fraction": 0.7,
    "bytes": 40_000_000,
    "dense_bytes": 60_000_000,
}


def plan(*edits):
    return {"totals": TOTALS, "model": {"parameters": 15_000_000}, "edits": list(edits)}


def test_a_selection_says_how_many_units_got_the_method():
    chosen = {"by": "rho", "score": 0.1, "own": "fasc"}
    own, other = ({"edit": "factor", "method": name, "selection": chosen} for name in ("fasc", "svd"))
    selected = plan({"edit": "narrow"}, own, other, other)
    entries = [Entry("selected", [], selected), Entry("plain", [], plan({"edit": "factor", "method": "fasc"}))]
    header, rows = comparison(entries)
    assert header[-1] == "units of its own method"
    assert [row[-1] for row in rows] == ["1 of 3", "–"]
    assert "units of its own method" not in comparison(entries[1:])[0]


def test_every_row_says_what_its_model_weighs_and_the_dense_one_takes_it_from_a_plan():
    _, rows = comparison([Entry("dense", [], None), Entry("fasc", [], plan())])
    assert rows[0][1:] == ["1.00", "100.0%", "15.0 M", "60 MB"]
    assert rows[1][1:] == ["0.50", "60.0%", "10.0 M (70.0%)", "40 MB"]
    pruned = plan() | {"totals": TOTALS | {"rank_fraction": None}}
    assert comparison([Entry("wanda", [], pruned)])[1][0][1] == "–", "pruning has no rank"


def test_the_terminal_table_fits_into_eighty_columns():
    scores = [score("perplexity", 12.0), score("kl", 0.5), score("facts", 0.5, "accuracy")]
    console = Console(width=80, file=StringIO())
    console.print(terminal_table([Entry("dense", scores, None), Entry("fasc", scores, plan())]))
    lines = console.file.getvalue().splitlines()
    assert max(map(len, lines)) <= 80
    row = next(line for line in lines if "fasc" in line)
    assert "50.0 ±50.0 %" in row and "10.0 M" in row and "40 MB" in row


def test_markdown_has_a_cell_for_every_title():
    text = markdown_table(["a", "b"], [["1", "2"], ["3", "4"]])
    assert text.splitlines() == ["| a | b |", "|---|--:|", "| 1 | 2 |", "| 3 | 4 |"]
