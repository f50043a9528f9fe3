"""What of a model may be left out: channels of MLPs, heads and value features of attentions, whole sublayers and experts."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from torch import nn
from transformers import PreTrainedModel

from fasc.edits import Edit
from fasc.edits.attention import Heads, Values
from fasc.edits.narrow import Narrow
from fasc.edits.skip import Skip
from fasc.errors import BudgetError
from fasc.forecast.attention import heads_consumer_key, heads_key, loss_of_leaving_out, value_sizes, values_key
from fasc.model.attention import Attention, find_attentions
from fasc.model.coupling import Coupling, find_channels
from fasc.model.experts import find_experts, fused_sizes
from fasc.model.groups import InputGroup
from fasc.model.sublayers import Sublayer, find_sublayers
from fasc.planning.candidates import Curves, Rules

EXPERTS = "experts"
"""Allows the mean of an expert in its place."""

WORDS = (Narrow.word, Heads.word, Values.word, Skip.word, EXPERTS)
"""What ``--layouts`` may name beside layouts."""


@dataclass(frozen=True, slots=True)
class Removable:
    """By kind; empty where it is not allowed or not possible."""

    channels: tuple[Coupling, ...] = ()
    attentions: tuple[Attention, ...] = ()
    """Whose heads or value features may be fewer."""

    sublayers: tuple[Sublayer, ...] = ()
    """Whole attentions, MLPs and experts."""

    words: frozenset[str] = frozenset()
    """That are allowed."""

    def lacking(self) -> list[str]:
        """What is allowed and what this model has none of."""
        found = {
            Narrow.word: bool(self.channels),
            Heads.word: any(one.coupling.parts > 1 for one in self.attentions),
            Values.word: any(one.value is not None for one in self.attentions),
            Skip.word: any(one.layers[0].expert is None for one in self.sublayers),
        }
        return [word for word, there in found.items() if word in self.words and not there]


def prunable(model: PreTrainedModel, groups: Sequence[InputGroup]) -> list[Coupling]:
    """The MLPs that may lose channels: all but the last block's.

    Channels of the last block each predict few tokens, confidently: their gradients vanish, and ½J underestimates their
    removal, by a factor of five in the 135M model and without limit on rare tokens (docs/log.md).
    """
    last = max((group.block for group in groups if group.block is not None), default=None)
    return [one for one in find_channels(model, groups) if one.group.block != last]


def find_removable(model: PreTrainedModel, groups: Sequence[InputGroup], words: frozenset[str]) -> Removable:
    """What may be left out, as far as it is allowed.

    Args:
        model: dense; comes out as it went in.
        groups: its input groups.
        words: of ``WORDS``, those that are allowed.

    Raises:
        BudgetError: experts may go, and there are none.
    """
    experts = find_experts(model, groups) if EXPERTS in words else []
    if EXPERTS in words and not experts:
        raise _without_experts(model)
    sublayers = [*(find_sublayers(model, groups) if Skip.word in words else []), *experts]
    return Removable(
        tuple(prunable(model, groups)) if Narrow.word in words else (),
        tuple(find_attentions(model, groups)) if words & {Heads.word, Values.word} else (),
        tuple(sublayers),
        words,
    )


def require_experts(model: nn.Module, layouts: Sequence[str] | None) -> None:
    """Refuse means of experts in a model without experts: before anything is measured.

    Raises:
        BudgetError: they are asked for.
    """
    if EXPERTS in (layouts or ()) and not fused_sizes(model):
        raise _without_experts(model)


def _without_experts(model: nn.Module) -> BudgetError:
    return BudgetError(
        f"{type(model).__name__} has no expert that a mean could stand for, among the layers that were chosen",
        f"leave `{EXPERTS}` out of --layouts: it is for mixtures, and for experts of all blocks but the last",
    )


@dataclass(frozen=True, slots=True)
class Left:
    """An attention after some edits."""

    groups: tuple[InputGroup, InputGroup]
    """Of its projections, and of its output layer."""

    curves: Curves
    """Forecasts, with that of the output layer as it is now."""

    edits: tuple[Edit, ...] = ()


def attentions_left(attention: Attention, rules: Rules, curves: Curves, damping: float, words: frozenset[str]) -> Iterator[Left]:
    """An attention with each number of heads and each width of values that may be had, and as it is."""
    coupling, name = attention.coupling, attention.coupling.consumer.name
    counts = [count for count in range(coupling.parts, 0, -1) if count == coupling.parts or heads_key(name, count) in curves]
    for count in counts:
        left = Left((coupling.group, coupling.consumer), curves)
        if count < coupling.parts:
            heads = Heads.of(coupling, count, damping, float(curves[heads_key(name, count)][0]))
            known = {**curves, name: curves[heads_consumer_key(name, count)]}
            left = Left(_groups_after(left.groups, heads), known, (heads,))
        if count >= rules.floor * coupling.parts:
            yield left
        if Values.word not in words or attention.value is None:
            continue
        for size in value_sizes(attention.width):
            key = values_key(name, count, size)
            if key in curves and size * count >= rules.floor * attention.width * coupling.parts:
                values = Values.of(
                    _coupling_of(coupling, left.groups, count), attention.value.name, size, damping, float(curves[key][0])
                )
                # The curve of the wider output layer is an upper bound: its explained covariance has the larger eigenvalues.
                yield Left(_groups_after(left.groups, values), left.curves, (*left.edits, values))


def _coupling_of(dense: Coupling, groups: tuple[InputGroup, InputGroup], count: int) -> Coupling:
    names = {layer.name for layer in dense.producers}
    producers = tuple(layer for layer in groups[0].layers if layer.name in names)
    return Coupling(dense.part, count, groups[0], producers, groups[1])


def _groups_after(groups: tuple[InputGroup, InputGroup], edit: Heads | Values) -> tuple[InputGroup, InputGroup]:
    new = {layer.name: layer for layer in edit.left()}
    first, second = (InputGroup(tuple(new.get(layer.name, layer) for layer in group.layers)) for group in groups)
    return first, second


def skip_of(sublayer: Sublayer, rules: Rules, curves: Curves) -> tuple[Skip, float] | None:
    """The edit that leaves a sublayer out, and what its mean costs; ``None`` where that has no forecast or a floor forbids it."""
    loss = loss_of_leaving_out(curves, sublayer.layers[-1].name)
    if loss is None or rules.floor > 0:
        return None
    numbers = sublayer.layers[-1].d_out - sublayer.others
    cost = {"bytes": numbers * rules.bytes_per_parameter, "parameters": numbers, "multiply-adds": 0, "rank": 0}[rules.cost]
    return Skip.of(sublayer, loss), float(cost)


def by_group(removable: Removable) -> dict[str, tuple[Coupling | None, Attention | None, Sublayer | None]]:
    """What may be left out of the sublayer that begins with a group."""
    channels = {one.group.name: one for one in removable.channels}
    attentions = {one.coupling.group.name: one for one in removable.attentions}
    sublayers = {one.groups[0].name: one for one in removable.sublayers}
    names = dict.fromkeys([*channels, *attentions, *sublayers])
    return {name: (channels.get(name), attentions.get(name), sublayers.get(name)) for name in names}
