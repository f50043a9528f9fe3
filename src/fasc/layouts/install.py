"""The factors of one unit → modules in the model, in the unit's layout."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from fasc.planning.plan import UnitPlan
from fasc.errors import NonFiniteError
from fasc.linalg.decomposition import Factorization
from fasc.statistics.accumulators import Covariance
from fasc.linalg.pivot import PivotedForm, pivoted_form
from fasc.linalg.psd import cholesky, damped
from fasc.layouts.lowrank import LowRankLinear, PivotColumns, PivotedLinear
from fasc.serving.quantizer import FascConfig, FascHfQuantizer, build_structure

_WHITE = 1e-8
"""Relative damping of the coordinates' covariance, which only decides which rows are kept."""


def install(model: PreTrainedModel, unit: UnitPlan, factors: Factorization, inputs: Covariance) -> dict[str, object]:
    """Replace the layers of a unit.

    Args:
        model: changed in place.
        unit: with its rank and layout; no ``dense`` one.
        factors: of the stacked weight, float64; the offset does not hold the layers' own biases.
        inputs: of the group, in whose metric pivot rows are chosen.

    Returns:
        The unit's entry in the checkpoint's structure.

    Raises:
        NonFiniteError: a factor holds NaN or infinity; names the unit.
    """
    if not bool(torch.isfinite(factors.up).all() and torch.isfinite(factors.down).all()):
        raise NonFiniteError(f"`{unit.unit}`: the factors at rank {unit.rank}", "raise --damping or calibrate on more tokens")
    biases = [getattr(model.get_submodule(name), "bias", None) for name in unit.layers]
    own = torch.cat(
        [
            torch.zeros(d_out).to(factors.offset) if bias is None else bias.detach().to(factors.offset)
            for bias, d_out in zip(biases, unit.d_outs, strict=True)
        ]
    )
    bias = factors.offset + own
    entry: dict[str, Any] = {"layers": list(unit.layers), "rank": None if unit.layout == "merged" else unit.rank}
    if unit.layout == "pivoted":
        form = pivoted_form(_in_white_coordinates(factors, inputs, unit))
        edges = torch.tensor([0, *unit.d_outs]).cumsum(0)
        entry["pivots"] = _counts(form, edges)
        build_structure(model, [entry])
        _fill_pivoted(model, unit, form, (factors, bias))
        return entry
    if unit.layout == "pivoted-columns":
        entry["columns"] = True
        spread = _spread(inputs).to(factors.down)
        form = pivoted_form(_columns_as_rows(factors, spread))
        build_structure(model, [entry])
        _fill_columns(model, unit, form, (factors.up @ factors.down[:, form.pivots], bias, _unscaled(form, spread)))
        return entry
    build_structure(model, [entry])
    start = 0
    for name, d_out in zip(unit.layers, unit.d_outs, strict=True):
        rows = slice(start, start + d_out)
        _fill(model.get_submodule(name), factors, rows, bias[rows])
        start += d_out
    return entry


def finish(model: PreTrainedModel, structure: Sequence[Mapping[str, Any]]) -> None:
    """Write the structure into the model's config, so that ``save_pretrained`` makes a checkpoint that loads."""
    if structure:
        model.config.quantization_config = FascConfig(units=[dict(entry) for entry in structure])
        model.hf_quantizer = FascHfQuantizer(model.config.quantization_config, pre_quantized=True)


def _in_white_coordinates(factors: Factorization, inputs: Covariance, unit: UnitPlan) -> Tensor:
    """``up`` for coordinates of unit covariance: distances between its rows are then those of the outputs."""
    covariance = factors.down @ inputs.matrix.to(factors.down) @ factors.down.mT
    return factors.up @ cholesky(damped(covariance, _WHITE), where=f"`{unit.unit}`: the coordinates'", tokens=0)


def _columns_as_rows(factors: Factorization, spread: Tensor) -> Tensor:
    """Column j of the product, as far as it moves the outputs: in an orthonormal basis of them, times the spread of input j.

    The kept inputs are then those that do most, and no other adds much to a coordinate in comparison: small coefficients in the
    units of the inputs are what low precision needs.
    """
    triangle = torch.linalg.qr(factors.up, mode="r").R
    columns: Tensor = triangle @ factors.down
    return columns.mT * spread[:, None]


def _spread(inputs: Covariance) -> Tensor:
    """Standard deviation of each input; a dead one counts as the smallest spread that is told from zero."""
    variance = inputs.matrix.diagonal().double()
    return variance.clamp_min(_WHITE * variance.mean()).sqrt()


def _unscaled(form: PivotedForm, spread: Tensor) -> Tensor:
    """What the kept inputs get of the others, [k, n], in the units of the inputs."""
    return form.coefficients.mT * spread[form.pivots][:, None] / spread[form.others]


def _counts(form: PivotedForm, edges: Tensor) -> list[int]:
    """How many pivots lie in each layer's rows."""
    positions = torch.searchsorted(form.pivots, edges)
    return positions.diff().tolist()


def _fill(module: nn.Module, factors: Factorization, rows: slice, bias: Tensor) -> None:
    if isinstance(module, LowRankLinear):
        assert module.up is not None  # noqa: S101
        module.up.weight.copy_(factors.up[rows])
        module.up.bias.copy_(bias)
        if module.down is not None:
            module.down.weight.copy_(factors.down)
        return
    dense = factors.up[rows] @ factors.down
    module.weight.copy_(dense if isinstance(module, nn.Linear) else dense.mT)  # type: ignore[operator]
    module.bias.copy_(bias)  # type: ignore[operator]


def _fill_pivoted(model: PreTrainedModel, unit: UnitPlan, form: PivotedForm, values: tuple[Factorization, Tensor]) -> None:
    factors, bias = values
    kept_bias = bias[form.pivots]
    rest_bias = bias[form.others] - form.coefficients @ kept_bias
    start = 0
    for name, d_out in zip(unit.layers, unit.d_outs, strict=True):
        module = model.get_submodule(name)
        assert isinstance(module, PivotedLinear)  # noqa: S101
        mine = (form.others >= start) & (form.others < start + d_out)
        if module.up is not None:
            module.up.weight.copy_(form.coefficients[mine])
            module.up.bias.copy_(rest_bias[mine])
        if module.down is not None:
            module.down.weight.copy_(factors.up[form.pivots] @ factors.down)
            module.down.bias.copy_(kept_bias)
        kept = form.pivots[(form.pivots >= start) & (form.pivots < start + d_out)]
        places = torch.cat([kept, form.others[mine]]) - start
        module.order.copy_(places.argsort())
        start += d_out


def _fill_columns(model: PreTrainedModel, unit: UnitPlan, form: PivotedForm, values: tuple[Tensor, Tensor, Tensor]) -> None:
    up, bias, others = values
    start = 0
    for name, d_out in zip(unit.layers, unit.d_outs, strict=True):
        module = model.get_submodule(name)
        assert isinstance(module, LowRankLinear) and module.up is not None  # noqa: S101
        module.up.weight.copy_(up[start : start + d_out])
        module.up.bias.copy_(bias[start : start + d_out])
        if isinstance(module.down, PivotColumns):
            module.down.weight.copy_(others)
            module.down.order.copy_(torch.cat((form.pivots, form.others)))
        start += d_out
