"""A validation and a comparison as rows of text."""

from collections.abc import Mapping
from typing import Any

from fasc.evaluation.compared import Compared
from fasc.reporting.compared import GROUP_HEADER, HEADER, cells, group_cells, score_rows

Rows = tuple[list[str], list[list[str]]]
"""Titles and rows."""


def summary_rows(validation: Mapping[str, Any]) -> Rows:
    """How well each forecast predicted the measured KL divergence."""
    head = ["forecast", "of", "rank fraction", "n", "Pearson", "Spearman", "median measured ÷ forecast"]
    rows = []
    for row in validation.get("summary", ()):
        fraction = "all" if row["rank_fraction"] is None else f"{row['rank_fraction']:g}"
        numbers = [_number(row[key], digits) for key, digits in (("pearson", 3), ("spearman", 3), ("median_ratio", 2))]
        rows.append([row["forecast"], row["method"], fraction, str(row["n"]), *numbers])
    return head, rows


def plan_rows(validation: Mapping[str, Any]) -> Rows:
    """What plans of the whole model were forecast to lose, and lost."""
    head = ["method", "budget", "parameters", "Σ ½J", "on held-out text", "measured KL", "measured ÷ Σ ½J"]
    rows = []
    for row in validation.get("plans", ()):
        kl = f"{row['kl']:.4f} ± {1.96 * row['kl_error']:.4f}"
        numbers = [_number(row["half_j"], 4), _number(row["half_j_held_out"], 4), kl, _number(row["ratio"], 2)]
        rows.append([row["method"], row["budget"], f"{row['param_fraction']:.1%}", *numbers])
    return head, rows


def compared_rows(result: Compared) -> list[tuple[str, Rows]]:
    """What each model kept, item by item: a table for each benchmark, and one for each that has groups."""
    found: list[tuple[str, Rows]] = []
    for benchmark in dict.fromkeys(one.benchmark for one in result.pairs):
        pairs = [one for one in result.pairs if one.benchmark == benchmark]
        found.append((f"{benchmark}, n = {pairs[0].n:,}", (list(HEADER), [cells(one) for one in pairs])))
        groups = [group_cells(row) for row in result.groups if row["benchmark"] == benchmark]
        if groups:
            found.append((f"{benchmark} by group", (list(GROUP_HEADER), groups)))
    scores = score_rows(result)
    return [*found, ("scores", scores)] if scores[1] else found


def _number(value: float | None, digits: int) -> str:
    return "–" if value is None else f"{value:.{digits}f}"
