"""The rank plan: which layers share a projector, at which rank, how they are stored, and what that weighs."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from fasc.layouts.accounting import ORDER_BYTES, Layout, dense_parameters, order_entries, stored_parameters
from fasc.errors import BudgetError
from fasc.storage import read_json

_DERIVED = ("parameters", "dense_parameters")


@dataclass(frozen=True, slots=True)
class UnitPlan:
    """What becomes of one unit: the layers that share one decomposition."""

    unit: str
    """The group's name, or the layer's."""

    group: str
    layers: tuple[str, ...]
    d_in: int
    d_outs: tuple[int, ...]
    rank: int
    layout: Layout
    dense_biases: int
    """Bias entries the dense layers already had."""

    predicted_loss: float | None = None
    """½J in nats per token, where it is known."""

    method: str | None = None
    """The method of this unit where a gate chose it; ``None`` is the plan's."""

    gate: Mapping[str, Any] | None = None
    """The gate that chose, and its score: ρ, or the difference of the two methods' losses."""

    kept: int | None = None
    """Parameters that pruning leaves, biases included; ``None`` where nothing was pruned."""

    narrowed: tuple[int, int] | None = None
    """``(d_in, d_out)`` after structured pruning."""

    @property
    def d_out(self) -> int:
        """Output features of all layers."""
        return sum(self.d_outs)

    @property
    def full_rank(self) -> int:
        """``d_in`` of a shared projector, ``min(d_in, d_out)`` of a layer: the whole of the rank fraction."""
        return self.d_in if len(self.layers) > 1 else min(self.d_in, self.d_out)

    @property
    def dense_parameters(self) -> int:
        """Parameters of the dense layers, biases included."""
        return dense_parameters(self.d_in, self.d_out) + self.dense_biases

    @property
    def parameters(self) -> int:
        """Parameters after compression: weights that are not pruned, biases, and a pivoted unit's order."""
        if self.kept is not None:
            return self.kept
        return stored_parameters(self.layout, self.rank, self.d_in, self.d_out, dense_biases=self.dense_biases)

    def bytes(self, bytes_per_parameter: int) -> int:
        """Bytes after compression, with weights of that precision."""
        if self.layout == "sparse":  # zeros are stored
            return self.dense_parameters * bytes_per_parameter
        entries = order_entries(self.layout, self.d_in, self.d_out)
        return (self.parameters - entries) * bytes_per_parameter + entries * ORDER_BYTES

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values, with the derived parameter counts."""
        counts = {"parameters": self.parameters, "dense_parameters": self.dense_parameters}
        return {key: list(v) if isinstance(v, tuple) else v for key, v in asdict(self).items()} | counts


@dataclass(frozen=True, slots=True)
class ChannelCut:
    """Channels of one MLP that are removed: rows of the layers that make them and columns of the layer that reads them.

    The reader is refitted to the channels that stay. Units of these layers have the shapes that are left.
    """

    reader: str
    """The layer that reads the channels."""

    makers: tuple[str, ...]
    """The layers that make them."""

    channels: int
    kept: int
    removed: int
    """Parameters fewer than dense, before what is left is compressed; less the bias that the reader may gain."""

    predicted_loss: float | None = None
    """½J in nats per token."""

    @property
    def layers(self) -> tuple[str, ...]:
        """Makers and reader."""
        return (*self.makers, self.reader)


@dataclass(frozen=True, slots=True)
class ModelSize:
    """What a dense model weighs."""

    parameters: int
    """Tied ones counted once."""

    bytes_per_parameter: int
    header_bytes: int = 0
    """Upper bound of what a checkpoint's file headers add to the tensors, once the model is compressed."""


@dataclass(frozen=True, slots=True)
class RankPlan:
    """A rank for every unit of a model, and the totals."""

    method: str
    units: tuple[UnitPlan, ...]
    model: ModelSize
    allocation: str = "uniform"
    cuts: tuple[ChannelCut, ...] = ()
    """MLPs that lose channels; their units are what is left of them."""

    budget: Mapping[str, Any] | None = None
    """What was asked for."""

    forecast_memory: Mapping[str, int] | None = None
    """Bytes that measuring and compressing will need, by part."""

    dense_nll: float | None = None
    """Mean loss of the dense model on the calibration text, nats per token."""

    @property
    def parameters(self) -> int:
        """Of the compressed layers."""
        return sum(unit.parameters for unit in self.units)

    @property
    def dense_parameters(self) -> int:
        """Of the same layers before."""
        return sum(unit.dense_parameters for unit in self.units) + sum(cut.removed for cut in self.cuts)

    @property
    def predicted_loss(self) -> float | None:
        """Σ ½J in nats per token; ``None`` unless it is known for every unit and cut."""
        losses = [*(unit.predicted_loss for unit in self.units), *(cut.predicted_loss for cut in self.cuts)]
        return None if any(loss is None for loss in losses) else sum(loss for loss in losses if loss is not None)

    @property
    def totals(self) -> dict[str, float | int | None]:
        """The three fractions, the bytes of the weights, and the forecast; pruning has no rank fraction."""
        kept = self.model.parameters - self.dense_parameters + self.parameters
        size = self.model.bytes_per_parameter
        possible = sum(unit.full_rank for unit in self.units)
        ranked = all(unit.kept is None for unit in self.units)
        untouched = (self.model.parameters - self.dense_parameters) * size
        return {
            "rank_fraction": min(1.0, sum(min(unit.rank, unit.full_rank) for unit in self.units) / possible) if ranked else None,
            "param_fraction": self.parameters / self.dense_parameters,
            "model_fraction": kept / self.model.parameters,
            "parameters": kept,
            "bytes": untouched + sum(unit.bytes(size) for unit in self.units),
            "dense_bytes": self.model.parameters * size,
            "predicted_loss": self.predicted_loss,
        }

    def with_predicted_losses(self, losses: Mapping[str, float]) -> "RankPlan":
        """The same plan with ½J filled in by unit name."""
        units = tuple(replace(unit, predicted_loss=losses.get(unit.unit, unit.predicted_loss)) for unit in self.units)
        return replace(self, units=units)

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values: ``method``, ``totals``, ``groups`` and how it was allocated."""
        return {
            "method": self.method,
            "allocation": self.allocation,
            "budget": None if self.budget is None else dict(self.budget),
            "totals": self.totals,
            "groups": [unit.to_dict() for unit in self.units],
            "cuts": [asdict(cut) | {"makers": list(cut.makers)} for cut in self.cuts],
            "model": asdict(self.model),
            "forecast_memory": None if self.forecast_memory is None else dict(self.forecast_memory),
            "dense_nll": self.dense_nll,
        }

    @staticmethod
    def from_dict(raw: Mapping[str, Any]) -> "RankPlan":
        """Inverse of :meth:`to_dict`."""
        units = [_unit({k: v for k, v in unit.items() if k not in _DERIVED}) for unit in raw["groups"]]
        return RankPlan(
            method=raw["method"],
            units=tuple(units),
            model=ModelSize(**raw["model"]),
            allocation=raw["allocation"],
            cuts=tuple(ChannelCut(**cut | {"makers": tuple(cut["makers"])}) for cut in raw.get("cuts", ())),
            budget=raw["budget"],
            forecast_memory=raw["forecast_memory"],
            dense_nll=raw["dense_nll"],
        )


def _unit(raw: dict[str, Any]) -> UnitPlan:
    sequences: dict[str, Sequence[Any]] = {key: tuple(raw.pop(key)) for key in ("layers", "d_outs")}
    narrowed = raw.pop("narrowed", None)
    return UnitPlan(**raw, **sequences, narrowed=None if narrowed is None else tuple(narrowed))  # type: ignore[arg-type]


def read_plan(path: Path, method: str) -> RankPlan:
    """Read ``plan.json``.

    Raises:
        BudgetError: it is no plan, or one for another method.
    """
    raw = read_json(path)
    try:
        plan = RankPlan.from_dict(raw)
    except (KeyError, TypeError) as problem:
        raise BudgetError(f"`{path}` is not a rank plan: {problem}", "write one with `fasc plan --json`") from problem
    if plan.method != method:
        raise BudgetError(f"`{path}` is a plan for `{plan.method}`, not `{method}`", f"pass --method {plan.method}")
    return plan
