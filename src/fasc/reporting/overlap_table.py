"""Overlaps of subspaces on the terminal."""

from collections.abc import Mapping, Sequence
from typing import Any

from rich.table import Table

from fasc.reporting.console import print_results

Rows = Sequence[Mapping[str, Any]]


def print_overlaps(summary: Rows, method: str) -> None:
    """A row per pair and rank fraction, with what chance gives."""
    table = Table(
        title=f"overlap of the subspaces that {method} reads (median over groups, quartiles in brackets)", title_justify="left"
    )
    for title in ("a", "b", "rank fraction", "groups", "overlap", "chance", "above chance"):
        table.add_column(title, justify="left" if title in ("a", "b") else "right", overflow="fold")
    for row in summary:
        excess = "–" if row["above_chance"] is None else f"{row['above_chance']:.3f}"
        shown = f"{row['overlap']:.3f} [{row['low']:.3f}, {row['high']:.3f}]"
        cells = [row["a"], row["b"], f"{row['rank_fraction']:g}", str(row["groups"]), shown, f"{row['chance']:.3f}", excess]
        table.add_row(*cells)
    print_results(table)


def print_curvature(rows: Rows) -> None:
    """A row per group: the Hessian's leading eigenvectors against those of the Fisher moments."""
    table = Table(title="overlap with the leading eigenvectors of the Hessian at the group's input", title_justify="left")
    columns = ("group", "ρ", "k", "Σ_gg", "fasc, in white inputs", "svd", "chance", "λ₁ / λ_k")
    for title in columns:
        table.add_column(title, justify="left" if title == "group" else "right", overflow="fold")
    for row in rows:
        rho = "–" if row["rho"] is None else f"{row['rho']:.3f}"
        scores = [f"{row[key]:.3f}" for key in ("fisher", "fasc_white", "svd", "chance")]
        table.add_row(row["group"], rho, str(row["k"]), *scores, f"{row['decay']:.1f}")
    print_results(table)
