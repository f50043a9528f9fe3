"""The rank plan: which layers share a projector, at which rank, and what that weighs."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

from fasc.budget.accounting import dense_parameters, factor_parameters
from fasc.errors import BudgetError
from fasc.storage import read_json

Layout = Literal["factors", "merged", "lossless"]
"""``lossless``: every direction is kept, so the layer keeps its weight."""


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
    """½J in nats per token, where the method's energies are a loss and are known."""

    @property
    def d_out(self) -> int:
        """Output features of all layers."""
        return sum(self.d_outs)

    @property
    def dense_parameters(self) -> int:
        """Parameters of the dense layers, biases included."""
        return dense_parameters(self.d_in, self.d_out) + self.dense_biases

    @property
    def parameters(self) -> int:
        """Parameters after compression, biases included (each compressed layer has one: the correction of the mean)."""
        if self.layout == "lossless":
            return self.dense_parameters
        weights = factor_parameters(self.rank, self.d_in, self.d_out)
        return (weights if self.layout == "factors" else dense_parameters(self.d_in, self.d_out)) + self.d_out

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values, with the derived parameter counts."""
        counts = {"parameters": self.parameters, "dense_parameters": self.dense_parameters}
        return {key: list(v) if isinstance(v, tuple) else v for key, v in asdict(self).items()} | counts


@dataclass(frozen=True, slots=True)
class RankPlan:
    """A rank for every unit of a model, and the totals."""

    method: str
    units: tuple[UnitPlan, ...]
    model_parameters: int
    """Of the dense model, tied ones counted once."""

    bytes_per_parameter: int

    @property
    def parameters(self) -> int:
        """Of the compressed layers."""
        return sum(unit.parameters for unit in self.units)

    @property
    def dense_parameters(self) -> int:
        """Of the same layers before."""
        return sum(unit.dense_parameters for unit in self.units)

    @property
    def predicted_loss(self) -> float | None:
        """Σ ½J in nats per token; ``None`` unless it is known for every unit."""
        losses = [unit.predicted_loss for unit in self.units]
        return None if any(loss is None for loss in losses) else sum(loss for loss in losses if loss is not None)

    @property
    def totals(self) -> dict[str, float | int | None]:
        """The three fractions and the bytes of the weights."""
        kept = self.model_parameters - self.dense_parameters + self.parameters
        possible = sum(unit.d_in if len(unit.layers) > 1 else min(unit.d_in, unit.d_out) for unit in self.units)
        return {
            "rank_fraction": min(1.0, sum(unit.rank for unit in self.units) / possible),
            "param_fraction": self.parameters / self.dense_parameters,
            "model_fraction": kept / self.model_parameters,
            "parameters": kept,
            "bytes": kept * self.bytes_per_parameter,
            "dense_bytes": self.model_parameters * self.bytes_per_parameter,
            "predicted_loss": self.predicted_loss,
        }

    def with_predicted_losses(self, losses: Mapping[str, float]) -> "RankPlan":
        """The same plan with ½J filled in by unit name."""
        units = tuple(replace(unit, predicted_loss=losses.get(unit.unit)) for unit in self.units)
        return replace(self, units=units)

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values: ``method``, ``totals``, ``groups``."""
        return {
            "method": self.method,
            "totals": self.totals,
            "groups": [unit.to_dict() for unit in self.units],
            "model_parameters": self.model_parameters,
            "bytes_per_parameter": self.bytes_per_parameter,
        }

    @staticmethod
    def from_dict(raw: Mapping[str, Any]) -> "RankPlan":
        """Inverse of :meth:`to_dict`."""
        derived = ("parameters", "dense_parameters")
        units = [_unit({k: v for k, v in unit.items() if k not in derived}) for unit in raw["groups"]]
        return RankPlan(raw["method"], tuple(units), raw["model_parameters"], raw["bytes_per_parameter"])


def _unit(raw: dict[str, Any]) -> UnitPlan:
    sequences: dict[str, Sequence[Any]] = {key: tuple(raw.pop(key)) for key in ("layers", "d_outs")}
    return UnitPlan(**raw, **sequences)  # type: ignore[arg-type]


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
