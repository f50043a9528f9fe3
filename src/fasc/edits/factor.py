"""Factor: a unit's weight becomes a low-rank product, in a layout."""

from typing import Any, Literal, NamedTuple

import torch
from pydantic import Field, PositiveInt, model_validator
from torch import Tensor, nn
from transformers import PreTrainedModel

from fasc.edits._registry import Edit, Factored, Layers, edit_kind, require_layers, require_members
from fasc.edits.structure import empty_modules, fill, put_module, record
from fasc.errors import ModelError, UnknownNameError
from fasc.forecast.half_j import loss_curve
from fasc.layouts import LAYOUTS, FactoredLayout, Layout
from fasc.linalg.decomposition import Factorization
from fasc.methods import AtRank, Solver, solver
from fasc.model.groups import Unit, stacked_weight
from fasc.model.layers import Layer
from fasc.statistics.accumulators import Covariance
from fasc.statistics.moments import Statistics, UnitStatistics


class Problem(NamedTuple):
    """What a unit is fitted to: the dense layers on their own inputs, or on those that it will really get (propagation)."""

    weight: Tensor
    """Stacked, [Σ d_out, d_in], float64."""

    statistics: UnitStatistics
    target: Tensor | None = None
    """Mean that the output shall have, without the layers' own biases; ``weight · mean`` if not given."""


@edit_kind("factor")
class Factor(Edit):
    """The layers of a unit, stored at a rank in a layout."""

    edit: Literal["factor"] = "factor"
    group: str
    """Name of the input group."""

    layers: tuple[str, ...]
    """Qualified names of the layers that share the decomposition."""

    d_in: PositiveInt
    d_outs: tuple[PositiveInt, ...]
    biases: tuple[bool, ...]
    """Whether each dense layer has one."""

    rank: PositiveInt
    layout: str
    method: str
    options: dict[str, Any] = Field(default_factory=dict)
    """The method's own."""

    selection: dict[str, Any] | None = None
    """How a selection chose the method, and its score."""

    facts: dict[str, Any] | None = None
    """What of the structure the rank does not say, once the edit is made."""

    notes: dict[str, Any] | None = None
    """What the method says of its solution."""

    @model_validator(mode="after")
    def _of_equal_length(self) -> "Factor":
        if not len(self.layers) == len(self.d_outs) == len(self.biases) or not self.layers:
            raise ValueError(f"{len(self.layers)} layers, {len(self.d_outs)} widths and {len(self.biases)} biases do not fit")
        return self

    @staticmethod
    def of(unit: Unit, rank: int, layout: Layout, chosen: Solver, loss: float | None = None) -> "Factor":
        """The edit that stores a unit at a rank."""
        return Factor(
            group=unit.group,
            layers=tuple(layer.name for layer in unit.layers),
            d_in=unit.d_in,
            d_outs=tuple(layer.d_out for layer in unit.layers),
            biases=tuple(layer.bias for layer in unit.layers),
            rank=rank,
            layout=layout.name,
            method=chosen.name,
            options=chosen.options.model_dump(mode="json"),
            predicted_loss=loss,
        )

    @property
    def unit(self) -> Unit:
        """The layers, dense."""
        shapes = zip(self.layers, self.d_outs, self.biases, strict=True)
        return Unit(self.group, tuple(Layer(name, self.d_in, d_out, bias=bias) for name, d_out, bias in shapes))

    @property
    def solver(self) -> Solver:
        """The method with its options."""
        return solver(self.method, self.options)

    @property
    def stored(self) -> FactoredLayout:
        """The layout."""
        layout = LAYOUTS.find(self.layout)
        if not isinstance(layout, FactoredLayout):
            raise UnknownNameError(
                "layout of factors", self.layout, [n for n, one in LAYOUTS.items() if isinstance(one, FactoredLayout)]
            )
        return layout

    @property
    def touches(self) -> tuple[str, ...]:
        """The unit's layers."""
        return self.layers

    @property
    def saved(self) -> int:
        """Dense parameters less those of the layout."""
        return self.unit.parameters - self.stored.parameters(self.unit, self.rank)

    @property
    def saved_multiply_adds(self) -> int:
        """Per token."""
        return self.d_in * sum(self.d_outs) - self.stored.multiply_adds(self.unit, self.rank)

    def saved_bytes(self, bytes_per_parameter: int) -> int:
        """An order is int32 whatever the precision of the weights."""
        return self.unit.parameters * bytes_per_parameter - self.new_bytes(bytes_per_parameter)

    def new_bytes(self, bytes_per_parameter: int) -> int:
        """Of the unit as it is stored."""
        return self.stored.bytes(self.unit, self.rank, bytes_per_parameter)

    def check(self, layers: Layers) -> Layers:
        """The layers are there in these shapes, and the layout can hold the rank; they may only be rounded then."""
        what = f"factor `{self.unit.name}`"
        require_layers(self.unit.layers, layers, what)
        if self.facts is None:  # not made yet
            FactoredLayout.check(self.stored, self.unit, self.rank, {})
        else:
            self.stored.check(self.unit, self.rank, self.facts)
        return {**layers, **{one.name: Factored(one.name, one.d_in, one.d_out, one.bias) for one in self.unit.layers}}

    def require(self, statistics: Statistics) -> None:
        """See that the moments the method needs of this unit are there.

        Raises:
            StatisticsError: names the unit.
        """
        require_members(statistics, self.group, self.layers)
        unit = statistics.unit(self.unit)
        moments = self.solver.method.moments
        if "gradient" in moments:
            unit.require_gradient()
        if "cross" in moments:
            unit.require_cross()

    def apply(self, model: PreTrainedModel, statistics: Statistics) -> Statistics:
        """Decompose, truncate at the rank, replace."""
        self.fit(model, Problem(stacked_weight(model, self.unit), statistics.unit(self.unit)))
        return statistics

    def fit(self, model: PreTrainedModel, problem: Problem) -> None:
        """Replace the layers by the method's solution of a problem, and record the edit with its forecast.

        Args:
            model: changed in place.
            problem: the ordinary one, or that of propagated inputs.
        """
        with torch.no_grad():
            self.place(model, problem, self.solver.at_rank(problem.weight, problem.statistics, self.rank))

    def place(self, model: PreTrainedModel, problem: Problem, solution: AtRank) -> None:
        """Replace the layers by a solution that is known already; see :meth:`fit`."""
        full, inputs = solution.decomposition, problem.statistics.input
        mean, target = inputs.mean.to(full.down), problem.target
        if target is None and not solution.whole:
            target = problem.weight.to(full.up) @ mean
        if self.rank > full.full_rank:
            raise ModelError(
                f"`{self.unit.name}`: {self.method} finds {full.full_rank} directions and the plan keeps {self.rank}",
                "the plan is damaged or was made for another method",
            )
        factors = full.truncate(self.rank, mean, target)
        loss = self.predicted_loss
        if loss is None and solution.whole and problem.statistics.gradient is not None:
            loss = float(loss_curve(self.solver, full, problem.weight, problem.statistics)[self.rank])
        done = self.model_copy(update={"predicted_loss": loss, "notes": dict(solution.notes) or None})
        done._install(model, factors, inputs)

    def _install(self, model: PreTrainedModel, factors: Factorization, inputs: Covariance) -> None:
        bias = factors.offset + torch.cat([self._own_bias(model, layer, factors.offset) for layer in self.unit.layers])
        encoded = self.stored.encode(self.unit, factors, bias, inputs)
        done = self.model_copy(update={"facts": dict(encoded.facts)})
        done.build(model)
        fill(model, dict(zip(self.layers, encoded.states, strict=True)), f"`{self.unit.name}` at rank {self.rank}")
        record(model, done)

    @staticmethod
    def _own_bias(model: nn.Module, layer: Layer, like: Tensor) -> Tensor:
        bias = getattr(model.get_submodule(layer.name), "bias", None)
        return torch.zeros(layer.d_out).to(like) if bias is None else bias.detach().to(like)

    def build(self, model: nn.Module) -> None:
        """The layout's empty modules.

        Raises:
            ModelError: the edit was never made, so that nobody knows what the layout has chosen.
        """
        if self.facts is None:
            raise ModelError(f"factor `{self.unit.name}`: the edit lacks `facts`", "the checkpoint is damaged; copy it again")
        with empty_modules():
            modules = self.stored.build(self.unit, self.rank, self.facts)
        for name, module in zip(self.layers, modules, strict=True):
            put_module(model, name, module)
