"""What a group of layers is told by its hooks, and the sums that this feeds.

A :class:`GroupCapture` keeps at most one tensor per layer between the forward and the backward pass, and nothing per token
after that.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from fasc.errors import CorpusError, NonFiniteError, StatisticsError
from fasc.model.experts import Expert
from fasc.model.groups import InputGroup
from fasc.model.layers import Layer
from fasc.processes import Processes
from fasc.statistics.accumulators import Covariance, CrossSum, SymmetricSum, VectorSum
from fasc.statistics.extras import EXTRAS, FORWARD_ONLY, OUTPUT_ONLY, Extra
from fasc.statistics.unit import GradientMoment, GroupStatistics, Need, smaller_side, units_of


@dataclass(frozen=True, slots=True)
class Batch:
    """Sequences that go through the model together."""

    sequences: int
    length: int
    mask: Tensor | None
    """1 where there is text, [sequences, length]; ``None`` means everywhere."""

    tokens: int
    """Of text."""

    @classmethod
    def of(cls, tokens: Tensor, mask: Tensor | None) -> "Batch":
        """The batch of tokens [sequences, length]."""
        return cls(tokens.shape[0], tokens.shape[1], mask, tokens.numel() if mask is None else int(mask.sum()))


@dataclass(frozen=True, slots=True)
class Call:
    """One call of a layer, from its forward pass to the arrival of its gradient, which may never come."""

    x: Tensor | None
    """What the layer reads, where moments of inputs with gradients are wanted."""

    positions: Tensor | None
    """Of the tokens that an expert reads, among all of the batch; ``None`` means all."""


@dataclass
class _UnitSums:
    """Running sums of one unit's gradients."""

    layers: tuple[Layer, ...]
    side: str
    vector: VectorSum
    square: SymmetricSum
    cross: CrossSum | None
    waiting: dict[str, Tensor] = field(default_factory=dict)
    """Gradients of the members that have arrived in this backward pass, until all have."""

    def offer(self, layer: str, gradient: Tensor) -> Tensor | None:
        """Take one member's gradient, on this unit's side; return the unit's own when all have arrived."""
        self.waiting[layer] = gradient
        return self.complete() if len(self.waiting) == len(self.layers) else None

    def complete(self) -> Tensor:
        """The unit's gradient of this call; a member that the loss does not depend on has none and counts as 0."""
        arrived, self.waiting = self.waiting, {}
        if self.side == "input":
            first, *others = (arrived[layer.name] for layer in self.layers if layer.name in arrived)
            return sum(others, start=first)
        some = next(iter(arrived.values()))
        parts = [arrived.get(layer.name, some.new_zeros(some.shape[0], layer.d_out)) for layer in self.layers]
        return torch.cat(parts, dim=-1)

    def add(self, gradient: Tensor, x: Tensor | None) -> None:
        """Add a complete gradient [t, d], and its input where a cross moment is wanted."""
        self.vector.add(gradient)
        self.square.add(gradient)
        if self.cross is not None and x is not None:
            self.cross.add(x, gradient)

    def merge(self, other: "_UnitSums") -> None:
        self.vector.merge(other.vector)
        self.square.merge(other.square)
        if self.cross is not None and other.cross is not None:
            self.cross.merge(other.cross)

    def reduce(self, processes: Processes) -> None:
        for total in (self.vector, self.square, self.cross):
            if total is not None:
                total.reduce(processes)

    def publish(self, tokens: int, mean_x: Tensor) -> GradientMoment:
        mean = self.vector.mean(tokens)
        covariance = Covariance(mean.float().cpu(), self.square.covariance(mean, tokens).float().cpu())
        cross = None if self.cross is None else self.cross.covariance((mean_x, mean), tokens).float().cpu()
        return GradientMoment("input" if self.side == "input" else "output", covariance, cross)


class GroupCapture:
    """Accumulators of one group, fed by hooks."""

    def __init__(self, group: InputGroup, needs: frozenset[Need], device: torch.device) -> None:
        self.group, self.needs = group, needs
        self.tokens = 0
        """Read by the group, padding excluded."""
        self.text_tokens = 0
        self.sequences = 0
        """Of the whole text, whether they reached the group or not."""
        self._input_vector = VectorSum(group.d_in, device)
        self._input_square = SymmetricSum(group.d_in, device)
        self._units = [self._unit(layers, Need("cross", scope) in needs, device) for scope, layers in units_of(group, needs)]
        wanted = {need.moment for need in needs}
        self._extras: dict[str, Extra] = {name: make(group, device) for name, make in EXTRAS.items() if name in wanted}
        self._backward_extras = [extra for name, extra in self._extras.items() if name not in FORWARD_ONLY]
        self._keeps_inputs = bool(self._extras.keys() - FORWARD_ONLY - OUTPUT_ONLY) or any(
            unit.cross is not None for unit in self._units
        )
        self._gradients: dict[str, tuple[Tensor, Tensor]] = {}
        self._call: Call | None = None
        """Whose gradients are arriving."""
        self._arrived: set[str] = set()
        self._batch: Batch | None = None
        self.listening = False
        """True in the forward pass only: a recomputation in the backward pass must not count twice."""

    def _unit(self, members: Sequence[Layer], wants_cross: bool, device: torch.device) -> _UnitSums:  # noqa: FBT001
        d_out = sum(layer.d_out for layer in members)
        side = smaller_side(self.group.d_in, d_out)
        size = self.group.d_in if side == "input" else d_out
        cross = CrossSum((self.group.d_in, size), device) if wants_cross else None
        return _UnitSums(tuple(members), side, VectorSum(size, device), SymmetricSum(size, device), cross)

    @property
    def wants_gradients(self) -> bool:
        """Whether a backward pass is needed."""
        return bool(self._units or self._backward_extras)

    def begin_batch(self, batch: Batch) -> None:
        """Get ready for a batch, and forget what an interrupted one may have left."""
        self._batch = batch
        self.text_tokens += batch.tokens
        self.sequences += batch.sequences
        self._call, self._arrived, self._gradients = None, set(), {}
        for unit in self._units:
            unit.waiting = {}

    def on_input(self, expert: Expert | None, _module: nn.Module, args: tuple[Tensor, ...]) -> None:
        """Forward pre-hook of the first layer of the group.

        Args:
            expert: whose layers these are, if it reads some of the tokens only.
            args: of the layer, the input first.
        """
        if not self.listening:
            return
        positions = None if expert is None else expert.positions
        x = self._rows(args[0].detach(), positions)
        if not len(x):  # an expert without tokens
            return
        self.tokens += x.shape[0]
        with torch.autocast(x.device.type, enabled=False):  # the model may multiply in bfloat16; moments never do
            self._input_vector.add(x)
            self._input_square.add(x)
            for name in FORWARD_ONLY & self._extras.keys():
                self._extras[name].add(x, {}, self._sequence_lengths(x.shape[0], positions))

    def call(self, expert: Expert | None, x: Tensor) -> Call:
        """What has to be known of a call of one of the layers when its gradient arrives."""
        return Call(x.detach() if self._keeps_inputs else None, None if expert is None else expert.positions)

    def on_gradient(self, layer: str, call: Call, of_input: Tensor, of_output: Tensor) -> None:
        """Gradients at one call of one layer of the group."""
        if not of_output.numel():  # an expert without tokens
            return
        if layer in self._arrived:  # of another call, before every member of the last one had its gradient
            self.finish_call()
        self._call = call
        self._arrived.add(layer)
        for unit in self._units:
            if any(member.name == layer for member in unit.layers):
                gradient = unit.offer(layer, self._rows(of_input if unit.side == "input" else of_output, call.positions))
                if gradient is not None:
                    unit.add(gradient, self._read(call))
        if self._backward_extras:
            self._gradients[layer] = self._rows(of_input, call.positions), self._rows(of_output, call.positions)
        if len(self._arrived) == len(self.group.layers):
            self.finish_call()

    def finish_call(self) -> None:
        """Add what has arrived of a call of the layers; members that the loss does not depend on never have a gradient."""
        if self._call is None:
            return
        x = self._read(self._call)
        for unit in self._units:
            if unit.waiting:
                unit.add(unit.complete(), x)
        if self._backward_extras:
            of_output = next(iter(self._gradients.values()))[1]
            lengths = self._sequence_lengths(len(of_output), self._call.positions)
            for extra in self._backward_extras:
                extra.add(torch.empty(0) if x is None else x, self._gradients, lengths)
        self._call, self._arrived, self._gradients = None, set(), {}

    def _read(self, call: Call) -> Tensor | None:
        return None if call.x is None else self._rows(call.x, call.positions)

    def _rows(self, tensor: Tensor, positions: Tensor | None) -> Tensor:
        """[…, d] → [tokens, d] in float32, without padding."""
        flat = tensor.flatten(0, -2)
        text = self._text(positions)
        if text is not None:
            if len(flat) != len(text):
                raise CorpusError(
                    f"`{self.group.name}` reads {len(flat)} of {len(text)} tokens, padding or not",
                    "measure it on sequences without padding",
                )
            flat = flat[text.to(flat.device)]
        return flat.float()

    def _text(self, positions: Tensor | None) -> Tensor | None:
        """Which of the tokens that the group reads are text, bool; ``None`` means all of them."""
        if self._batch is None or self._batch.mask is None:
            return None
        text = self._batch.mask.flatten().bool()
        return text if positions is None else text[positions]

    def _sequence_lengths(self, read: int, positions: Tensor | None) -> list[int]:
        """How many of the ``read`` tokens each sequence has; one piece where nobody knows."""
        batch, text = self._batch, self._text(positions)
        if batch is None or (positions is None and batch.tokens != read):
            return [read]
        if positions is None:
            return [batch.length] * batch.sequences if batch.mask is None else batch.mask.sum(1).tolist()
        positions = positions if text is None else positions[text]
        lengths: list[int] = torch.bincount(positions // batch.length, minlength=batch.sequences).tolist()
        return lengths

    def merge(self, other: "GroupCapture") -> None:
        """Add what another part of the text gave.

        Raises:
            StatisticsError: it is another group, or has other moments.
        """
        if (self.group, self.needs) != (other.group, other.needs):
            raise StatisticsError(f"`{self.group.name}` and `{other.group.name}` hold other moments", "merge like with like")
        self.tokens += other.tokens
        self.text_tokens += other.text_tokens
        self.sequences += other.sequences
        self._input_vector.merge(other._input_vector)
        self._input_square.merge(other._input_square)
        for unit, added in zip(self._units, other._units, strict=True):
            unit.merge(added)
        for name, extra in self._extras.items():
            extra.merge(other._extras[name])

    def reduce(self, processes: Processes) -> None:
        """Add what other processes gave, at the first of them: once, after the last batch, one sum after another."""
        if processes.count == 1:
            return
        counts = torch.tensor([self.tokens, self.text_tokens, self.sequences])
        self.tokens, self.text_tokens, self.sequences = processes.to_first(counts).tolist()
        self._input_vector.reduce(processes)
        self._input_square.reduce(processes)
        for unit in self._units:
            unit.reduce(processes)
        for extra in self._extras.values():
            extra.reduce(processes)

    def publish(self) -> GroupStatistics:
        """The moments, centred, in float32, on the processor: a device holds sums only while they are measured.

        Raises:
            NonFiniteError: a moment of a layer holds NaN or infinity.
        """
        mean = self._input_vector.mean(self.tokens)
        inputs = Covariance(mean.float().cpu(), self._input_square.covariance(mean, self.tokens).float().cpu())
        gradients = {}
        for unit in self._units:
            name = unit.layers[0].name if len(unit.layers) == 1 else self.group.name
            gradients[name] = unit.publish(self.tokens, mean)
            _require_finite(gradients[name].covariance, f"`{name}`: the covariance of the gradients")
        _require_finite(inputs, f"`{self.group.name}`: the covariance of the inputs")
        extras: dict[str, Tensor] = {}
        for extra in self._extras.values():
            extras |= {name: one.cpu() for name, one in extra.publish(self.tokens, self.sequences).items()}
        return GroupStatistics(self.group, self.tokens, self.text_tokens, inputs, gradients, extras, self.sequences)


def _require_finite(covariance: Covariance, where: str) -> None:
    if not bool(torch.isfinite(covariance.matrix.sum() + covariance.mean.sum())):  # a sum keeps NaN and infinity
        raise NonFiniteError(where, "load the model as --dtype float32, or check the text for degenerate sequences")
