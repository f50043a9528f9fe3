"""A rank plan on the terminal."""

from collections import Counter
from math import exp

from rich.table import Table

from fasc.planning.plan import RankPlan
from fasc.statistics.accumulators import FLUSH_TOKENS
from fasc.reporting.console import print_results


def print_plan(plan: RankPlan) -> None:
    """Every unit with its rank, layout, parameters and predicted loss, then the totals."""
    table = Table(title=f"{plan.allocation} rank plan for {plan.method}", title_justify="left")
    gated = any(unit.method is not None for unit in plan.units)
    columns = ["unit", "shape", "rank", "stored as", *(["method"] if gated else []), "parameters", "of dense", "½J"]
    for title in columns:
        left = title in ("unit", "stored as", "method")
        table.add_column(title, justify="left" if left else "right", overflow="fold")
    for unit in plan.units:
        share = f"{unit.parameters / unit.dense_parameters:.1%}"
        loss = "–" if unit.predicted_loss is None else f"{unit.predicted_loss:.5f}"
        chosen = [unit.method or plan.method] if gated else []
        shape = f"{unit.d_out}×{unit.d_in}"
        if unit.narrowed is not None:
            shape += f" → {unit.narrowed[1]}×{unit.narrowed[0]}"
        table.add_row(
            unit.unit,
            shape,
            str(unit.rank) if unit.kept is None else "–",
            unit.layout,
            *chosen,
            f"{unit.parameters:,}",
            share,
            loss,
        )
    print_results(table)
    if plan.cuts:
        print_results(_cuts(plan))
    print_totals(plan)


def _cuts(plan: RankPlan) -> Table:
    table = Table(title="channels of MLPs (the units above are what is left)", title_justify="left")
    for title in ("read by", "channels", "½J"):
        table.add_column(title, justify="left" if title == "read by" else "right", overflow="fold")
    for cut in plan.cuts:
        loss = "–" if cut.predicted_loss is None else f"{cut.predicted_loss:.5f}"
        table.add_row(cut.reader, f"{cut.channels} → {cut.kept}", loss)
    return table


_STAGES = {
    "measure": ("model", "moments", "batch"),
    f"measure {FLUSH_TOKENS:,} tokens": ("model", "moments", "totals", "batch"),
    "compress": ("model", "moments", "decomposition", "channels", "compressed"),
}
"""Parts of the memory forecast that are needed at the same time."""


def print_totals(plan: RankPlan) -> None:
    """The three fractions, the bytes and, if known, the forecasts of loss and memory."""
    totals = plan.totals
    table = Table(show_header=False, box=None)
    if totals["rank_fraction"] is not None:
        table.add_row("rank fraction", f"{totals['rank_fraction']:.3f}")
    table.add_row("parameters of the compressed layers", f"{totals['param_fraction']:.1%} of dense")
    table.add_row("parameters of the model", f"{totals['parameters']:,} ({totals['model_fraction']:.1%} of dense)")
    size, dense = (totals["bytes"] or 0) / 1e6, (totals["dense_bytes"] or 0) / 1e6
    table.add_row("weights, on disk and in memory", f"{size:,.1f} MB (dense: {dense:,.1f} MB)")
    stored = Counter(unit.layout for unit in plan.units)
    table.add_row("stored as", ", ".join(f"{count} {layout}" for layout, count in stored.most_common()))
    if plan.cuts:
        kept, of = sum(cut.kept for cut in plan.cuts), sum(cut.channels for cut in plan.cuts)
        table.add_row("channels", f"{kept / of:.1%} in the {len(plan.cuts)} MLPs that lose some")
    if plan.predicted_loss is not None:
        table.add_row("forecast, Σ ½J", f"{plan.predicted_loss:.4f} nats/token: {_perplexity(plan)}")
    memory = plan.forecast_memory or {}
    for what, names in _STAGES.items():
        parts = {name: memory[name] / 1e6 for name in names if name in memory}
        listed = ", ".join(f"{name} {size:,.0f}" for name, size in parts.items() if size)
        if parts:
            table.add_row(f"memory to {what}", f"{sum(parts.values()):,.0f} MB ({listed}) beside the program")
    print_results(table)


def _perplexity(plan: RankPlan) -> str:
    """``exp(Σ½J)``, and what it makes of the dense perplexity where that is known."""
    ratio = exp(min(plan.predicted_loss or 0.0, 700.0))
    if plan.dense_nll is None:
        return f"perplexity × {ratio:.3f}"
    return f"perplexity of the calibration text {exp(plan.dense_nll):.2f} → {exp(plan.dense_nll) * ratio:.2f} (× {ratio:.3f})"
