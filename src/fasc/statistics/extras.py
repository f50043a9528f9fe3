"""Moments that only some methods and diagnostics ask for, beside covariances: streamed, nothing kept per token.

Axes: ``t`` tokens of a batch, ``i`` inputs, ``o`` outputs, ``m`` sketch.
"""

from collections.abc import Mapping, Sequence
from typing import Protocol

import torch
from torch import Tensor

from fasc.statistics.accumulators import SymmetricSum, VectorSum
from fasc.model.groups import InputGroup

_SUMS = ("count", "x_left", "x_right", "g_left", "g_right", "xx", "gg", "xg")

SKETCH = 48
"""Width of the sketches of a sequence's partial moments."""


class Extra(Protocol):
    """A running sum that is fed with a batch's inputs and gradients and gives named tensors."""

    def add(self, x: Tensor, gradients: Mapping[str, tuple[Tensor, Tensor]], lengths: Sequence[int]) -> None:
        """Add a batch: inputs [t, i], by layer (input gradient [t, i], output gradient [t, o]), tokens of each sequence."""

    def publish(self, tokens: int) -> dict[str, Tensor]:
        """The moments by name."""


class Magnitude:
    """``E|x_i|``: the scale of each input channel."""

    def __init__(self, group: InputGroup, device: torch.device) -> None:
        self._sum = VectorSum(group.d_in, device)

    def add(self, x: Tensor, gradients: Mapping[str, tuple[Tensor, Tensor]], lengths: Sequence[int]) -> None:
        """Only the inputs count."""
        del gradients, lengths
        self._sum.add(x.abs())

    def publish(self, tokens: int) -> dict[str, Tensor]:
        """``magnitude`` [i]."""
        return {"magnitude": self._sum.mean(tokens).float()}


class Product:
    """``E[(g⊙x)(g⊙x)ᵀ]``, not centred: what the paper's Grad-Weighted SVD decomposes."""

    def __init__(self, group: InputGroup, device: torch.device) -> None:
        self._size, self._device = group.d_in, device
        self._sum = SymmetricSum(group.d_in, device)

    def add(self, x: Tensor, gradients: Mapping[str, tuple[Tensor, Tensor]], lengths: Sequence[int]) -> None:
        """The members' input gradients add up."""
        del lengths
        self._sum.add(x * _input_gradient(gradients))

    def publish(self, tokens: int) -> dict[str, Tensor]:
        """``product`` [i, i]."""
        zero = torch.zeros(self._size, dtype=torch.float64, device=self._device)
        return {"product": self._sum.covariance(zero, tokens).float()}


class OutputScale:
    """``E[h_o²]``: how much the loss feels each output of each layer, not centred; the diagonal of ``Σ_hh`` and the squared mean.

    Rounding needs no more of the outputs, because errors of different rows are nearly independent.
    """

    def __init__(self, group: InputGroup, device: torch.device) -> None:
        self._sums = {layer.name: VectorSum(layer.d_out, device) for layer in group.layers}

    def add(self, x: Tensor, gradients: Mapping[str, tuple[Tensor, Tensor]], lengths: Sequence[int]) -> None:
        """Only the output gradients count."""
        del x, lengths
        for name, (_, h) in gradients.items():
            self._sums[name].add(h.square())

    def publish(self, tokens: int) -> dict[str, Tensor]:
        """``output_scale/<layer>`` [o], nats² per token."""
        return {f"output_scale/{name}": total.mean(tokens).float() for name, total in self._sums.items()}


class WeightFisherRows:
    """``E_s[Σ_i (∂L_s/∂W_oi)²]`` over sequences: the row sums of the diagonal Fisher of the weights (FWSVD)."""

    def __init__(self, group: InputGroup, device: torch.device) -> None:
        self._sums = {layer.name: torch.zeros(layer.d_out, dtype=torch.float64, device=device) for layer in group.layers}
        self._sequences = 0

    def add(self, x: Tensor, gradients: Mapping[str, tuple[Tensor, Tensor]], lengths: Sequence[int]) -> None:
        """The weight gradient of each sequence is formed and squared."""
        self._sequences += len(lengths)
        for name, (_, h) in gradients.items():
            for x_si, h_so in zip(x.split(list(lengths)), h.split(list(lengths)), strict=True):
                self._sums[name] += (h_so.mT @ x_si).square().sum(1)

    def publish(self, tokens: int) -> dict[str, Tensor]:
        """``rows/<layer>`` [o]."""
        del tokens
        return {f"rows/{name}": (total / max(1, self._sequences)).float() for name, total in self._sums.items()}


class Taylor:
    """``E_s |Σ_t x_ti g_ti|`` over sequences: what removing an input changes in the loss, to first order (LLM-Pruner)."""

    def __init__(self, group: InputGroup, device: torch.device) -> None:
        self._sum = torch.zeros(group.d_in, dtype=torch.float64, device=device)
        self._sequences = 0

    def add(self, x: Tensor, gradients: Mapping[str, tuple[Tensor, Tensor]], lengths: Sequence[int]) -> None:
        """Each sequence apart, before the absolute value."""
        self._sequences += len(lengths)
        for part in (x * _input_gradient(gradients)).split(list(lengths)):
            self._sum += part.sum(0).abs()

    def publish(self, tokens: int) -> dict[str, Tensor]:
        """``taylor`` [i], nats per sequence."""
        del tokens
        return {"taylor": (self._sum / max(1, self._sequences)).float()}


class SequenceSketches:
    """Sums of each sequence's ``x xᵀ``, ``g gᵀ``, ``x gᵀ``, ``x`` and ``g`` seen through two random maps to ``m`` dimensions.

    Sums over any sample of the sequences can be formed from them, which is what a bootstrap needs. ``E‖ΩᵀAΩ'‖² = ‖A‖²`` for maps
    with independent entries of variance 1/m. Takes ``4 (3 m² + 4 m)`` bytes per sequence and group: 28 kB at m = 48.
    """

    def __init__(self, group: InputGroup, device: torch.device) -> None:
        generator = torch.Generator().manual_seed(0)
        maps = torch.randn(2, group.d_in, SKETCH, generator=generator) / SKETCH**0.5
        self._maps = maps.to(device)
        self._parts: dict[str, list[Tensor]] = {name: [] for name in _SUMS}

    def add(self, x: Tensor, gradients: Mapping[str, tuple[Tensor, Tensor]], lengths: Sequence[int]) -> None:
        """Each sequence apart."""
        left, right = self._maps
        g = _input_gradient(gradients)
        sides = [side.split(list(lengths)) for side in (x @ left, x @ right, g @ left, g @ right)]
        for x_left, x_right, g_left, g_right in zip(*sides, strict=True):
            found = {
                "count": torch.tensor(float(len(x_left))),
                "x_left": x_left.sum(0),
                "x_right": x_right.sum(0),
                "g_left": g_left.sum(0),
                "g_right": g_right.sum(0),
                "xx": x_left.mT @ x_right,
                "gg": g_left.mT @ g_right,
                "xg": x_left.mT @ g_right,
            }
            for name, value in found.items():
                self._parts[name].append(value.cpu())

    def publish(self, tokens: int) -> dict[str, Tensor]:
        """``sequences/…``, the first axis over sequences."""
        del tokens
        return {f"sequences/{name}": torch.stack(parts) for name, parts in self._parts.items() if parts}


def _input_gradient(gradients: Mapping[str, tuple[Tensor, Tensor]]) -> Tensor:
    first, *others = (g for g, _ in gradients.values())
    return sum(others, start=first)


EXTRAS: Mapping[
    str, type[Magnitude] | type[OutputScale] | type[Product] | type[WeightFisherRows] | type[Taylor] | type[SequenceSketches]
] = {
    "magnitude": Magnitude,
    "output_scale": OutputScale,
    "product": Product,
    "rows": WeightFisherRows,
    "taylor": Taylor,
    "sequences": SequenceSketches,
}
"""By moment."""

FORWARD_ONLY = frozenset({"magnitude"})
"""Extras that need no backward pass."""
