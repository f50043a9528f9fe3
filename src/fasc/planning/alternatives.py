"""The alternatives of every group: one projector or several, all channels or fewer."""

from collections.abc import Callable, Mapping, Sequence

import numpy as np
from numpy.typing import NDArray
from transformers import PreTrainedModel

from fasc.edits import Edit
from fasc.edits.narrow import Narrow
from fasc.errors import BudgetError
from fasc.forecast.channels import narrow_consumer_key, narrowing_key
from fasc.forecast.rounding import noise_key
from fasc.layouts import LAYOUTS
from fasc.model.coupling import Coupling, find_channels
from fasc.model.groups import InputGroup, Scope, Unit
from fasc.planning.candidates import Alternative, Candidates, Rules, candidates, step_of
from fasc.statistics.narrowing import narrowed_group

Curves = Mapping[str, NDArray[np.float64]]
"""Forecasts by unit, and those of channel pruning."""

_WIDTHS = 24
"""Numbers of channels that a plan may choose from, at most."""

_FEWEST = 0.25
"""Least share of its channels that an MLP keeps."""


def widths_of(channels: int, rank_multiple: int, channel_multiple: int | None = None) -> list[int]:
    """Numbers of channels that a plan may leave, the largest first; not all of them.

    Args:
        channels: of the MLP.
        rank_multiple: what they are multiples of, where the MLP is large enough.
        channel_multiple: what they are multiples of in any case.
    """
    step = step_of(rank_multiple, channels) if channel_multiple is None else channel_multiple
    step *= -(-channels // (_WIDTHS * step))
    return [width for width in range((channels - 1) // step * step, 0, -step) if width >= _FEWEST * channels]


def prunable(model: PreTrainedModel, groups: Sequence[InputGroup]) -> list[Coupling]:
    """The MLPs that may lose channels: all but the last block's.

    Channels of the last block each predict few tokens, confidently: their gradients vanish, and ½J underestimates their
    removal, by a factor of five in the 135M model and without limit on rare tokens (docs/log.md).
    """
    last = max((group.block for group in groups if group.block is not None), default=None)
    return [one for one in find_channels(model, groups) if one.group.block != last]


def check_widths(couplings: Sequence[Coupling], widths: Callable[[int], Sequence[int]], multiple: int) -> None:
    """Refuse a multiple that leaves nothing to choose, which would take channel pruning away without a word.

    Raises:
        BudgetError: names the MLP.
    """
    for one in couplings:
        if not widths(one.parts):
            raise BudgetError(
                f"no multiple of {multiple} lies between a quarter of the {one.parts:,} channels of "
                f"`{one.consumer.name}` and all",
                "give a smaller --channel-multiple, or leave `channels` out of --layouts",
            )


def alternatives_of(
    groups: Sequence[InputGroup],
    couplings: Sequence[Coupling],
    scopes: Sequence[Scope],
    rules: Rules,
    curves: Curves,
    damping: float,
) -> list[list[Alternative]]:
    """The alternatives of every group; the two groups of an MLP that may lose channels are one choice.

    Args:
        groups: all input groups.
        couplings: MLPs that may lose channels.
        scopes: which units may be used.
        rules: what a plan may do.
        curves: forecasts, where they are known.
        damping: of channel pruning.
    """
    by_group = {one.group.name: one for one in couplings}
    consumers = {one.consumer.name for one in couplings}
    choices = []
    for group in groups:
        coupling = by_group.get(group.name)
        if coupling is not None:
            choices.append(_of_mlp(coupling, scopes, rules, curves, damping))
        elif group.name not in consumers:
            choices.append(_of_group(group, scopes, rules, curves))
    return choices


def _of_group(
    group: InputGroup, scopes: Sequence[Scope], rules: Rules, curves: Curves, *, dense: InputGroup | None = None
) -> list[Alternative]:
    """One projector for the group's layers, or each by itself, as far as either is allowed."""
    parameters = {layer.name: layer.parameters for layer in (dense or group).layers}

    def of(unit: Unit) -> Candidates:
        whole = sum(parameters[layer.name] for layer in unit.layers)
        noise = {one: curves[noise_key(unit.name, one)] for one in LAYOUTS if noise_key(unit.name, one) in curves}
        return candidates(unit, rules, curves.get(unit.name), dense_parameters=whole, noise=noise)

    single = len(group.layers) == 1
    shared = [Alternative((of(group.unit()),))] if "group" in scopes and not (single and "layer" in scopes) else []
    separate = [Alternative(tuple(of(unit) for unit in group.units("layer")))] if "layer" in scopes else []
    return shared + separate


def _of_mlp(coupling: Coupling, scopes: Sequence[Scope], rules: Rules, curves: Curves, damping: float) -> list[Alternative]:
    """With all channels, and with each number of them that the rules allow."""

    def with_channels(producers: InputGroup, consumer: InputGroup, known: Curves, before: Edit | None) -> list[Alternative]:
        first = _of_group(producers, scopes, rules, known, dense=coupling.group)
        second = _of_group(consumer, scopes, rules, known, dense=coupling.consumer)
        return [Alternative(a.units + b.units, before) for a in first for b in second]

    name, channels = coupling.consumer.name, coupling.parts
    alternatives = with_channels(coupling.group, coupling.consumer, curves, None)
    for width in widths_of(channels, rules.rank_multiple, rules.channel_multiple):
        if narrow_consumer_key(name, width) not in curves or width < rules.floor * channels:
            continue
        edit = Narrow.of(coupling, width, damping, float(curves[narrowing_key(name)][channels - width]))
        narrow = [narrowed_group(group, coupling, width) for group in (coupling.group, coupling.consumer)]
        left = {**curves, name: curves[narrow_consumer_key(name, width)]}
        alternatives += with_channels(narrow[0], narrow[1], left, edit)
    return alternatives
