"""One width for all experts of a block: what grouped kernels want, which multiply all experts of a block at once."""

from collections.abc import Sequence

from torch import nn

from fasc.edits.narrow import Narrow
from fasc.errors import BudgetError
from fasc.model.coupling import Coupling
from fasc.model.layers import expert_of
from fasc.planning.candidates import Alternative

Choice = list[Alternative]


def holder_of(layer: str) -> str | None:
    """What holds all experts of the block that a layer belongs to; ``None`` outside of experts."""
    expert = expert_of(layer)
    return None if expert is None else expert.rpartition(".")[0]


def require_every_expert(model: nn.Module, couplings: Sequence[Coupling]) -> None:
    """See that no expert would keep its width while the others of its block lose channels.

    Args:
        model: with its experts as layers.
        couplings: the MLPs that may lose channels.

    Raises:
        BudgetError: names a block with an expert that has no moments or was not chosen.
    """
    counts: dict[str, int] = {}
    for one in couplings:
        holder = holder_of(one.consumer.name)
        if holder is not None:
            counts[holder] = counts.get(holder, 0) + 1
    for holder, count in counts.items():
        every = sum(name.isdigit() for name, _ in model.get_submodule(holder).named_children())
        if count < every:
            raise BudgetError(
                f"{every - count} of the {every} experts of `{holder}` have no moments or were not chosen, and keep their width",
                "collect with --expert-floor or more text, choose all experts, or leave --equal-experts out",
            )


def with_one_width(choices: Sequence[tuple[str | None, Choice]]) -> list[Choice]:
    """The experts of a block as one choice, whose alternatives have as many channels in each.

    Where experts can be stored in several ways (their first layers by one projector or by one each), all have the same.

    Args:
        choices: with what holds the experts, for those of experts that can lose channels.
    """
    blocks: dict[str, list[Choice]] = {}
    for index, (holder, choice) in enumerate(choices):
        blocks.setdefault(holder or f"{index}", []).append(choice)
    return [several[0] if len(several) == 1 else _together(several) for several in blocks.values()]


def _together(experts: Sequence[Choice]) -> Choice:
    by_width = [_by_width(choice) for choice in experts]
    return [
        Alternative(
            tuple(unit for part in parts for unit in part.units),
            tuple(edit for part in parts for edit in part.before),
            sum(part.cost for part in parts),
        )
        for width in by_width[0]
        for parts in zip(*(one[width] for one in by_width), strict=True)
    ]


def _by_width(choice: Choice) -> dict[int | None, Choice]:
    """Alternatives by the channels that they leave; ``None`` for all."""
    found: dict[int | None, Choice] = {}
    for one in choice:
        width = next((edit.width for edit in one.before if isinstance(edit, Narrow)), None)
        found.setdefault(width, []).append(one)
    return found
