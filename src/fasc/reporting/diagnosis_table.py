"""A diagnosis on the terminal."""

from collections.abc import Iterator, Mapping, Sequence
from statistics import median
from typing import Any

from rich.table import Table

from fasc.diagnosis.diagnose import Diagnosis
from fasc.reporting.console import print_results


def print_diagnosis(diagnosis: Diagnosis) -> None:
    """A row per group: ρ, its interval and noise floor, spectra, and per method the rank for 95 % of the energy and ½J."""
    methods = list(diagnosis.rows[0]["methods"])
    fraction = diagnosis.meta["rank_fraction"]
    table = Table(title=f"½J in nats per token and angles at rank fraction {fraction:g}", title_justify="left")
    columns = [
        "group",
        "d_in",
        "ρ [95 %]",
        "ρ₀ (noise)",
        "debiased",
        "‖Σ_gg‖",
        "rank x",
        "stable x",
        "rank g",
        "stable g",
        "angle",
    ]
    for title in [*columns, *(f"{name}: 95 % at" for name in methods), *(f"{name}: ½J" for name in methods), "excluded"]:
        table.add_column(title, justify="left" if title in ("group", "excluded") else "right", overflow="fold")
    for row in diagnosis.rows:
        x, g = row["input"], row.get("gradient")
        cells = [row["group"], str(row["d_in"]), _interval(row), _number(row["rho_floor"], 3), _number(row["rho_debiased"], 3)]
        cells += ["–" if row["gradient_norm"] is None else f"{row['gradient_norm']:.1e}"]
        cells += [f"{x['effective_rank']:.0f}", f"{x['stable_rank']:.1f}"]
        cells += ["–", "–"] if g is None else [f"{g['effective_rank']:.0f}", f"{g['stable_rank']:.1f}"]
        cells += ["–" if row["angle"] is None else f"{row['angle']:.0f}°"]
        found = [row["methods"][name] for name in methods]
        cells += [f"{values['rank_95']}/{values['directions']}" for values in found]
        cells += [_number(values.get("predicted_loss"), 5) for values in found]
        table.add_row(*cells, row["excluded"] or "")
    experts = diagnosis.experts
    print_results(table, *([_experts(experts, methods)] if experts else []), *_summary(diagnosis, methods))


_MANY = 64
"""Experts that have a row each, at most; beyond it each block has one."""


def _experts(rows: Sequence[Mapping[str, Any]], methods: Sequence[str]) -> Table:
    """What each expert hears, its ρ and ½J, and what a plan makes of it; those of a block in one row where they are many."""
    blocks = [[row] for row in rows] if len(rows) <= _MANY else _by_block(rows)
    kinds = list(dict.fromkeys(kind for row in rows for kind in row["rho"]))
    each = "" if len(rows) <= _MANY else ": least – greatest of each block"
    table = Table(title=f"{len(rows):,} experts, ½J in nats per token of text{each}", title_justify="left")
    named = [method for method in methods if any(method in row["predicted_loss"] for row in rows)]
    planned = ["kept by the plan", "½J of the plan", "left by the plan"] if any("left" in row for row in rows) else []
    titles = [
        "block",
        "expert",
        "tokens",
        "share",
        *(f"ρ {kind}" for kind in kinds),
        *(f"{name}: ½J" for name in named),
        *planned,
    ]
    for title in titles:
        table.add_column(title, justify="left" if title == "left by the plan" else "right", overflow="fold")
    for ones in blocks:
        cells = [str(ones[0]["block"]), _span([one["expert"] for one in ones], "d"), _span([one["tokens"] for one in ones], ",d")]
        cells += [_span([one["share"] for one in ones], ".1%")]
        cells += [_span([one["rho"].get(kind) for one in ones], ".3f") for kind in kinds]
        cells += [_span([one["predicted_loss"].get(name) for one in ones], ".2e") for name in named]
        if planned:
            cells += [_span([one.get("kept") for one in ones], ".1%"), _span([one.get("plan_loss") for one in ones], ".2e")]
            cells += [_left(ones)]
        table.add_row(*cells)
    return table


def _by_block(rows: Sequence[Mapping[str, Any]]) -> list[list[Mapping[str, Any]]]:
    blocks: dict[int | None, list[Mapping[str, Any]]] = {}
    for row in rows:
        blocks.setdefault(row["block"], []).append(row)
    return list(blocks.values())


def _span(values: Sequence[float | None], form: str) -> str:
    """The one value, or the least and the greatest of several."""
    known = [value for value in values if value is not None]
    if not known:
        return "–"
    low, high = format(min(known), form), format(max(known), form)
    return low if low == high else f"{low} – {high}"


def _left(ones: Sequence[Mapping[str, Any]]) -> str:
    """In words; of several, how many are dropped and changed."""
    if len(ones) == 1:
        return str(ones[0].get("left", "–"))
    dropped = sum(bool(one.get("dropped")) for one in ones)
    dense = sum(one.get("left") == "all" for one in ones)
    return f"{dropped} their mean, {len(ones) - dropped - dense} smaller, {dense} all"


def _summary(diagnosis: Diagnosis, methods: list[str]) -> Iterator[str]:
    rows = diagnosis.rows
    scored = [row for row in rows if row["rho"] is not None and row["excluded"] is None]
    if scored:
        rho, floor = median(row["rho"] for row in scored), median(row["rho_floor"] for row in scored)
        above = sum(row["rho"] > 0.3 for row in scored)
        yield f"{len(scored)} groups, {len(rows) - len(scored)} excluded: median ρ {rho:.3f}, of noise alone {floor:.3f}"
        yield f"{above} of them have ρ > 0.3; {sum(row['rho_debiased'] > 0.3 for row in scored)} after debiasing"
    parts = [row["rho_by_tokens"] for row in scored if row["rho_by_tokens"]]
    if parts and len({tuple(part) for part in parts}) == 1:
        by_tokens = [f"{median(part[n] for part in parts):.3f} on {int(n):,}" for n in parts[0]]
        yield f"median ρ by the tokens it is measured on: {', '.join(by_tokens)}; noise alone would halve with four times as many"
    yield from _heaviest(diagnosis.experts, methods[0])
    for name in methods:
        losses = [row["predicted_loss"].get(name) for row in rows]
        if all(loss is not None for loss in losses):
            yield f"forecast of {name} on all groups, Σ ½J: {sum(losses):.4f} nats/token"


def _heaviest(experts: Sequence[Mapping[str, Any]], method: str) -> Iterator[str]:
    """The experts that compression would hurt most and least, by ½J."""
    known = sorted((row for row in experts if method in row["predicted_loss"]), key=lambda row: row["predicted_loss"][method])
    if len(known) > 1:
        low, high = known[0], known[-1]
        words = [f"block {one['block']} expert {one['expert']} ({one['predicted_loss'][method]:.2e})" for one in (high, low)]
        yield f"by ½J of {method}, the heaviest expert is {words[0]} and the lightest {words[1]}"


def _interval(row: Mapping[str, Any]) -> str:
    if row["rho"] is None:
        return "–"
    return f"{row['rho']:.3f}" + ("" if row["rho_low"] is None else f" [{row['rho_low']:.3f}, {row['rho_high']:.3f}]")


def _number(value: float | None, digits: int) -> str:
    return "–" if value is None else f"{value:.{digits}f}"
