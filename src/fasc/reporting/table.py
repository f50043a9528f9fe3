"""The comparison table, on the terminal and in Markdown."""

from collections.abc import Mapping, Sequence
from typing import Any

from rich import box
from rich.table import Table

from fasc.reporting.entries import DENSE, Entry, benchmarks_of

_FALLING = {"perplexity": "perplexity", "kl": "KL"}
"""Benchmarks of which less is better, as they are written."""


def base_name(benchmark: str) -> str:
    """``perplexity`` of ``perplexity@c4`` and of ``perplexity (2)``: each text and way of measuring has its own scores."""
    return benchmark.partition("@")[0].partition(" (")[0]


def _title(benchmark: str) -> str:
    name = base_name(benchmark)
    return f"{_FALLING[name]}{benchmark[len(name) :]} ↓" if name in _FALLING else f"{benchmark} ↑"


def format_score(score: Mapping[str, Any] | None) -> str:
    """Value and half-width or bounds of the interval, in the benchmark's own way."""
    if score is None:
        return "–"
    value, low, high = score["value"], score["low"], score["high"]
    if is_share(score):
        return f"{100 * value:.1f} %" + ("" if low is None or high is None else f" [{100 * low:.1f}, {100 * high:.1f}]")
    digits = 3 if base_name(score["benchmark"]) == "kl" else (2 if value < 100 else 1)
    return f"{value:,.{digits}f}" + ("" if low is None or high is None else f" [{low:,.{digits}f}, {high:,.{digits}f}]")


def is_share(score: Mapping[str, Any]) -> bool:
    """Whether a score is a proportion, shown in percent."""
    return str(score["metric"]).startswith(("accuracy", "top-1", "exact match", "F1"))


def comparison(entries: Sequence[Entry]) -> tuple[list[str], list[list[str]]]:
    """Header and rows: a row per model; scores, then what the model weighs."""
    benchmarks = benchmarks_of(entries)
    header = ["model", *map(_title, benchmarks)]
    header += ["rank fraction", "layers' parameters", "model's parameters", "weights"]
    selected = any(_selection_cell(entry.plan) != "–" for entry in entries)
    header += ["units of its own method"] if selected else []
    whole = next((entry.plan for entry in entries if entry.plan), None)
    rows = []
    for entry in entries:
        cells = [entry.name, *(format_score(entry.score(name)) for name in benchmarks)]
        cells += _cells_of(entry, whole)
        rows.append(cells + ([_selection_cell(entry.plan)] if selected else []))
    return header, rows


def _selection_cell(plan: Mapping[str, Any] | None) -> str:
    """How many units a selection left to the method that was asked for."""
    chosen = [edit for edit in (plan or {"edits": ()})["edits"] if edit.get("selection")]
    own = sum(edit["method"] == edit["selection"]["own"] for edit in chosen)
    return f"{own} of {len(chosen)}" if chosen else "–"


def _cells_of(entry: Entry, whole: Mapping[str, Any] | None) -> list[str]:
    """What a model weighs; ``whole`` is any plan of the dense model that the others were made from."""
    if entry.plan:
        return _weight_cells(entry.plan["totals"])
    if entry.rival is None:
        return _dense_cells(whole)
    return ["–", "–", f"{entry.rival.parameters / 1e6:,.1f} M", f"{entry.rival.bytes / 1e6:,.0f} MB"]


def _weight_cells(totals: Mapping[str, Any]) -> list[str]:
    return [
        "–" if totals["rank_fraction"] is None else f"{totals['rank_fraction']:.2f}",
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
        f"{plan['model']['parameters'] / 1e6:,.1f} M",
        f"{plan['totals']['dense_bytes'] / 1e6:,.0f} MB",
    ]


def compact_score(score: Mapping[str, Any] | None) -> str:
    """Value and the wider half of the interval, short enough for a terminal of 80 columns."""
    if score is None:
        return "–"
    scale, unit = (100, " %") if is_share(score) else (1, "")
    value = scale * score["value"]
    bounds = [score[key] for key in ("low", "high") if score[key] is not None]
    if not bounds:
        return f"{value:,.3g}{unit}"
    half = max(abs(scale * bound - value) for bound in bounds)
    if value >= 1e5:
        return f"{value:.1e} ±{half:.0e}"
    digits = 3 if base_name(score["benchmark"]) == "kl" else (1 if unit or value < 100 else 0)
    return f"{value:,.{digits}f} ±{half:,.{digits}f}{unit}"


def terminal_table(entries: Sequence[Entry]) -> Table:
    """The comparison for rich: a line per model, also on 80 columns."""
    benchmarks = benchmarks_of(entries)
    whole = next((entry.plan for entry in entries if entry.plan), None)
    table = Table(title="what was kept and what was lost (± 95 % interval)", title_justify="left", box=box.SIMPLE_HEAD)
    table.add_column("model", no_wrap=True)
    timed = any(entry.speeds for entry in entries)
    for title in [*map(_title, benchmarks), "parameters", "weights", *(["decoding"] if timed else [])]:
        table.add_column(title, justify="right", no_wrap=True)
    for entry in entries:
        *_, parameters, weights = _cells_of(entry, whole)
        scores = [compact_score(entry.score(name)) for name in benchmarks]
        cells = [entry.name, *scores, parameters.partition(" (")[0], weights, *([_speed(entry)] if timed else [])]
        table.add_row(*cells, style="dim" if entry.name == DENSE else None)
    return table


def _speed(entry: Entry) -> str:
    ratio = entry.speed("decode")
    return "1 ×" if entry.name == DENSE else "–" if ratio is None else f"{ratio[0]:.2f} ×"


def samples_table(entries: Sequence[Entry]) -> Table | None:
    """What each model wrote after the same prompts, for the terminal."""
    writing = [entry for entry in entries if entry.samples]
    if not writing:
        return None
    table = Table(title="what each model writes", title_justify="left", box=box.SIMPLE_HEAD, show_lines=False)
    table.add_column("prompt and model", no_wrap=True)
    table.add_column("continues", overflow="fold")
    for index, sample in enumerate(writing[0].samples):
        table.add_row(f"{sample['prompt']} …", "", style="bold", end_section=False)
        for entry in writing:
            last = entry is writing[-1]
            table.add_row(f"  {entry.name}", " ".join(entry.samples[index]["continuation"].split()), end_section=last)
    return table


def markdown_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table, numbers to the right; what a cell holds is text, not Markdown's bars or HTML."""
    lines = ["| " + " | ".join(map(_cell, header)) + " |", "|---|" + "--:|" * (len(header) - 1)]
    return "\n".join(lines + ["| " + " | ".join(map(_cell, row)) + " |" for row in rows])


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|").replace("<", "&lt;")
