"""A plan as tables: what becomes of every unit, and the totals."""

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from math import exp
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from fasc.edits import Edit
from fasc.edits.attention import Heads, Values
from fasc.edits.factor import Factor
from fasc.edits.narrow import Narrow
from fasc.edits.quantise import Quantise
from fasc.edits.skip import Skip
from fasc.edits.vocabulary import VocabularyBits
from fasc.layouts import LAYOUTS
from fasc.model.groups import group_name
from fasc.model.untouched import in_words
from fasc.planning.experts import ExpertPlan, by_block, expert_touched, experts_in
from fasc.planning.plan import Plan
from fasc.statistics.accumulators import FLUSH_TOKENS

_STAGES = {
    "measure": ("model", "moments", "batch"),
    f"measure {FLUSH_TOKENS:,} tokens": ("model", "moments", "totals", "batch"),
    "compress": ("model", "moments", "decomposition", "channels", "compressed"),
}
"""Parts of the memory forecast that are needed at the same time."""


def edits_table(plan: Plan) -> Table:
    """Every edit with what it leaves; those of experts stand in :func:`experts_table`."""
    table = Table(title=f"{plan.allocation} plan for {plan.method}", title_justify="left", box=box.SIMPLE_HEAD)
    selected = any(isinstance(edit, Factor) and edit.selection for edit in plan.edits)
    columns = ["edit", "layers", "shape", "what is left", *(["method"] if selected else []), "parameters saved", "½J"]
    for title in columns:
        table.add_column(title, justify="left" if title in ("edit", "layers", "method") else "right", overflow="fold")
    for edit in plan.edits:
        if expert_touched(edit) is not None:
            continue
        shape, left = _shapes(edit)
        loss = "–" if edit.predicted_loss is None else f"{edit.predicted_loss:.5f}"
        chosen = [edit.method if isinstance(edit, Factor) else "–"] if selected else []
        table.add_row(edit.edit, _layers(edit), shape, left, *chosen, f"{edit.saved:,}", loss)
    return table


_MANY = 64
"""Experts that have a row each, at most; beyond it each block has one."""


def experts_table(plan: Plan) -> Table | None:
    """What is left of every expert, or of those of every block where they are many; ``None`` where a plan touches none."""
    experts = experts_in(plan)
    if all(one.is_dense for one in experts.values()):
        return None
    if len(experts) > _MANY:
        return _blocks_table(experts)
    table = Table(title="experts", title_justify="left", box=box.SIMPLE_HEAD)
    for title in ("block", "expert", "what is left", "parameters kept", "½J"):
        table.add_column(title, justify="left" if title == "what is left" else "right", overflow="fold")
    for one in experts.values():
        table.add_row(f"{one.block}", f"{one.expert}", one.words(), f"{one.kept:.1%}", _loss([one]))
    return table


def _blocks_table(experts: Mapping[str, ExpertPlan]) -> Table:
    """A row for the experts of a block."""
    table = Table(title=f"experts of each block, {len(experts):,} in all", title_justify="left", box=box.SIMPLE_HEAD)
    titles = ("block", "experts", "all of it", "its mean", "fewer channels", "of", "factored", "parameters kept", "½J")
    for title in titles:
        table.add_column(title, justify="right", overflow="fold")
    for block, ones in by_block(experts).items():
        counts = [sum(one.is_dense for one in ones), sum(one.dropped for one in ones)]
        widths = [one.width for one in ones if one.width < one.channels and not one.dropped]
        span = f"{min(widths):,} to {max(widths):,} of {ones[0].channels:,}" if widths else "–"
        kept = 1 - sum(one.saved for one in ones) / sum(one.parameters for one in ones)
        cells = [str(block), str(len(ones)), *map(str, counts), str(len(widths)), span, str(sum(bool(one.ranks) for one in ones))]
        table.add_row(*cells, f"{kept:.1%}", _loss(ones))
    return table


def _loss(ones: Sequence[ExpertPlan]) -> str:
    known = [one.loss for one in ones if one.loss is not None]
    return f"{sum(known):.2e}" if known else "–"


def tables(plan: Plan) -> list[Table]:
    """All of a plan: edits, experts if it touches any, totals."""
    experts = experts_table(plan)
    return [edits_table(plan), *([] if experts is None else [experts]), totals_table(plan)]


def _layers(edit: Edit) -> str:
    if isinstance(edit, Quantise):
        return group_name(list(edit.layers))
    if isinstance(edit, Skip):
        return edit.sublayer
    if isinstance(edit, VocabularyBits):
        return " = ".join(edit.touches)
    return edit.unit.name if isinstance(edit, Factor) else edit.touches[-1]


_IN_WORDS: Mapping[str, Callable[[Any], tuple[str, str]]] = {
    "factor": lambda edit: (f"{sum(edit.d_outs)}×{edit.d_in}", f"rank {edit.rank}, {edit.layout}"),
    "narrow": lambda edit: (f"{edit.channels} channels", f"{edit.width} channels"),
    "heads": lambda edit: (f"{edit.heads} key-value heads", f"{edit.count} key-value heads"),
    "values": lambda edit: (f"{edit.width} features a value head", f"{edit.size} features"),
    "skip": lambda edit: (" + ".join(f"{one.d_out}×{one.d_in}" for one in edit.layers), "its mean"),
    "remove": lambda edit: (f"{edit.parts} {edit.part}", f"{edit.count} {edit.part}"),
    "quantise": lambda edit: (
        " + ".join(f"{d_out}×{d_in}" for d_in, d_out in edit.maps),
        f"{edit.bits} bits, groups of {edit.group_size}",
    ),
    "vocabulary": lambda edit: (f"{edit.tokens}×{edit.width}", f"{edit.bits} bits, groups of {edit.group_size}"),
    "mask": lambda edit: (f"{edit.d_out}×{edit.d_in}", f"{edit.weights:,} weights"),
}
"""By kind of edit: the layers' shape, and what is left of it."""


_ENDS = {"embedding": "embedding", "head": "head", "both": "embedding and head"}


def _shapes(edit: Edit) -> tuple[str, str]:
    words = _IN_WORDS.get(edit.edit)
    return ("", "") if words is None else words(edit)


def totals_table(plan: Plan) -> Table:
    """The three fractions, bytes, multiply-adds and, if known, the forecasts of loss and memory."""
    totals = plan.totals
    table = Table(show_header=False, box=None)
    if totals["rank_fraction"] is not None:
        table.add_row("rank fraction", f"{totals['rank_fraction']:.3f}")
    table.add_row("parameters of the chosen layers", f"{totals['param_fraction']:.1%} of dense")
    table.add_row("parameters of the model", f"{totals['parameters']:,} ({totals['model_fraction']:.1%} of dense)")
    size, dense = (totals["bytes"] or 0) / 1e6, (totals["dense_bytes"] or 0) / 1e6
    table.add_row("weights, on disk and in memory", f"{size:,.1f} MB (dense: {dense:,.1f} MB)")
    if any(isinstance(edit, Quantise) for edit in plan.edits):
        table.add_row("bits per weight of the chosen layers", f"{plan.bits_per_weight:.2f}")
    table.add_row("multiply-adds of the chosen layers", f"{totals['multiply_add_fraction']:.1%} of dense")
    table.add_row("edits", composition(plan))
    table.add_row("not touched", _outside(plan))
    if plan.lacking:
        table.add_row("not possible in this model", f"{', '.join(plan.lacking)}: its parts cannot be told apart")
    for row in _forecast(plan):
        table.add_row(*row)
    memory = plan.forecast_memory or {}
    for what, names in _STAGES.items():
        parts = {name: memory[name] / 1e6 for name in names if name in memory}
        listed = ", ".join(f"{name} {size:,.0f}" for name, size in parts.items() if size)
        if parts:
            table.add_row(f"memory to {what}", f"{sum(parts.values()):,.0f} MB ({listed}) beside the program")
    return table


def _forecast(plan: Plan) -> Iterator[tuple[str, str]]:
    if plan.predicted_loss is not None:
        yield "forecast, Σ ½J", f"{plan.predicted_loss:.4f} nats/token: {_perplexity(plan)}"
        if plan.caution is not None:
            yield "the forecast is not to be trusted", plan.caution
    if plan.expected is not None:
        one = plan.expected
        yield (
            "to expect, KL",
            f"{one.kl:.4f} nats/token [{one.low:.4f}, {one.high:.4f}], by {one.plans} measured plans of this model",
        )


def composition(plan: Plan) -> str:
    """How many layers each kind of edit takes, and how many stay dense."""
    counts: Counter[str] = Counter()
    for edit in plan.edits:
        if isinstance(edit, VocabularyBits):
            counts[f"the {_ENDS[edit.end]} in {edit.bits} bits"] += 1
            continue
        if isinstance(edit, Quantise):
            counts[f"{edit.bits} bits"] += len(edit.touches)
            continue
        counts[edit.layout if isinstance(edit, Factor) else edit.edit] += len(edit.touches) if isinstance(edit, Factor) else 1
    names = {layer.name for layer in plan.layers}
    touched = {name for edit in plan.edits if not edit.keeps_weights for name in edit.touches} & names
    dense = len(plan.layers) - len(touched)
    words = [_counted(what, count) for what, count in counts.most_common()]
    narrowed = [edit for edit in plan.edits if isinstance(edit, Narrow)]
    if narrowed:
        share = sum(edit.width for edit in narrowed) / sum(edit.channels for edit in narrowed)
        words.append(f"narrow MLPs keep {share:.1%} of their channels")
    heads = [edit for edit in plan.edits if isinstance(edit, Heads)]
    if heads:
        words.append(f"{sum(e.count for e in heads)} of {sum(e.heads for e in heads)} key-value heads stay there")
    values = [edit for edit in plan.edits if isinstance(edit, Values)]
    if values:
        words.append(f"{sum(e.size for e in values) / sum(e.width for e in values):.1%} of the value features")
    return ", ".join([*words, f"{dense} of {len(plan.layers)} layers untouched"])


def _counted(what: str, count: int) -> str:
    if what.startswith("the "):
        return what
    if what.endswith(" bits"):
        return f"{count} layers in {what}"
    return f"{count} layers {what}" if what in LAYOUTS else f"{count} × {what}"


def _outside(plan: Plan) -> str:
    """What no plan touches: embeddings, norms, the head, routers, and layers that were not chosen or not called."""
    outside = plan.model.parameters - plan.dense_parameters
    parts = f": {in_words(plan.outside, plan.model.parameters)}" if plan.outside else ""
    return f"{outside:,} parameters, {outside / plan.model.parameters:.1%} of the model{parts}"


def _perplexity(plan: Plan) -> str:
    """``exp(Σ½J)``, and what it makes of the dense perplexity where that is known."""
    ratio = exp(min(plan.predicted_loss or 0.0, 700.0))
    if plan.dense_nll is None:
        return f"perplexity × {ratio:.3f}"
    return f"perplexity of the calibration text {exp(plan.dense_nll):.2f} → {exp(plan.dense_nll) * ratio:.2f} (× {ratio:.3f})"


def as_text(plan: Plan, width: int = 160) -> str:
    """Both tables as plain text."""
    console = Console(width=width, no_color=True)
    with console.capture() as capture:
        console.print(*tables(plan))
    return "\n".join(line.rstrip() for line in capture.get().splitlines())
