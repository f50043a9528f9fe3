"""Statistics larger than memory: which groups one pass over the text can hold the sums of.

The forward pass goes through the whole model, because gradients start at the loss, and the backward pass ends below the pass's
first block. Where no gradients are asked for, the forward pass ends after the pass's last block. Every pass reads the same
batches with the same sampled labels, so the moments are those of one pass, bit by bit.
"""

from collections.abc import Sequence
from math import ceil
from typing import NamedTuple

from transformers import PreTrainedModel

from fasc.errors import UsageError
from fasc.model.blocks import block_names
from fasc.model.groups import InputGroup
from fasc.statistics.accumulators import FLUSH_TOKENS
from fasc.statistics.memory import entries_of, memory_forecast
from fasc.statistics.options import CalibrationConfig
from fasc.statistics.unit import Need

PROGRAM = 550_000_000
"""Bytes of Python, torch and transformers before a model is loaded: measured (docs/results.md, "Memory")."""


class Pass(NamedTuple):
    """Groups whose moments are measured together."""

    groups: tuple[str, ...]
    """Names."""

    start: str | None
    """The first block of them; ``None`` in the pass that goes down to the embedding."""

    bytes: int
    """Of the sums."""


def plan_passes(
    model: PreTrainedModel,
    groups: Sequence[InputGroup],
    needs: frozenset[Need],
    calibration: CalibrationConfig,
    limit: int,
) -> list[Pass]:
    """As few passes over neighbouring blocks as a limit of memory allows.

    Args:
        model: dense.
        groups: its input groups, in the model's order.
        needs: the moments.
        calibration: for the size of a batch and of the text.
        limit: bytes of memory, those of the program and of the model included.

    Raises:
        UsageError: the sums of one block do not fit; says how much is needed at least.
    """
    parts: dict[int | None, list[InputGroup]] = {}
    for group in groups:
        parts.setdefault(group.block, []).append(group)
    blocks = [(some, _bytes(some, needs, calibration)) for some in parts.values()]
    forecast = memory_forecast(model, groups, needs, calibration.batch_tokens)
    published = 8 * max(entries_of(group, needs) for group in groups)  # one group at a time, in float64
    beside = PROGRAM + forecast["model"] + forecast["batch"] + published
    largest = max(size for _, size in blocks)
    least = beside + largest
    if least > limit:
        model_gb, batch_gb, sums_gb = (size / 1e9 for size in (forecast["model"], forecast["batch"], largest + published))
        raise UsageError(
            f"{limit / 1e9:,.3g} GB of memory do not hold the moments of one block: that takes {least / 1e9:,.2f} GB "
            f"({PROGRAM / 1e9:,.2f} the program, {model_gb:,.2f} the model, {batch_gb:,.2f} a batch, {sums_gb:,.2f} the sums)",
            f"give --max-memory {ceil(least / 1e7) / 100:.2f}GB, or lower --batch-tokens",
        )
    passes: list[tuple[list[InputGroup], int]] = []
    for some, size in blocks:
        if passes and beside + passes[-1][1] + size <= limit:
            passes[-1] = ([*passes[-1][0], *some], passes[-1][1] + size)
        else:
            passes.append((list(some), size))
    found = []
    for place, (some, size) in enumerate(passes):
        start = block_names(model, [some[0].layers[0].name]) if place else []
        found.append(Pass(tuple(group.name for group in some), start[0] if start else None, size))
    return found


def _bytes(groups: Sequence[InputGroup], needs: frozenset[Need], calibration: CalibrationConfig) -> int:
    """Sums in float32, and their totals in float64 from so many tokens on."""
    entries = sum(entries_of(group, needs) for group in groups)
    return (12 if calibration.sequences * calibration.sequence_length >= FLUSH_TOKENS else 4) * entries
