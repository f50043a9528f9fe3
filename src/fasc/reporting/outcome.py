"""What a compression made, in sentences: what, where, how large, how good by forecast, what to do next."""

from math import exp
from pathlib import Path

from fasc.planning.plan import Plan
from fasc.planning.table import totals_table
from fasc.reporting.console import print_results


def print_outcome(plan: Plan, folder: Path, source: str, *, merged: bool) -> None:
    """The totals, then a few sentences a person can act on."""
    print_results(totals_table(plan), "", *outcome(plan, folder, source, merged=merged))


def outcome(plan: Plan, folder: Path, source: str, *, merged: bool) -> list[str]:
    """The sentences."""
    totals = plan.totals
    size = (totals["dense_bytes"] if merged else totals["bytes"]) or 0
    share = size / (totals["dense_bytes"] or 1)
    lines = [f"`{folder}` holds {source} with {size / 1e6:,.0f} MB of weights, {share:.0%} of the dense model's."]
    if plan.predicted_loss is not None:
        lines.append(
            f"Forecast: KL divergence {plan.predicted_loss:.3f} nats per token, perplexity "
            f"× {exp(min(plan.predicted_loss, 700)):.2f}. "
            "Real text can cost more: measure it."
        )
    if merged or not plan.structural:
        lines.append("It is an ordinary checkpoint: it loads in any program that reads this architecture.")
    else:
        lines.append(
            "It loads in transformers where fasc is installed. `fasc compress --merge` writes a checkpoint that needs no fasc."
        )
    lines.append(f"Next: `fasc evaluate {folder}` measures what it kept, `fasc bench {folder}` how fast it is.")
    if not merged and plan.structural:
        lines.append(f"      `fasc recover {folder} --out {folder}-recovered` trains it towards the dense model.")
    return lines
