"""Inputs and output gradients of the layers, for the length of a ``with``.

One :class:`GroupCapture` per group listens to its layers and feeds its accumulators. It keeps at most one tensor per layer
between the forward and the backward pass, and nothing per token after that.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor, nn

from fasc.statistics.extras import EXTRAS, FORWARD_ONLY, Extra
from fasc.statistics.moments import GradientMoment, GroupStatistics, Need, Scope, smaller_side
from fasc.errors import CorpusError, NonFiniteError
from fasc.statistics.accumulators import Covariance, CrossSum, SymmetricSum, VectorSum
from fasc.model.groups import InputGroup


@dataclass
class _UnitSums:
    """Running sums of one unit's gradients."""

    layers: tuple[str, ...]
    side: str
    vector: VectorSum
    square: SymmetricSum
    cross: CrossSum | None
    waiting: dict[str, Tensor] = field(default_factory=dict)
    """Gradients of the members that have arrived in this backward pass, until all have."""

    def offer(self, layer: str, gradient: Tensor) -> Tensor | None:
        """Take one member's gradient, on this unit's side; return the unit's own when all have arrived."""
        self.waiting[layer] = gradient
        if len(self.waiting) < len(self.layers):
            return None
        parts = [self.waiting[name] for name in self.layers]
        self.waiting = {}
        return sum(parts[1:], start=parts[0]) if self.side == "input" else torch.cat(parts, dim=-1)

    def add(self, gradient: Tensor, x: Tensor | None) -> None:
        """Add a complete gradient [t, d], and its input where a cross moment is wanted."""
        self.vector.add(gradient)
        self.square.add(gradient)
        if self.cross is not None and x is not None:
            self.cross.add(x, gradient)

    def publish(self, tokens: int, mean_x: Tensor) -> GradientMoment:
        mean = self.vector.mean(tokens)
        covariance = Covariance(mean.float(), self.square.covariance(mean, tokens).float())
        cross = None if self.cross is None else self.cross.covariance((mean_x, mean), tokens).float()
        return GradientMoment("input" if self.side == "input" else "output", covariance, cross)


class GroupCapture:
    """Accumulators of one group, fed by hooks."""

    def __init__(self, group: InputGroup, needs: frozenset[Need], device: torch.device) -> None:
        self.group = group
        self.tokens = 0
        self._input_vector = VectorSum(group.d_in, device)
        self._input_square = SymmetricSum(group.d_in, device)
        self._units = [self._unit(layers, Need("cross", scope) in needs, device) for scope, layers in units_of(group, needs)]
        wanted = {need.moment for need in needs}
        self._extras: dict[str, Extra] = {name: make(group, device) for name, make in EXTRAS.items() if name in wanted}
        self._backward_extras = [extra for name, extra in self._extras.items() if name not in FORWARD_ONLY]
        self._keeps_inputs = bool(self._backward_extras) or any(unit.cross is not None for unit in self._units)
        self._gradients: dict[str, tuple[Tensor, Tensor]] = {}
        self._lengths: list[int] = []
        self._inputs: list[Tensor] = []
        self._arrived = 0
        self.mask: Tensor | None = None
        """1 where there is text, [batch, length], of the batch in hand; ``None`` means everywhere."""
        self.listening = False
        """True in the forward pass only: a recomputation in the backward pass must not count twice."""

    def _unit(self, members: Sequence[str], wants_cross: bool, device: torch.device) -> _UnitSums:  # noqa: FBT001
        d_out = sum(layer.d_out for layer in self.group.layers if layer.name in members)
        side = smaller_side(self.group.d_in, d_out)
        size = self.group.d_in if side == "input" else d_out
        cross = CrossSum((self.group.d_in, size), device) if wants_cross else None
        return _UnitSums(tuple(members), side, VectorSum(size, device), SymmetricSum(size, device), cross)

    @property
    def wants_gradients(self) -> bool:
        """Whether a backward pass is needed."""
        return bool(self._units or self._backward_extras)

    def on_input(self, _module: nn.Module, args: tuple[Tensor, ...]) -> None:
        """Forward pre-hook of the first layer of the group."""
        if not self.listening:
            return
        x = self._rows(args[0].detach())
        if not len(x):  # an expert without tokens
            return
        self.tokens += x.shape[0]
        length = args[0].shape[-2]
        self._lengths = self.mask.sum(1).tolist() if self.mask is not None else [length] * (x.shape[0] // length)
        with torch.autocast(x.device.type, enabled=False):  # the model may multiply in bfloat16; moments never do
            self._input_vector.add(x)
            self._input_square.add(x)
            for name in FORWARD_ONLY & self._extras.keys():
                self._extras[name].add(x, {}, self._lengths)
        if self._keeps_inputs:
            self._inputs.append(x)

    def on_gradient(self, layer: str, of_input: Tensor, of_output: Tensor) -> None:
        """Gradients at one call of one layer of the group."""
        for unit in self._units:
            if layer in unit.layers:
                gradient = unit.offer(layer, self._rows(of_input if unit.side == "input" else of_output))
                if gradient is not None:
                    unit.add(gradient, self._inputs[-1] if self._keeps_inputs else None)
        if self._backward_extras:
            self._gradients[layer] = self._rows(of_input), self._rows(of_output)
        self._arrived += 1
        if self._arrived == len(self.group.layers):
            self._arrived = 0
            for extra in self._backward_extras:
                extra.add(self._inputs[-1], self._gradients, self._lengths)
            self._gradients = {}
            if self._keeps_inputs:
                self._inputs.pop()

    def _rows(self, tensor: Tensor) -> Tensor:
        """[…, d] → [tokens, d] in float32, without padding."""
        flat = tensor.flatten(0, -2)
        if self.mask is not None:
            if len(flat) != self.mask.numel():
                raise CorpusError(
                    f"`{self.group.name}` reads {len(flat)} of {self.mask.numel()} tokens, padding or not",
                    "measure experts on sequences without padding",
                )
            flat = flat[self.mask.flatten().bool()]
        return flat.float()

    def begin_batch(self, mask: Tensor | None) -> None:
        """Forget what an interrupted batch may have left."""
        self.mask, self._inputs, self._arrived, self._gradients = mask, [], 0, {}
        for unit in self._units:
            unit.waiting = {}

    def publish(self) -> GroupStatistics:
        """The moments, centred, in float32.

        Raises:
            NonFiniteError: a moment of a layer holds NaN or infinity.
        """
        mean = self._input_vector.mean(self.tokens)
        inputs = Covariance(mean.float(), self._input_square.covariance(mean, self.tokens).float())
        gradients = {}
        for unit in self._units:
            name = unit.layers[0] if len(unit.layers) == 1 else self.group.name
            gradients[name] = unit.publish(self.tokens, mean)
            _require_finite(gradients[name].covariance, f"`{name}`: the covariance of the gradients")
        _require_finite(inputs, f"`{self.group.name}`: the covariance of the inputs")
        extras: dict[str, Tensor] = {}
        for extra in self._extras.values():
            extras |= extra.publish(self.tokens)
        return GroupStatistics(self.group, self.tokens, inputs, gradients, extras)


def units_of(group: InputGroup, needs: frozenset[Need]) -> Iterator[tuple[Scope, tuple[str, ...]]]:
    """The units whose gradients are wanted: the whole group, or each layer; the same thing in a group of one."""
    names = tuple(layer.name for layer in group.layers)
    wanted = {need.scope for need in needs if need.moment in ("gradient", "cross")}
    if "group" in wanted or ("layer" in wanted and len(names) == 1):
        yield "group", names
    if "layer" in wanted and len(names) > 1:
        for name in names:
            yield "layer", (name,)


def _require_finite(covariance: Covariance, where: str) -> None:
    if not bool(torch.isfinite(covariance.matrix.sum() + covariance.mean.sum())):  # a sum keeps NaN and infinity
        raise NonFiniteError(where, "load the model as --dtype float32, or check the text for degenerate sequences")


@contextmanager
def capturing(model: nn.Module, captures: Sequence[GroupCapture]) -> Iterator[None]:
    """Let every group listen while the context is open; only our own hooks are removed, also when the body raises."""
    with ExitStack() as stack:
        for capture in captures:
            first = model.get_submodule(capture.group.layers[0].name)
            stack.callback(first.register_forward_pre_hook(capture.on_input).remove)
            if capture.wants_gradients:
                for layer in capture.group.layers:
                    module = model.get_submodule(layer.name)
                    for remove in _on_gradients(module, partial(capture.on_gradient, layer.name)):
                        stack.callback(remove)
        yield


def _on_gradients(module: nn.Module, tell: Callable[[Tensor, Tensor], None]) -> list[Callable[[], None]]:
    """Call ``tell(∂L/∂input, ∂L/∂output)`` in the backward pass of every call of a module; returns what ends that.

    Hooks of tensors, not torch's backward hook of a module: that one hands out a view which nobody may change in place, and a
    block may add its attention to what the module returned (Falcon).
    """
    calls: list[list[Tensor] | None] = []

    def enter(_module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...] | None:
        if not (args[0].requires_grad and torch.is_grad_enabled()):
            calls.append(None)
            return None
        own = args[0].view_as(args[0])  # its gradient is that of this reader alone
        of_output: list[Tensor] = []
        calls.append(of_output)
        own.register_hook(lambda of_input: tell(of_input, of_output.pop()))
        return (own, *args[1:])

    def leave(_module: nn.Module, _args: tuple[Tensor, ...], output: Tensor) -> None:
        of_output = calls.pop()
        if of_output is not None:
            output.register_hook(of_output.append)

    return [module.register_forward_pre_hook(enter).remove, module.register_forward_hook(leave).remove]
