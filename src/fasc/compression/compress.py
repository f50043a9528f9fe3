"""Put low-rank modules where the plan says."""

import torch
from torch import Tensor
from transformers import PreTrainedModel

from fasc.budget.plan import RankPlan, UnitPlan
from fasc.calibration.statistics import Statistics
from fasc.config import MethodConfig
from fasc.errors import NonFiniteError, StatisticsError
from fasc.linalg.decomposition import Decomposition, Factorization
from fasc.methods import Method, get_method
from fasc.model.layers import Layer, weight_of
from fasc.model.lowrank import LowRankLinear
from fasc.model.quantizer import FascConfig, FascHfQuantizer, build_structure
from fasc.progress import progress


def compress(model: PreTrainedModel, statistics: Statistics, plan: RankPlan, options: MethodConfig | None = None) -> RankPlan:
    """Compress a model in place, unit by unit: decompose, truncate at the planned rank, replace.

    Args:
        model: the dense model that the statistics were measured on.
        statistics: with the moments that the plan's method needs.
        plan: a rank for every unit.
        options: the method's options; their name must be the plan's method.

    Returns:
        The plan with ``predicted_loss`` (½J, nats per token) filled in where the method's energies are a loss.

    Raises:
        StatisticsError: a moment or a group is missing.
        NonFiniteError: a factor came out as NaN or infinity; names the unit. The model is then partly replaced: reload it.
    """
    options = options or MethodConfig(name=plan.method)
    method = get_method(plan.method)
    statistics.require(method.needs)
    structure = []
    losses: dict[str, float] = {}
    with progress(f"compressing with {method.name}", len(plan.units), "units") as advance, torch.no_grad():
        for unit in plan.units:
            if unit.layout == "lossless":
                losses[unit.unit] = 0.0
            else:
                decomposition = decompose_unit(model, statistics, unit, method, options)
                losses[unit.unit] = 0.5 * float(decomposition.energies[unit.rank :].sum())
                structure.append(_install(model, statistics, unit, decomposition))
            advance()
    if structure:
        model.config.quantization_config = FascConfig(units=structure)
        model.hf_quantizer = FascHfQuantizer(model.config.quantization_config, pre_quantized=True)
    return plan.with_predicted_losses(losses) if method.energy_unit == "nats²/token" else plan


def decompose_unit(
    model: PreTrainedModel, statistics: Statistics, unit: UnitPlan, method: Method, options: MethodConfig
) -> Decomposition:
    """The full decomposition of one unit, float64.

    Raises:
        StatisticsError: the statistics have no such group.
    """
    if unit.group not in statistics.groups:
        raise StatisticsError(f"the statistics have no group `{unit.group}`", "run `fasc collect` with the same layers")
    weight = _stacked_weight(model, statistics, unit)
    return method.decompose(weight, statistics.groups[unit.group].unit(unit.unit), options)


def _stacked_weight(model: PreTrainedModel, statistics: Statistics, unit: UnitPlan) -> Tensor:
    known: dict[str, Layer] = {layer.name: layer for layer in statistics.groups[unit.group].group.layers}
    rows = [weight_of(model, known[name]).detach() for name in unit.layers]
    device = rows[0].device if rows[0].device.type == "cuda" else torch.device("cpu")
    return torch.cat([row.to(device, torch.float64) for row in rows])


def _install(model: PreTrainedModel, statistics: Statistics, unit: UnitPlan, decomposition: Decomposition) -> dict[str, object]:
    """Replace the unit's layers; return its entry for the checkpoint's structure."""
    mean = statistics.groups[unit.group].input.mean.to(decomposition.down)
    factors = decomposition.truncate(unit.rank, mean)
    if not bool(torch.isfinite(factors.up).all() and torch.isfinite(factors.down).all()):
        raise NonFiniteError(f"`{unit.unit}`: the factors at rank {unit.rank}", "raise --damping or calibrate on more tokens")
    old_biases = [getattr(model.get_submodule(name), "bias", None) for name in unit.layers]
    entry: dict[str, object] = {
        "layers": list(unit.layers),
        "rank": unit.rank if unit.layout == "factors" else None,
    }
    build_structure(model, [entry])
    start = 0
    for name, d_out, old in zip(unit.layers, unit.d_outs, old_biases, strict=True):
        rows = slice(start, start + d_out)
        bias = factors.offset[rows] + (0 if old is None else old.to(factors.offset))
        _fill(model, name, factors, (rows, bias))
        start += d_out
    return entry


def _fill(model: PreTrainedModel, name: str, factors: Factorization, part: tuple[slice, Tensor]) -> None:
    rows, bias = part
    module = model.get_submodule(name)
    if isinstance(module, LowRankLinear):
        module.up.weight.copy_(factors.up[rows])
        module.up.bias.copy_(bias)
        if module.down is not None:
            module.down.weight.copy_(factors.down)
        return
    dense = factors.up[rows] @ factors.down
    module.weight.copy_(dense if isinstance(module, torch.nn.Linear) else dense.mT)
    module.bias.copy_(bias)
