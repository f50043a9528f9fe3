"""The uniform allocation: the same rank fraction everywhere."""

from collections.abc import Iterable

from fasc.budget.accounting import rank_for_fraction, stored_layout
from fasc.budget.plan import RankPlan, UnitPlan
from fasc.calibration.statistics import Scope
from fasc.model.groups import InputGroup
from fasc.model.layers import Layer


def allocate_uniformly(
    groups: Iterable[InputGroup],
    rank_fraction: float,
    *,
    method: str,
    scope: Scope,
    model_parameters: int,
    bytes_per_parameter: int,
) -> RankPlan:
    """Give every unit the same rank fraction; needs shapes only, so it can be had before any calibration.

    Args:
        groups: the input groups of the model.
        rank_fraction: ``k / min(d_in, d_out)`` per layer, ``k / d_in`` for a projector shared by several layers.
        method: name written into the plan.
        scope: one projector per group or one per layer.
        model_parameters: parameters of the whole dense model.
        bytes_per_parameter: of the stored weights.

    Raises:
        BudgetError: the fraction is outside (0, 1], or leaves some layer without a direction.
    """
    units = []
    for group in groups:
        parts = [group.layers] if scope == "group" else [(layer,) for layer in group.layers]
        units += [_plan_unit(group, layers, rank_fraction) for layers in parts]
    return RankPlan(method, tuple(units), model_parameters, bytes_per_parameter)


def _plan_unit(group: InputGroup, layers: tuple[Layer, ...], rank_fraction: float) -> UnitPlan:
    d_outs = tuple(layer.d_out for layer in layers)
    rank = rank_for_fraction(rank_fraction, group.d_in, sum(d_outs), members=len(layers))
    return UnitPlan(
        unit=layers[0].name if len(layers) == 1 else group.name,
        group=group.name,
        layers=tuple(layer.name for layer in layers),
        d_in=group.d_in,
        d_outs=d_outs,
        rank=min(group.d_in, sum(d_outs)) if rank is None else rank,
        layout="lossless" if rank is None else stored_layout(rank, group.d_in, sum(d_outs)),
        dense_biases=sum(layer.d_out for layer in layers if layer.bias),
    )
