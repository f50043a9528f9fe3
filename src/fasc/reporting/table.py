"""The comparison table, on the terminal and in Markdown."""

from collections.abc import Mapping, Sequence
from typing import Any

from rich.table import Table

from fasc.reporting.entries import DENSE, Entry, benchmarks_of

_TITLES = {"perplexity": "perplexity ↓", "kl": "KL to dense ↓"}


def format_score(score: Mapping[str, Any] | None) -> str:
    """Value and half-width or bounds of the interval, in the benchmark's own way."""
    if score is None:
        return "–"
    value, low, high = score["value"], score["low"], score["high"]
    if score["metric"].startswith("accuracy"):
        return f"{100 * value:.1f} % [{100 * low:.1f}, {100 * high:.1f}]"
    digits = 3 if score["benchmark"] == "kl" else (2 if value < 100 else 1)
    return f"{value:,.{digits}f} [{low:,.{digits}f}, {high:,.{digits}f}]"


def comparison(entries: Sequence[Entry]) -> tuple[list[str], list[list[str]]]:
    """Header and rows: a row per model; scores, then what the model weighs."""
    benchmarks = benchmarks_of(entries)
    header = ["model", *(_TITLES.get(name, f"{name} ↑") for name in benchmarks)]
    header += ["rank fraction", "layers' parameters", "model's parameters", "weights"]
    whole = next((entry.plan for entry in entries if entry.plan), None)
    rows = []
    for entry in entries:
        cells = [entry.name, *(format_score(entry.score(name)) for name in benchmarks)]
        rows.append(cells + (_weight_cells(entry.plan["totals"]) if entry.plan else _dense_cells(whole)))
    return header, rows


def _weight_cells(totals: Mapping[str, Any]) -> list[str]:
    return [
        f"{totals['rank_fraction']:.2f}",
        f"{totals['param_fraction']:.1%}",
        f"{totals['parameters'] / 1e6:,.1f} M ({totals['model_fraction']:.1%})",
        f"{totals['bytes'] / 1e6:,.0f} MB",
    ]


def _dense_cells(plan: Mapping[str, Any] | None) -> list[str]:
    if plan is None:
        return ["1.00", "100.0%", "–", "–"]
    return [
        "1.00",
        "100.0%",
        f"{plan['model_parameters'] / 1e6:,.1f} M",
        f"{plan['totals']['dense_bytes'] / 1e6:,.0f} MB",
    ]


def terminal_table(entries: Sequence[Entry]) -> Table:
    """The comparison for rich."""
    header, rows = comparison(entries)
    table = Table(title="what was kept and what was lost (95 % intervals)", title_justify="left")
    for title in header:
        table.add_column(title, justify="left" if title == "model" else "right")
    for row in rows:
        table.add_row(*row, style="dim" if row[0] == DENSE else None)
    return table


def markdown_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table, numbers to the right."""
    lines = ["| " + " | ".join(header) + " |", "|---|" + "--:|" * (len(header) - 1)]
    return "\n".join(lines + ["| " + " | ".join(row) + " |" for row in rows])
