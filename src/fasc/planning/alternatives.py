"""The alternatives of every group: one projector or several; all channels, heads and value features or fewer; no sublayer."""

from collections.abc import Callable, Iterator, Sequence

from fasc.edits.narrow import Narrow
from fasc.errors import BudgetError
from fasc.forecast.channels import narrow_consumer_key, narrowing_key
from fasc.forecast.rounding import noise_key
from fasc.layouts import LAYOUTS
from fasc.model.attention import Attention
from fasc.model.coupling import Coupling
from fasc.model.groups import InputGroup, Scope, Unit
from fasc.model.sublayers import Sublayer
from fasc.planning.candidates import Alternative, Candidates, Curves, Rules, candidates, step_of
from fasc.planning.equal_experts import holder_of, with_one_width
from fasc.planning.removable import Left, Removable, attentions_left, by_group, skip_of
from fasc.statistics.narrowing import narrowed_group

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
    removable: Removable,
    scopes: Sequence[Scope],
    rules: Rules,
    curves: Curves,
    damping: float,
) -> list[list[Alternative]]:
    """The alternatives of every group; the two groups of a sublayer that may lose something are one choice.

    So are all experts of a block where they shall keep as many channels as each other.

    Args:
        groups: all input groups.
        removable: what may be left out.
        scopes: which units may be used.
        rules: what a plan may do.
        curves: forecasts, where they are known.
        damping: of what is left out.
    """
    known = by_group(removable)
    seconds = {_pair(*what)[1].name for what in known.values()}
    choices: list[tuple[str | None, list[Alternative]]] = []
    for group in groups:
        if group.name in known:
            made = _of_sublayer(known[group.name], scopes, rules, curves, damping, removable.words)
            narrows = rules.equal_experts and known[group.name][0] is not None
            choices.append((holder_of(group.layers[0].name) if narrows else None, made))
        elif group.name not in seconds:
            choices.append((None, _of_group(group, scopes, rules, curves)))
    return with_one_width(choices)


def _pair(channels: Coupling | None, attention: Attention | None, sublayer: Sublayer | None) -> tuple[InputGroup, InputGroup]:
    coupling = attention.coupling if channels is None and attention is not None else channels
    if coupling is not None:
        return coupling.group, coupling.consumer
    assert sublayer is not None  # noqa: S101 - one of them is there
    return sublayer.groups[0], sublayer.groups[1]


def _of_sublayer(
    what: tuple[Coupling | None, Attention | None, Sublayer | None],
    scopes: Sequence[Scope],
    rules: Rules,
    curves: Curves,
    damping: float,
    words: frozenset[str],
) -> list[Alternative]:
    """With everything, with fewer parts, and without it."""
    channels, attention, sublayer = what
    dense = _pair(*what)

    def with_units(left: Left) -> list[Alternative]:
        first = _of_group(left.groups[0], scopes, rules, left.curves, dense=dense[0])
        second = _of_group(left.groups[1], scopes, rules, left.curves, dense=dense[1])
        return [Alternative(a.units + b.units, left.edits) for a in first for b in second]

    lefts = [Left(dense, curves)]
    if channels is not None:
        lefts += _with_channels(channels, rules, curves, damping)
    if attention is not None:
        lefts += list(attentions_left(attention, rules, curves, damping, words))[1:]
    alternatives = [alternative for left in lefts for alternative in with_units(left)]
    skip = None if sublayer is None else skip_of(sublayer, rules, curves)
    return alternatives if skip is None else [*alternatives, Alternative((), skip[:1], skip[1])]


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


def _with_channels(coupling: Coupling, rules: Rules, curves: Curves, damping: float) -> Iterator[Left]:
    """With each number of channels that the rules allow."""
    name, channels = coupling.consumer.name, coupling.parts
    for width in widths_of(channels, rules.rank_multiple, rules.channel_multiple):
        if narrow_consumer_key(name, width) not in curves or width < rules.floor * channels:
            continue
        edit = Narrow.of(coupling, width, damping, float(curves[narrowing_key(name)][channels - width]))
        first, second = (narrowed_group(group, coupling, width) for group in (coupling.group, coupling.consumer))
        yield Left((first, second), {**curves, name: curves[narrow_consumer_key(name, width)]}, (edit,))
