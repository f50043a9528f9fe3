"""Experts that hear too little: what they lack is taken from the mean of their block's experts.

An expert with n of the T tokens of a floor has the moments of a text in which the T − n others were drawn from its block:
``n/T`` of its own and ``1 − n/T`` of the mean over the block's experts, weighted by their tokens. What lies between the two means
is variance (:meth:`~fasc.statistics.unit.GroupStatistics.merge`). Its share of the text stays its own; an expert that heard
nothing counts as one that heard one token.

Channels of experts have no order in common. Averaged over many of them, the covariances of channels come near to multiples of the
identity, which is what shrinkage towards a mean amounts to there.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import reduce

from fasc.model.groups import InputGroup
from fasc.statistics.extras import EXTRAS
from fasc.statistics.unit import GroupStatistics

Groups = Mapping[str, GroupStatistics]


def pooled(groups: Groups, every: Sequence[InputGroup], floor: int) -> tuple[dict[str, GroupStatistics], dict[str, int]]:
    """The statistics with those of experts below a floor drawn towards their block.

    Args:
        groups: of every group that got a token.
        every: group of the model, also those without a token.
        floor: tokens that an expert needs to stand for itself.

    Returns:
        All groups, in the model's order; and by name of those that were pooled, the tokens that they got.
    """
    heard = {group.name: groups[group.name].tokens if group.name in groups else 0 for group in every}
    few = {group.name: heard[group.name] for group in every if _holder(group) is not None and heard[group.name] < floor}
    blocks: dict[tuple[str | None, str], list[GroupStatistics]] = {}
    for group in every:
        if group.name in groups:
            blocks.setdefault(_key(group), []).append(groups[group.name])
    found: dict[str, GroupStatistics] = {}
    taken: dict[str, int] = {}
    for group in every:
        name, others = group.name, blocks.get(_key(group), [])
        if name not in few or not others:
            found |= {name: groups[name]} if name in groups else {}
            continue
        taken[name] = few[name]
        mean = reduce(GroupStatistics.merge, [_renamed(one, group) for one in others])
        found[name] = _drawn_to(groups.get(name), mean, floor, others[0])
    return found, taken


def _drawn_to(own: GroupStatistics | None, mean: GroupStatistics, floor: int, some: GroupStatistics) -> GroupStatistics:
    """``own`` with the tokens that it lacks taken from ``mean``; counts are its own, of the text those of any group."""
    heard = 0 if own is None else own.tokens
    if own is not None:
        counted = replace(own, sequences=heard), replace(mean, tokens=floor - heard, sequences=floor - heard)
        mean = counted[0].merge(counted[1])
    return replace(mean, tokens=max(heard, 1), text_tokens=some.text_tokens, sequences=some.sequences)


def _renamed(one: GroupStatistics, group: InputGroup) -> GroupStatistics:
    """The moments of one expert under the names of another; what is of single sequences is left out."""
    names = {one.group.name: group.name}
    names |= {old.name: new.name for old, new in zip(one.group.layers, group.layers, strict=True)}
    extras = {}
    for key, value in one.extras.items():
        moment, slash, of = key.partition("/")
        if EXTRAS[moment].mean_over != "none":
            extras[f"{moment}{slash}{names.get(of, of)}"] = value
    gradients = {names[name]: gradient for name, gradient in one.gradients.items()}
    return replace(one, group=group, gradients=gradients, extras=extras)


def _key(group: InputGroup) -> tuple[str | None, str]:
    return _holder(group), group.kind


def _holder(group: InputGroup) -> str | None:
    """What holds all experts of the block; ``None`` for a group outside of experts."""
    layer = group.layers[0]
    return None if layer.expert is None else layer.name.rpartition(f".experts.{layer.expert}.")[0]
