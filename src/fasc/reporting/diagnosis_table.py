"""A diagnosis on the terminal."""

from collections.abc import Iterator, Mapping
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
    print_results(table, *_summary(diagnosis, methods))


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
    for name in methods:
        losses = [row["predicted_loss"].get(name) for row in rows]
        if all(loss is not None for loss in losses):
            yield f"forecast of {name} on all groups, Σ ½J: {sum(losses):.4f} nats/token"


def _interval(row: Mapping[str, Any]) -> str:
    if row["rho"] is None:
        return "–"
    return f"{row['rho']:.3f}" + ("" if row["rho_low"] is None else f" [{row['rho_low']:.3f}, {row['rho_high']:.3f}]")


def _number(value: float | None, digits: int) -> str:
    return "–" if value is None else f"{value:.{digits}f}"
