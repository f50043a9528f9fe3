"""Weights rounded to a grid of few bits, with the error of each input fed back to those that are not rounded yet (GPTQ).

A row ``w`` of a weight read by inputs of second moment ``Σ`` loses ``(w−w')ᵀ Σ (w−w')`` when it becomes ``w'``. Rows do not
interact. With ``Σ⁻¹ = UᵀU``, ``U`` upper triangular, inputs are rounded one after the other; the error of input ``i`` divided by
``U_ii`` is spread over the later ones along row ``i`` of ``U``, which is the least-squares refit of what is not rounded yet
(arXiv:2210.17323). The loss is then exactly ``Σ_i (error_i / U_ii)²``: ``1/U_ii²`` is the variance of input ``i`` given the later
ones.

Axes: ``o`` outputs, ``i`` inputs, ``g`` groups of neighbouring inputs that have one scale and one zero.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int, UInt8
from torch import Tensor

from fasc.linalg.psd import cholesky, damped

_PANEL = 128
"""Inputs that are rounded between two updates of the whole weight."""

_SHRINKS = (1.0, 0.95, 0.9, 0.85, 0.8, 0.72, 0.64)
"""Shares of the range of a group that a grid may cover; what lies outside is cut off."""

_FEW_BITS = 5
"""Below it a much narrower grid and refitted scales are worth looking for: they gain 2 to 7 %, above it less than 2."""

_TINY = 6.2e-5
"""The least scale: the smallest normal number of float16."""


@dataclass(frozen=True, slots=True)
class Grid:
    """The values that a weight may take: ``scale · (code − zero)``, codes from 0 to ``2^bits − 1``."""

    scales: Float[Tensor, "o g"]
    """Positive, each a number of float16."""

    zeros: Float[Tensor, "o g"]
    """Whole numbers, codes themselves."""

    bits: int
    group: int
    """Inputs that share a scale; the last group has what is left."""

    def at(self, inputs: int | Tensor) -> tuple[Tensor, Tensor]:
        """Scales and zeros of some inputs."""
        place = inputs // self.group
        return self.scales[:, place], self.zeros[:, place]

    def codes(self, weight: Float[Tensor, "*n"], scales: Float[Tensor, "*n"], zeros: Float[Tensor, "*n"]) -> Float[Tensor, "*n"]:
        """The nearest codes of weights with these scales and zeros, whole numbers."""
        return (weight / scales + zeros).round_().clamp_(0, 2**self.bits - 1)


@dataclass(frozen=True, slots=True)
class Rounded:
    """A weight on a grid."""

    codes: UInt8[Tensor, "o i"]
    """uint8."""

    grid: Grid

    def dense(self) -> Float[Tensor, "o i"]:
        """The weight that the codes stand for."""
        scales, zeros = self.grid.at(torch.arange(self.codes.shape[1], device=self.codes.device))
        return scales * (self.codes.to(scales) - zeros)


@dataclass(frozen=True, slots=True)
class Feedback:
    """What rounding needs of the inputs: computed once for all layers that read them and all numbers of bits."""

    moment: Float[Tensor, "i i"]
    """``Σ``, damped."""

    order: Int[Tensor, " i"]
    """In which inputs are rounded: those of the largest second moment first, whose errors the others can make good."""

    factor: Float[Tensor, "i i"]
    """``U`` of the inputs in that order."""

    @property
    def variances(self) -> Float[Tensor, " i"]:
        """``1/U_ii²`` of each input, in the inputs' own order."""
        result = torch.empty_like(self.factor.diagonal())
        result[self.order] = self.factor.diagonal().square().reciprocal()
        return result


def feedback(moment: Float[Tensor, "i i"], damping: float, *, where: str, tokens: int = 0) -> Feedback:
    """Prepare the rounding of weights that read inputs of a second moment.

    Args:
        moment: ``Σ``, float64: the second moment, or the covariance where a bias makes good the mean.
        damping: relative to its mean eigenvalue.
        where: which layer, for errors.
        tokens: averaged over, for errors.

    Raises:
        NotPositiveDefiniteError: the moment is singular, and is not damped enough.
    """
    full, order, root = _ordered_root(moment, damping, where, tokens)
    identity = torch.eye(len(root), dtype=root.dtype, device=root.device)
    return Feedback(full, order, torch.linalg.solve_triangular(root, identity, upper=True))


def variances(moment: Float[Tensor, "i i"], damping: float, *, where: str, tokens: int = 0) -> Float[Tensor, " i"]:
    """:attr:`Feedback.variances` alone, in half of its time; see :func:`feedback`."""
    _, order, root = _ordered_root(moment, damping, where, tokens)
    result = torch.empty_like(root.diagonal())
    result[order] = root.diagonal().square()
    return result


def _ordered_root(moment: Tensor, damping: float, where: str, tokens: int) -> tuple[Tensor, Tensor, Tensor]:
    """``Σ`` damped, the order, and ``R`` upper triangular with ``Σ = R Rᵀ`` in that order: ``U = R⁻¹``."""
    full = damped(moment, damping)
    order = full.diagonal().argsort(descending=True, stable=True)
    back = order.flip(0)
    return full, order, cholesky(full[back][:, back], where=where, tokens=tokens).flip(0, 1)


def fit_grid(weight: Float[Tensor, "o i"], importance: Float[Tensor, " i"], bits: int, group: int) -> Grid:
    """The scale and zero of every group that round it to nearest with the least error, each input weighted.

    Args:
        weight: to be rounded.
        importance: of the inputs, such as their variances.
        bits: 1 to 8.
        group: inputs that share a scale.
    """
    (d_out, d_in), most = weight.shape, 2**bits - 1
    groups = -(-d_in // group)
    padded = torch.nn.functional.pad(weight, (0, groups * group - d_in)).view(d_out, groups, group)
    counts = torch.nn.functional.pad(importance.to(weight), (0, groups * group - d_in)).view(groups, group)
    low, high = padded.amin(-1).clamp_max(0), padded.amax(-1).clamp_min(0)
    best = torch.full_like(low, torch.inf)
    scales, zeros = torch.ones_like(low), torch.zeros_like(low)
    for shrink in _SHRINKS if bits < _FEW_BITS else _SHRINKS[:3]:
        scale = half(shrink * (high - low) / most)
        zero = (-shrink * low / scale).round_().clamp_(0, most)
        codes = (padded / scale[..., None] + zero[..., None]).round_().clamp_(0, most)
        error = ((codes - zero[..., None]) * scale[..., None]).sub_(padded).square_().mul_(counts).sum(-1)
        better = error < best
        best = torch.where(better, error, best)
        scales, zeros = torch.where(better, scale, scales), torch.where(better, zero, zeros)
    return Grid(scales, zeros, bits, group)


def half(scales: Float[Tensor, "*n"]) -> Float[Tensor, "*n"]:
    """The nearest positive numbers that float16 holds."""
    return scales.clamp(_TINY, 65504.0).half().to(scales)


def round_to_nearest(weight: Float[Tensor, "o i"], grid: Grid) -> Rounded:
    """Every weight by itself."""
    scales, zeros = grid.at(torch.arange(weight.shape[1], device=weight.device))
    return Rounded(grid.codes(weight, scales, zeros).to(torch.uint8), grid)


def round_with_feedback(weight: Float[Tensor, "o i"], inputs: Feedback, grid: Grid) -> Rounded:
    """GPTQ: each input's error is made good by those that follow, in panels.

    Args:
        weight: to be rounded.
        inputs: from :func:`feedback`.
        grid: from :func:`fit_grid`; it stays as it is.
    """
    order, upper = inputs.order, inputs.factor.to(weight)
    left = weight[:, order]
    codes = torch.empty_like(left)
    scales, zeros = grid.at(order)
    for start in range(0, len(order), _PANEL):
        stop = min(start + _PANEL, len(order))
        panel, errors = left[:, start:stop].mT.contiguous(), left.new_empty(stop - start, len(weight))
        square = upper[start:stop, start:stop]
        for j in range(stop - start):
            scale, zero = scales[:, start + j], zeros[:, start + j]
            codes[:, start + j] = code = grid.codes(panel[j], scale, zero)
            errors[j] = (panel[j] - scale * (code - zero)) / square[j, j]
            panel[j + 1 :].addr_(square[j, j + 1 :], errors[j], alpha=-1)
        left[:, stop:].addmm_(errors.mT, upper[start:stop, stop:], alpha=-1)
    result = torch.empty_like(codes, dtype=torch.uint8)
    result[:, order] = codes.to(torch.uint8)
    return Rounded(result, grid)


def refit_scales(weight: Float[Tensor, "o i"], rounded: Rounded, moment: Float[Tensor, "i i"]) -> Rounded:
    """The same codes with the scales of each row that lose least in the metric; rows that do not gain keep theirs.

    Args:
        weight: before it was rounded.
        rounded: on a grid.
        moment: ``Σ``, damped.
    """
    grid, metric = rounded.grid, moment.to(weight)
    groups = grid.scales.shape[1]
    places = torch.arange(weight.shape[1], device=weight.device)
    steps = rounded.codes.to(weight) - grid.at(places)[1]
    inner, target = weight.new_empty(len(weight), groups, groups), weight.new_empty(len(weight), groups)
    reach = weight @ metric
    for one in range(groups):
        own = slice(one * grid.group, (one + 1) * grid.group)
        weighted = (steps[:, own] @ metric[own]).mul_(steps)
        inner[:, one] = _by_group(weighted, grid.group, groups)
        target[:, one] = (reach[:, own] * steps[:, own]).sum(1)
    scale = inner.diagonal(dim1=1, dim2=2).mean(1).clamp_min(torch.finfo(weight.dtype).tiny)
    inner.diagonal(dim1=1, dim2=2).add_(1e-6 * scale[:, None])
    best = torch.linalg.solve(inner, target)
    whole = best.isfinite().all(1, keepdim=True) & (best > 0).all(1, keepdim=True)
    changed = Rounded(
        rounded.codes, Grid(torch.where(whole, half(best.nan_to_num(1.0)), grid.scales), grid.zeros, grid.bits, grid.group)
    )
    return better_rows(weight, metric, rounded, changed)


def _by_group(values: Float[Tensor, "o i"], group: int, groups: int) -> Float[Tensor, "o g"]:
    padded = torch.nn.functional.pad(values, (0, groups * group - values.shape[1]))
    return padded.view(len(values), groups, group).sum(-1)


def row_losses(weight: Float[Tensor, "o i"], rounded: Rounded, moment: Float[Tensor, "i i"]) -> Float[Tensor, " o"]:
    """``(w−w')ᵀ Σ (w−w')`` of every row."""
    error = weight - rounded.dense().to(weight)
    return ((error @ moment.to(weight)) * error).sum(1)


def better_rows(weight: Float[Tensor, "o i"], moment: Float[Tensor, "i i"], one: Rounded, other: Rounded) -> Rounded:
    """Of each row the one of two roundings that loses less; of the same bits and groups."""
    takes = (row_losses(weight, other, moment) < row_losses(weight, one, moment))[:, None]
    scales = torch.where(takes, other.grid.scales, one.grid.scales)
    zeros = torch.where(takes, other.grid.zeros, one.grid.zeros)
    return Rounded(torch.where(takes, other.codes, one.codes), Grid(scales, zeros, one.grid.bits, one.grid.group))


def rounded(weight: Float[Tensor, "o i"], inputs: Feedback, bits: int, group: int) -> Rounded:
    """The best rounding that we know: GPTQ on fitted grids with refitted scales; no row loses more than to nearest.

    Args:
        weight: any precision; it is that of the work.
        inputs: from :func:`feedback`.
        bits: 1 to 8.
        group: inputs that share a scale.
    """
    grid = fit_grid(weight, inputs.variances, bits, group)
    fed_back = round_with_feedback(weight, inputs, grid)
    if bits < _FEW_BITS:
        fed_back = refit_scales(weight, fed_back, inputs.moment)
    return better_rows(weight, inputs.moment, fed_back, round_to_nearest(weight, grid))
