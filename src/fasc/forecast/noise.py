"""The noise of rounding every unit at every rank, from its dense weight and what factoring makes of that in a few blocks.

Factors bear rounding worse than the weight that they stand for, the pivoted layouts worst. By how much depends on the kind of
layer, the layout and the rank far more than on the block, so it is measured where it is cheap: on a few blocks and ranks.
"""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from math import log

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import PreTrainedModel

from fasc.errors import NotPositiveDefiniteError
from fasc.forecast.rounding import Rounding, factored_noise, noise_key, noise_loss
from fasc.layouts import FactoredLayout, Layout
from fasc.linalg.decomposition import Decomposition
from fasc.linalg.rounding import variances
from fasc.methods import Solver
from fasc.model.groups import Unit, stacked_weight
from fasc.progress import progress
from fasc.statistics.moments import GroupStatistics, Statistics, UnitStatistics, as_float64

_BLOCKS = 3
"""In which factors are looked at."""

_FRACTIONS = (0.3, 0.6, 0.85)
"""Ranks at which they are, as shares of the full one; between them the logarithm of the ratio is a straight line."""

Curves = dict[str, NDArray[np.float64]]


def noise_curves(
    model: PreTrainedModel,
    statistics: Statistics,
    chosen: Solver,
    units: Sequence[Unit],
    layouts: Sequence[Layout],
    how: Rounding,
) -> Curves:
    """:func:`~fasc.forecast.rounding.noise_loss` of every unit in every layout at every rank.

    Their names are those of :func:`~fasc.forecast.rounding.noise_key`.

    Args:
        model: dense.
        statistics: with the scale of every output.
        chosen: the method that factors.
        units: that a plan may use.
        layouts: that it may use.
        how: the rounding.

    Raises:
        StatisticsError: the statistics lack the scale of the outputs.
    """
    dense = {unit.name: noise for unit, noise in zip(units, _dense_noises(model, statistics, units, how), strict=True)}
    curves: Curves = {}
    for layout in layouts:
        if layout.leaves_dense or layout.last_resort:
            curves |= {noise_key(name, layout.name): np.array([noise]) for name, noise in dense.items()}
    factored = [one for one in layouts if isinstance(one, FactoredLayout) and not one.last_resort]
    ratios = _ratios(model, statistics, chosen, units, factored, dense, how)
    for unit in units:
        share = np.arange(min(unit.d_in, unit.d_out) + 1) / min(unit.d_in, unit.d_out)
        for name, line in ratios.get(_kind(unit), {}).items():
            curves[noise_key(unit.name, name)] = dense[unit.name] * np.exp(np.interp(share, _FRACTIONS, line))
    return curves


def _kind(unit: Unit) -> tuple[object, ...]:
    return tuple((layer.kind, layer.d_in, layer.d_out) for layer in unit.layers)


def _dense_noises(model: PreTrainedModel, statistics: Statistics, units: Sequence[Unit], how: Rounding) -> list[float]:
    """Of the layers as they are."""
    spreads: dict[tuple[str, bool], Tensor] = {}
    by_layer: dict[str, float] = {}
    with progress("forecasting the loss of rounding", len(units), "units") as advance, torch.no_grad():
        for unit in units:
            group = statistics.group(unit.group)
            for layer in unit.layers:
                if layer.name not in by_layer:
                    key = (unit.group, layer.bias)
                    if key not in spreads:
                        spreads = {key: _spread(group, how, centred=layer.bias)}  # the last one only
                    weight = stacked_weight(model, Unit(unit.group, (layer,)))
                    scale = output_scale(group, layer.name)
                    by_layer[layer.name] = noise_loss(
                        weight, spreads[key].to(weight), scale, how.group, group.unit(layer.name).share
                    )
            advance()
    return [sum(by_layer[layer.name] for layer in unit.layers) for unit in units]


def _spread(group: GroupStatistics, how: Rounding, *, centred: bool) -> Tensor:
    mean, moment = as_float64(group.input)
    if not centred:
        moment = moment + torch.outer(mean, mean)
    return variances(moment, how.damping, where=f"`{group.group.name}`: the inputs'", tokens=group.tokens)


def output_scale(group: GroupStatistics, layer: str) -> Tensor:
    """``E[h_o²]`` of a layer's outputs.

    Raises:
        StatisticsError: it was not measured.
    """
    return group.unit(layer).require_extra("output_scale")


def _ratios(
    model: PreTrainedModel,
    statistics: Statistics,
    chosen: Solver,
    units: Sequence[Unit],
    layouts: Sequence[FactoredLayout],
    dense: Mapping[str, float],
    how: Rounding,
) -> dict[tuple[object, ...], dict[str, list[float]]]:
    """By kind of unit and layout: the logarithm of the noise of factors over that of the dense weight, at each of the ranks."""
    blocks = sorted({unit.layers[0].block or 0 for unit in units})
    looked_at = {blocks[round((len(blocks) - 1) * (one + 0.5) / _BLOCKS)] for one in range(_BLOCKS)}
    sampled = [unit for unit in units if (unit.layers[0].block or 0) in looked_at] if layouts else []
    found: dict[tuple[object, ...], dict[str, list[list[float]]]] = defaultdict(dict)
    with progress("forecasting the loss of rounded factors", len(sampled), "units") as advance, torch.no_grad():
        for unit in sampled:
            moments, group = statistics.unit(unit), statistics.group(unit.group)
            full = chosen.decompose(stacked_weight(model, unit), moments)
            scales = [output_scale(group, layer.name).double() for layer in unit.layers]
            for layout in {id(one): one for one in (layout.suited(unit) for layout in layouts)}.values():
                if not isinstance(layout, FactoredLayout) or not layout.maps(unit, 1) or dense[unit.name] <= 0:
                    continue
                logs = _log_ratios(unit, (layout, full), moments, scales, how, dense[unit.name])
                if logs:
                    found[_kind(unit)].setdefault(layout.name, []).append(logs)
            advance()
    return {kind: {name: np.mean(logs, axis=0).tolist() for name, logs in by_layout.items()} for kind, by_layout in found.items()}


def _log_ratios(
    unit: Unit,
    stored: tuple[FactoredLayout, Decomposition],
    moments: UnitStatistics,
    scales: Sequence[Tensor],
    how: Rounding,
    dense: float,
) -> list[float]:
    """At each of ``_FRACTIONS``; a rank beyond what the text has directions for is taken to be as the one before it."""
    layout, full = stored
    logs: list[float] = []
    for share in _FRACTIONS:
        rank = max(1, round(share * min(unit.d_in, unit.d_out)))
        factors = full.truncate(rank, moments.input.mean.to(full.down))
        try:
            logs.append(log(max(factored_noise(unit, (layout, factors), moments, scales, how), 1e-300) / dense))
        except NotPositiveDefiniteError:
            logs += logs[-1:]
    return logs if len(logs) == len(_FRACTIONS) else []
