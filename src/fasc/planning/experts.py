"""What a plan makes of each expert of a mixture."""

from collections.abc import Mapping
from dataclasses import dataclass, field

from fasc.edits import Edit
from fasc.edits.factor import Factor
from fasc.edits.narrow import Narrow
from fasc.edits.quantise import Quantise
from fasc.edits.remove import Remove
from fasc.edits.skip import Skip
from fasc.edits.unfuse import Unfuse
from fasc.model.layers import expert_of
from fasc.planning.plan import Plan


@dataclass(slots=True)
class ExpertPlan:
    """One expert under a plan."""

    name: str
    """Of its module."""

    block: int | None
    expert: int
    parameters: int = 0
    """When dense."""

    saved: int = 0
    dropped: bool = False
    """Whether its mean stands in its place."""

    channels: int = 0
    width: int = 0
    """Channels that stay, of so many."""

    ranks: dict[str, tuple[int, int]] = field(default_factory=dict)
    """By the kind of a layer that is factored: its rank, and the full one."""

    bits: dict[str, int] = field(default_factory=dict)
    """By the kind of a layer that is rounded."""

    loss: float | None = None
    """π ½J of its edits, nats per token of text."""

    @property
    def kept(self) -> float:
        """Share of its parameters."""
        return 1 - self.saved / self.parameters

    @property
    def is_dense(self) -> bool:
        """Whether nothing is done to it."""
        return not (self.dropped or self.ranks or self.bits or self.width < self.channels)

    def words(self) -> str:
        """What is left of it."""
        if self.dropped:
            return "its mean"
        parts = [f"{self.width:,} of {self.channels:,} channels"] if self.width < self.channels else []
        parts += [f"{kind} rank {rank} of {full}" for kind, (rank, full) in self.ranks.items()]
        parts += [f"{kind} in {bits} bits" for kind, bits in self.bits.items()]
        return ", ".join(parts) or "all"


def experts_in(plan: Plan) -> dict[str, ExpertPlan]:
    """By name, every expert whose layers a plan may touch, in the model's order; none for a dense model."""
    found: dict[str, ExpertPlan] = {}
    for layer in plan.layers:
        name = expert_of(layer.name)
        if name is not None and layer.expert is not None:
            one = found.setdefault(name, ExpertPlan(name, layer.block, layer.expert))
            one.parameters += layer.parameters
            one.channels = one.width = layer.d_in  # of the last layer
    for edit in plan.edits:
        name = expert_touched(edit)
        if name in found:
            _add(found[name], edit)
    return found


def expert_touched(edit: Edit) -> str | None:
    """Name of the one expert that an edit works on; ``None`` where that is none, or all of them."""
    return None if isinstance(edit, Unfuse) else expert_of(edit.touches[-1])


def _add(one: ExpertPlan, edit: Edit) -> None:
    one.saved += edit.saved
    if edit.predicted_loss is not None:
        one.loss = (one.loss or 0.0) + edit.predicted_loss
    if isinstance(edit, Skip):
        one.dropped = True
    elif isinstance(edit, Narrow):
        one.width = edit.width
    elif isinstance(edit, Remove):
        one.width = edit.count
    elif isinstance(edit, Factor):
        one.ranks |= {_kind(name): (edit.rank, edit.unit.full_rank) for name in edit.touches}
    elif isinstance(edit, Quantise):
        one.bits |= {_kind(name): edit.bits for name in edit.touches}


def _kind(layer: str) -> str:
    return layer.rpartition(".")[2]


def by_block(experts: Mapping[str, ExpertPlan]) -> dict[int | None, list[ExpertPlan]]:
    """The experts of each block."""
    blocks: dict[int | None, list[ExpertPlan]] = {}
    for one in experts.values():
        blocks.setdefault(one.block, []).append(one)
    return blocks
