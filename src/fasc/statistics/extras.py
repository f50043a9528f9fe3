"""Moments that only some methods and diagnostics ask for, beside covariances: streamed, nothing kept per token.

Axes: ``t`` tokens of a batch, ``i`` inputs, ``o`` outputs, ``m`` sketch.
"""

from collections.abc import Mapping, Sequence
from typing import ClassVar, Literal, Protocol, Self

import torch
from torch import Tensor

from fasc.model.groups import InputGroup
from fasc.processes import Processes
from fasc.statistics.accumulators import SymmetricSum, VectorSum, Weights, merged_mean

_SUMS = ("count", "x_left", "x_right", "g_left", "g_right", "xx", "gg", "xg")

SKETCH = 48
"""Width of the sketches of a sequence's partial moments."""

MeanOver = Literal["tokens", "sequences", "none"]


class Extra(Protocol):
    """A running sum that is fed with a batch's inputs and gradients and gives named tensors.

    Names begin with that of the moment, up to a slash.
    """

    mean_over: ClassVar[MeanOver]
    """What the published tensors are means over; ``none``: their first axis is over sequences."""

    def __init__(self, group: InputGroup, device: torch.device) -> None: ...

    def add(self, x: Tensor, gradients: Mapping[str, tuple[Tensor, Tensor]], lengths: Sequence[int]) -> None:
        """Add a batch: inputs [t, i], by layer (input gradient [t, i], output gradient [t, o]), tokens of each sequence."""

    def merge(self, other: Self) -> None:
        """Add what another part of the text gave."""

    def reduce(self, processes: Processes) -> None:
        """Add what other processes gave, at the first of them."""

    def publish(self, tokens: int, sequences: int) -> dict[str, Tensor]:
        """The moments by name, as means over so many tokens or sequences."""

    @staticmethod
    def shapes(group: InputGroup) -> dict[str, tuple[int | None, ...]]:
        """What is published for a group; ``None`` is the number of sequences."""


class Magnitude:
    """``E|x_i|``: the scale of each input channel."""

    mean_over: ClassVar[MeanOver] = "tokens"

    def __init__(self, group: InputGroup, device: torch.device) -> None:
        self._sum = VectorSum(group.d_in, device)

    def add(self, x: Tensor, gradients: Mapping[str, tuple[Tensor, Tensor]], lengths: Sequence[int]) -> None:
        """Only the inputs count."""
        del gradients, lengths
        self._sum.add(x.abs())

    def merge(self, other: Self) -> None:
        """Sums over tokens add up."""
        self._sum.merge(other._sum)

    def reduce(self, processes: Processes) -> None:
        """Sums over tokens add up."""
        self._sum.reduce(processes)

    def publish(self, tokens: int, sequences: int) -> dict[str, Tensor]:
        """``magnitude`` [i]."""
        del sequences
        return {"magnitude": self._sum.mean(tokens).float()}

    @staticmethod
    def shapes(group: InputGroup) -> dict[str, tuple[int | None, ...]]:
        """``magnitude`` [i]."""
        return {"magnitude": (group.d_in,)}


class Product:
    """``E[(g⊙x)(g⊙x)ᵀ]``, not centred: what the paper's Grad-Weighted SVD decomposes."""

    mean_over: ClassVar[MeanOver] = "tokens"

    def __init__(self, group: InputGroup, device: torch.device) -> None:
        self._size, self._device = group.d_in, device
        self._sum = SymmetricSum(group.d_in, device)

    def add(self, x: Tensor, gradients: Mapping[str, tuple[Tensor, Tensor]], lengths: Sequence[int]) -> None:
        """The members' input gradients add up."""
        del lengths
        self._sum.add(x * _input_gradient(gradients))

    def merge(self, other: Self) -> None:
        """Sums over tokens add up."""
        self._sum.merge(other._sum)

    def reduce(self, processes: Processes) -> None:
        """Sums over tokens add up."""
        self._sum.reduce(processes)

    def publish(self, tokens: int, sequences: int) -> dict[str, Tensor]:
        """``product`` [i, i]."""
        del sequences
        zero = torch.zeros(self._size, dtype=torch.float64, device=self._device)
        return {"product": self._sum.covariance(zero, tokens).float()}

    @staticmethod
    def shapes(group: InputGroup) -> dict[str, tuple[int | None, ...]]:
        """``product`` [i, i]."""
        return {"product": (group.d_in, group.d_in)}


class OutputScale:
    """``E[h_o²]``: how much the loss feels each output of each layer, not centred; the diagonal of ``Σ_hh`` and the squared mean.

    Rounding needs no more of the outputs, because errors of different rows are nearly independent.
    """

    mean_over: ClassVar[MeanOver] = "tokens"

    def __init__(self, group: InputGroup, device: torch.device) -> None:
        self._sums = {layer.name: VectorSum(layer.d_out, device) for layer in group.layers}

    def add(self, x: Tensor, gradients: Mapping[str, tuple[Tensor, Tensor]], lengths: Sequence[int]) -> None:
        """Only the output gradients count."""
        del x, lengths
        for name, (_, h) in gradients.items():
            self._sums[name].add(h.square())

    def merge(self, other: Self) -> None:
        """Sums over tokens add up."""
        for name, total in self._sums.items():
            total.merge(other._sums[name])

    def reduce(self, processes: Processes) -> None:
        """Sums over tokens add up."""
        for total in self._sums.values():
            total.reduce(processes)

    def publish(self, tokens: int, sequences: int) -> dict[str, Tensor]:
        """``output_scale/<layer>`` [o], nats² per token."""
        del sequences
        return {f"output_scale/{name}": total.mean(tokens).float() for name, total in self._sums.items()}

    @staticmethod
    def shapes(group: InputGroup) -> dict[str, tuple[int | None, ...]]:
        """``output_scale/<layer>`` [o]."""
        return {f"output_scale/{layer.name}": (layer.d_out,) for layer in group.layers}


class WeightFisherRows:
    """``E_s[Σ_i (∂L_s/∂W_oi)²]`` over sequences: the row sums of the diagonal Fisher of the weights (FWSVD)."""

    mean_over: ClassVar[MeanOver] = "sequences"

    def __init__(self, group: InputGroup, device: torch.device) -> None:
        self._sums = {layer.name: torch.zeros(layer.d_out, dtype=torch.float64, device=device) for layer in group.layers}

    def add(self, x: Tensor, gradients: Mapping[str, tuple[Tensor, Tensor]], lengths: Sequence[int]) -> None:
        """The weight gradient of each sequence is formed and squared."""
        for name, (_, h) in gradients.items():
            for x_si, h_so in zip(x.split(list(lengths)), h.split(list(lengths)), strict=True):
                self._sums[name] += (h_so.mT @ x_si).square().sum(1)

    def merge(self, other: Self) -> None:
        """Sums over sequences add up."""
        for name, total in self._sums.items():
            total += other._sums[name].to(total.device)

    def reduce(self, processes: Processes) -> None:
        """Sums over sequences add up."""
        self._sums = {name: processes.to_first(total) for name, total in self._sums.items()}

    def publish(self, tokens: int, sequences: int) -> dict[str, Tensor]:
        """``rows/<layer>`` [o]."""
        del tokens
        return {f"rows/{name}": (total / sequences).float() for name, total in self._sums.items()}

    @staticmethod
    def shapes(group: InputGroup) -> dict[str, tuple[int | None, ...]]:
        """``rows/<layer>`` [o]."""
        return {f"rows/{layer.name}": (layer.d_out,) for layer in group.layers}


class Taylor:
    """``E_s |Σ_t x_ti g_ti|`` over sequences: what removing an input changes in the loss, to first order (LLM-Pruner)."""

    mean_over: ClassVar[MeanOver] = "sequences"

    def __init__(self, group: InputGroup, device: torch.device) -> None:
        self._sum = torch.zeros(group.d_in, dtype=torch.float64, device=device)

    def add(self, x: Tensor, gradients: Mapping[str, tuple[Tensor, Tensor]], lengths: Sequence[int]) -> None:
        """Each sequence apart, before the absolute value."""
        for part in (x * _input_gradient(gradients)).split(list(lengths)):
            self._sum += part.sum(0).abs()

    def merge(self, other: Self) -> None:
        """Sums over sequences add up."""
        self._sum += other._sum.to(self._sum.device)

    def reduce(self, processes: Processes) -> None:
        """Sums over sequences add up."""
        self._sum = processes.to_first(self._sum)

    def publish(self, tokens: int, sequences: int) -> dict[str, Tensor]:
        """``taylor`` [i], nats per sequence."""
        del tokens
        return {"taylor": (self._sum / sequences).float()}

    @staticmethod
    def shapes(group: InputGroup) -> dict[str, tuple[int | None, ...]]:
        """``taylor`` [i]."""
        return {"taylor": (group.d_in,)}


class SequenceSketches:
    """Sums of each sequence's ``x xᵀ``, ``g gᵀ``, ``x gᵀ``, ``x`` and ``g`` seen through two random maps to ``m`` dimensions.

    Sums over any sample of the sequences can be formed from them, which is what a bootstrap needs. ``E‖ΩᵀAΩ'‖² = ‖A‖²`` for maps
    with independent entries of variance 1/m. Takes ``4 (3 m² + 4 m)`` bytes per sequence and group: 28 kB at m = 48. A sequence
    of which an expert got no token has none.
    """

    mean_over: ClassVar[MeanOver] = "none"

    def __init__(self, group: InputGroup, device: torch.device) -> None:
        generator = torch.Generator().manual_seed(0)
        maps = torch.randn(2, group.d_in, SKETCH, generator=generator) / SKETCH**0.5
        self._maps = maps.to(device)
        self._parts: dict[str, list[Tensor]] = {name: [] for name in _SUMS}

    def add(self, x: Tensor, gradients: Mapping[str, tuple[Tensor, Tensor]], lengths: Sequence[int]) -> None:
        """Each sequence apart."""
        left, right = self._maps
        g = _input_gradient(gradients)
        present = [length for length in lengths if length]
        sides = [side.split(present) for side in (x @ left, x @ right, g @ left, g @ right)]
        for x_left, x_right, g_left, g_right in zip(*sides, strict=True):
            sums = {
                "count": torch.tensor(float(len(x_left))),
                "x_left": x_left.sum(0),
                "x_right": x_right.sum(0),
                "g_left": g_left.sum(0),
                "g_right": g_right.sum(0),
                "xx": x_left.mT @ x_right,
                "gg": g_left.mT @ g_right,
                "xg": x_left.mT @ g_right,
            }
            for name, value in sums.items():
                self._parts[name].append(value.cpu())

    def merge(self, other: Self) -> None:
        """The other part's sequences follow."""
        for name, parts in self._parts.items():
            parts += other._parts[name]

    def reduce(self, processes: Processes) -> None:
        """The sequences of all processes, in their order."""
        for name, parts in self._parts.items():
            own = torch.stack(parts) if parts else torch.empty(0, *_sketch_shape(name))
            self._parts[name] = list(processes.gathered(own))

    def publish(self, tokens: int, sequences: int) -> dict[str, Tensor]:
        """``sequences/…``, the first axis over sequences."""
        del tokens, sequences
        return {f"sequences/{name}": torch.stack(parts) for name, parts in self._parts.items() if parts}

    @staticmethod
    def shapes(group: InputGroup) -> dict[str, tuple[int | None, ...]]:
        """Vectors and matrices of the sketches' width, one of each for a sequence."""
        del group
        return {f"sequences/{name}": (None, *_sketch_shape(name)) for name in _SUMS}


def _sketch_shape(name: str) -> tuple[int, ...]:
    """Of one sequence's."""
    return () if name == "count" else (SKETCH,) if name.endswith(("left", "right")) else (SKETCH, SKETCH)


def _input_gradient(gradients: Mapping[str, tuple[Tensor, Tensor]]) -> Tensor:
    first, *others = (g for g, _ in gradients.values())
    return sum(others, start=first)


EXTRAS: Mapping[str, type[Extra]] = {
    "magnitude": Magnitude,
    "output_scale": OutputScale,
    "product": Product,
    "rows": WeightFisherRows,
    "taylor": Taylor,
    "sequences": SequenceSketches,
}
"""By moment."""

OUTPUT_ONLY = frozenset({"output_scale"})
"""Extras that look at no input, which then need not be kept until the backward pass."""

FORWARD_ONLY = frozenset({"magnitude"})
"""Extras that need no backward pass."""


def merged_extras(
    one: Mapping[str, Tensor], other: Mapping[str, Tensor], tokens: Weights, sequences: Weights
) -> dict[str, Tensor]:
    """Published extras of two parts of a text as those of the whole.

    Args:
        one: of the first part, by name.
        other: of the second part. A name that one part lacks is 0 there, as for an expert that was idle.
        tokens: shares of the parts in the tokens of the group.
        sequences: shares in the sequences of the text.
    """
    merged = {}
    for name in {**one, **other}:
        mean_over = EXTRAS[name.partition("/")[0]].mean_over
        pair = [part[name] for part in (one, other) if name in part]
        if mean_over == "none":
            merged[name] = torch.cat(pair)
        else:
            first, second = (part.get(name, torch.zeros_like(pair[0])) for part in (one, other))
            merged[name] = merged_mean(first, second, tokens if mean_over == "tokens" else sequences)
    return merged
