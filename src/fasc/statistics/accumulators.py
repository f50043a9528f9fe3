"""Streamed sums and the means and covariances that they give: nothing is kept per token.

Sums of parts of a text add up to those of the whole (``merge``), and so do the published means and covariances, weighted by what
each is a mean over.

Axes: ``t`` tokens, ``i`` and ``o`` features.
"""

from dataclasses import dataclass
from itertools import pairwise

import torch
from jaxtyping import Float
from torch import Tensor

from fasc.processes import Processes

FLUSH_TOKENS = 32_768
"""Tokens summed in float32 before the sum moves into a float64 total: the relative rounding error of the sum stays
below 1e-6, a thousand times under the sampling error."""

_PANEL = 384
"""Columns per panel of a symmetric product; only panels on and above the diagonal are computed."""


Weights = tuple[float, float]
"""Shares of two parts in their union; they sum to 1."""


def weights_of(one: int, other: int) -> Weights:
    """Shares of two counts in their sum."""
    return one / (one + other), other / (one + other)


def merged_mean(one: Tensor, other: Tensor, weights: Weights) -> Tensor:
    """The mean over both parts, in the first one's precision and on its device."""
    return (weights[0] * one.double() + weights[1] * other.to(one.device).double()).to(one.dtype)


def merged_cross(one: Tensor, other: Tensor, steps: tuple[Tensor, Tensor], weights: Weights) -> Tensor:
    """The centred cross moment over both parts: ``Σ_k w_k C_k + w_1 w_2 Δμ_x Δμ_hᵀ``.

    Args:
        one: ``C_1`` [i, o], of the first part.
        other: ``C_2`` [i, o].
        steps: ``Δμ_x`` [i] and ``Δμ_h`` [o], float64: how far the means of the parts are apart.
        weights: of the parts.
    """
    both = one.double().mul_(weights[0]).add_(other.to(one.device).double(), alpha=weights[1])
    return both.addr_(*steps, alpha=weights[0] * weights[1]).to(one.dtype)


def mean_step(one: Tensor, other: Tensor) -> Tensor:
    """``μ_2 − μ_1`` in float64, on the first one's device."""
    return other.to(one.device).double() - one.double()


@dataclass(frozen=True, slots=True)
class Covariance:
    """Mean and centred second moment of one random vector."""

    mean: Float[Tensor, " d"]
    """``E[x]``, float32."""

    matrix: Float[Tensor, "d d"]
    """``E[(x−μ)(x−μ)ᵀ]``, float32, averaged over tokens, padding excluded."""

    def merge(self, other: "Covariance", weights: Weights) -> "Covariance":
        """Mean and covariance over both parts, formed in float64."""
        step = mean_step(self.mean, other.mean)
        matrix = merged_cross(self.matrix, other.matrix, (step, step), weights)
        return Covariance(merged_mean(self.mean, other.mean, weights), matrix)


class _Total:
    """A float32 sum on the device that spills into a float64 total when many tokens have been added."""

    def __init__(self, shape: tuple[int, ...], device: torch.device) -> None:
        self.recent = torch.zeros(shape, dtype=torch.float32, device=device)
        self.total: Tensor | None = None
        self._tokens = 0

    def count(self, tokens: int) -> None:
        self._tokens += tokens
        if self._tokens >= FLUSH_TOKENS:
            self.total = self.value()
            self.recent.zero_()
            self._tokens = 0

    def value(self) -> Tensor:
        """The sum in float64, a tensor of its own."""
        return self.recent.double() if self.total is None else self.total + self.recent

    def settled(self) -> Tensor:
        """The sum in float64, which is all of it from now on."""
        self.total = self.value()
        self.recent.zero_()
        self._tokens = 0
        return self.total

    def merge(self, other: "_Total") -> None:
        """Take over another sum."""
        self.settled().add_(other.value().to(self.recent.device))

    def reduce(self, processes: Processes) -> None:
        """Add what other processes gave, at the first of them."""
        self.total = processes.to_first(self.settled())


class VectorSum:
    """Private running sum of a vector over tokens."""

    def __init__(self, size: int, device: torch.device) -> None:
        self._total = _Total((size,), device)

    def add(self, x_ti: Float[Tensor, "t i"]) -> None:
        """Add every row."""
        self._total.recent += x_ti.sum(0, dtype=torch.float32)
        self._total.count(x_ti.shape[0])

    def merge(self, other: "VectorSum") -> None:
        """Add what another part of the text gave."""
        self._total.merge(other._total)

    def reduce(self, processes: Processes) -> None:
        """Add what other processes gave, at the first of them."""
        self._total.reduce(processes)

    def mean(self, tokens: int) -> Float[Tensor, " i"]:
        """``Σ x / tokens`` in float64."""
        return self._total.value() / tokens


class SymmetricSum:
    """Private running sum of ``x xᵀ``; only panels on and above the diagonal are formed (BLAS has no syrk in torch)."""

    def __init__(self, size: int, device: torch.device) -> None:
        self._total = _Total((size, size), device)
        panels = max(1, round(size / _PANEL))
        edges = [round(size * p / panels) for p in range(panels + 1)]
        self._panels = list(pairwise(edges))

    def add(self, x_ti: Float[Tensor, "t i"]) -> None:
        """Add ``Σ_t x_t x_tᵀ``."""
        for start, stop in self._panels:
            self._total.recent[start:stop, start:].addmm_(x_ti[:, start:stop].mT, x_ti[:, start:])
        self._total.count(x_ti.shape[0])

    def merge(self, other: "SymmetricSum") -> None:
        """Add what another part of the text gave."""
        self._total.merge(other._total)

    def reduce(self, processes: Processes) -> None:
        """Add what other processes gave, at the first of them; only what is formed is sent, a panel at a time."""
        total = self._total.settled()
        for start, stop in self._panels:
            total[start:stop, start:] = processes.to_first(total[start:stop, start:])

    def covariance(self, mean: Float[Tensor, " i"], tokens: int) -> Float[Tensor, "i i"]:
        """``Σ x xᵀ / tokens − μ μᵀ`` in float64, both triangles filled."""
        matrix = self._total.value().div_(tokens).addr_(mean, mean, alpha=-1)
        for start, stop in self._panels:
            matrix[stop:, start:stop] = matrix[start:stop, stop:].mT
        return matrix


class CrossSum:
    """Private running sum of ``x hᵀ``."""

    def __init__(self, shape: tuple[int, int], device: torch.device) -> None:
        self._total = _Total(shape, device)

    def add(self, x_ti: Float[Tensor, "t i"], h_to: Float[Tensor, "t o"]) -> None:
        """Add ``Σ_t x_t h_tᵀ``."""
        self._total.recent.addmm_(x_ti.mT, h_to)
        self._total.count(x_ti.shape[0])

    def merge(self, other: "CrossSum") -> None:
        """Add what another part of the text gave."""
        self._total.merge(other._total)

    def reduce(self, processes: Processes) -> None:
        """Add what other processes gave, at the first of them."""
        self._total.reduce(processes)

    def covariance(self, means: tuple[Float[Tensor, " i"], Float[Tensor, " o"]], tokens: int) -> Float[Tensor, "i o"]:
        """``Σ x hᵀ / tokens − μ_x μ_hᵀ`` in float64."""
        return (self._total.value() / tokens).addr_(*means, alpha=-1)
