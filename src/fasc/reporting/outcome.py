"""What a compression made, in sentences: what, where, how large, how good by forecast, what to do next."""

from math import exp
from pathlib import Path

from fasc.planning.one_width import asks_for_one_width
from fasc.planning.plan import Plan
from fasc.planning.table import totals_table
from fasc.reporting.console import print_results
from fasc.serving.graphs import GRAPHS
from fasc.serving.presets import NOT_IN_VLLM

_IN_DECI = frozenset({"narrow", "heads", "skip"})
"""Edits after which llama.cpp's graph of blocks of different shapes holds the model."""


def print_outcome(plan: Plan, folder: Path, source: str, *, merged: bool, model_type: str = "") -> None:
    """The totals, then a few sentences a person can act on."""
    print_results(totals_table(plan), "", *outcome(plan, folder, source, merged=merged, model_type=model_type))


def outcome(plan: Plan, folder: Path, source: str, *, merged: bool, model_type: str = "") -> list[str]:
    """The sentences.

    Args:
        plan: as it was carried out.
        folder: of the checkpoint.
        source: the dense model, as it was named.
        merged: whether the checkpoint is an ordinary one.
        model_type: transformers' own, by which the engines are known that can run it.
    """
    totals = plan.totals
    size = (totals["dense_bytes"] if merged and not asks_for_one_width(plan.options) else totals["bytes"]) or 0
    share = size / (totals["dense_bytes"] or 1)
    lines = [f"`{folder}` holds {source} with {size / 1e6:,.0f} MB of weights, {share:.0%} of the dense model's."]
    if plan.predicted_loss is not None:
        lines.append(
            f"Forecast: KL divergence {plan.predicted_loss:.3f} nats per token, perplexity "
            f"× {exp(min(plan.predicted_loss, 700)):.2f}. "
            "Real text can cost more: measure it."
        )
        if plan.caution is not None:
            lines.append(f"The forecast is not to be trusted: {plan.caution}.")
    if merged or not plan.structural:
        lines.append("It is an ordinary checkpoint: it loads in any program that reads this architecture.")
    else:
        here = "transformers" if any(edit.edit in NOT_IN_VLLM for edit in plan.edits) else "transformers and vLLM"
        lines.append(f"It loads in {here} where fasc is installed; {_elsewhere(plan, folder, model_type)}")
    lines.append(f"Next: `fasc evaluate {folder}` measures what it kept, `fasc bench {folder}` how fast it is.")
    if not merged and plan.structural:
        lines.append(f"      `fasc recover {folder} --out {folder}-recovered` trains it towards the dense model.")
    return lines


def _elsewhere(plan: Plan, folder: Path, model_type: str) -> str:
    """What to do for programs that do not know fasc."""
    graph = GRAPHS.get(model_type)
    narrow = all(edit.edit in _IN_DECI for edit in plan.edits)
    if graph is not None and graph.narrower is not None:
        way = (
            f"for llama.cpp: `fasc export {folder} --format gguf`."
            if narrow
            else "for llama.cpp: compress with `--for llama.cpp`."
        )
        return way + " `--for plain` needs no fasc."
    return "for other programs: compress with `--for plain`, or `--merge`."
