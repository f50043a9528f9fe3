"""A rank plan on the terminal."""

from rich.console import Console
from rich.table import Table

from fasc.budget.plan import RankPlan


def print_plan(plan: RankPlan) -> None:
    """Every unit with its rank, layout and parameters, then the totals."""
    table = Table(title=f"rank plan for {plan.method}", title_justify="left")
    for title in ("unit", "shape", "rank", "stored as", "parameters", "of dense"):
        table.add_column(title, justify="left" if title in ("unit", "stored as") else "right", overflow="fold")
    for unit in plan.units:
        share = f"{unit.parameters / unit.dense_parameters:.1%}"
        shape = f"{unit.d_out}×{unit.d_in}"
        table.add_row(unit.unit, shape, str(unit.rank), unit.layout, f"{unit.parameters:,}", share)
    Console().print(table)
    print_totals(plan)


def print_totals(plan: RankPlan) -> None:
    """The three fractions, the bytes and, if known, the forecast."""
    totals = plan.totals
    table = Table(show_header=False, box=None)
    table.add_row("rank fraction", f"{totals['rank_fraction']:.3f}")
    table.add_row("parameters of the compressed layers", f"{totals['param_fraction']:.1%} of dense")
    table.add_row("parameters of the model", f"{totals['parameters']:,} ({totals['model_fraction']:.1%} of dense)")
    table.add_row("weights", f"{(totals['bytes'] or 0) / 1e6:,.1f} MB (dense: {(totals['dense_bytes'] or 0) / 1e6:,.1f} MB)")
    if plan.predicted_loss is not None:
        table.add_row("forecast, Σ ½J", f"{plan.predicted_loss:.4f} nats/token")
    Console().print(table)
