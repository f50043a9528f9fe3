"""The plan: an ordered list of edits, and what the model will weigh and lose after them."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, Field, FiniteFloat, NonNegativeInt, PositiveInt
from torch import nn

from fasc.edits import Edit, read_edit
from fasc.edits.factor import Factor
from fasc.edits.structure import check_edits
from fasc.edits.vocabulary import VocabularyBits
from fasc.errors import BudgetError, FascError
from fasc.model.groups import InputGroup
from fasc.model.layers import Layer
from fasc.options import parse
from fasc.outputs import MARK, write_artifact
from fasc.planning.correction import Expected
from fasc.planning.options import BudgetConfig, MethodConfig
from fasc.storage import read_json

FORMAT = 5
"""Version of ``plan.json``: a list of edits; older ones are refused."""


class ModelSize(BaseModel, frozen=True, extra="forbid"):
    """What a dense model weighs."""

    parameters: PositiveInt
    """Tied ones counted once."""

    bytes_per_parameter: PositiveInt
    header_bytes: NonNegativeInt = 0
    """Upper bound of what a checkpoint's file headers add to the tensors, once the model is compressed."""


@dataclass(frozen=True, slots=True)
class Plan:
    """What will be done to a model: edits in order, each with its cost and forecast; and the totals."""

    options: MethodConfig
    """The method, how its ranks were allocated, and how the plan is to be carried out."""

    edits: tuple[Edit, ...]
    layers: tuple[Layer, ...]
    """The dense layers that the plan may touch, whether it does or not."""

    model: ModelSize
    allocation: str = "uniform"
    budget: Mapping[str, Any] | None = None
    """What was asked for."""

    forecast_memory: Mapping[str, int] | None = None
    """Bytes that measuring and compressing will need, by part."""

    dense_nll: float | None = None
    """Mean loss of the dense model on the calibration text, nats per token."""

    outside: Mapping[str, int] | None = None
    """Parameters that no plan touches, by what they are."""

    lacking: tuple[str, ...] = ()
    """What could be left out of other models and not of this one: its parts are built in another way."""

    expected: Expected | None = None
    """The KL divergence to expect, by plans of this model that were measured."""

    caution: str | None = None
    """Why the forecast cannot be trusted, in a sentence."""

    @property
    def method(self) -> str:
        """Name of the method."""
        return self.options.name

    @property
    def dense_parameters(self) -> int:
        """Of the layers, dense."""
        return sum(layer.parameters for layer in self.layers)

    @property
    def parameters(self) -> int:
        """Of the layers after the edits: weights that are not pruned, biases, and orders."""
        return self.dense_parameters - sum(edit.saved for edit in self.edits)

    @property
    def predicted_loss(self) -> float | None:
        """Σ π ½J in nats per token of text; ``None`` unless it is known for every edit."""
        losses = [edit.predicted_loss for edit in self.edits]
        return None if any(loss is None for loss in losses) else sum(loss for loss in losses if loss is not None)

    @property
    def structural(self) -> bool:
        """Whether loading the result needs fasc."""
        return any(edit.structural for edit in self.edits)

    @property
    def totals(self) -> dict[str, float | int | None]:
        """The three fractions, bytes, multiply-adds and the forecast; pruning has no rank fraction."""
        size = self.model.bytes_per_parameter
        parameters = self.model.parameters - self.dense_parameters + self.parameters
        dense_multiply_adds = sum(layer.d_in * layer.d_out for layer in self.layers)
        return {
            "rank_fraction": self._rank_fraction(),
            "param_fraction": self.parameters / self.dense_parameters,
            "model_fraction": parameters / self.model.parameters,
            "parameters": parameters,
            "bytes": self.model.parameters * size - sum(edit.saved_bytes(size) for edit in self.edits),
            "dense_bytes": self.model.parameters * size,
            "multiply_add_fraction": 1 - sum(edit.saved_multiply_adds for edit in self.edits) / dense_multiply_adds,
            "bits_per_weight": self.bits_per_weight,
            "predicted_loss": self.predicted_loss,
        }

    @property
    def bits_per_weight(self) -> float:
        """Bits on disk of the chosen layers, all that they hold, for each of their dense weights."""
        size = self.model.bytes_per_parameter
        saved = sum(edit.saved_bytes(size) for edit in self.edits if not isinstance(edit, VocabularyBits))
        return 8 * (self.dense_parameters * size - saved) / self.dense_parameters

    def _rank_fraction(self) -> float | None:
        """Σ rank ÷ Σ full rank over units, a layer that no edit factors being one of full rank; ``None`` for pruning."""
        if any(not edit.structural for edit in self.edits):
            return None
        factored = [edit for edit in self.edits if isinstance(edit, Factor)]
        names = {name for edit in factored for name in edit.touches}
        dense = sum(min(layer.d_in, layer.d_out) for layer in self.layers if layer.name not in names)
        ranks = sum(min(edit.rank, edit.unit.full_rank) for edit in factored) + dense
        return ranks / (sum(edit.unit.full_rank for edit in factored) + dense)

    def check(self, model: nn.Module) -> None:
        """See that every edit fits the model, before anything is done.

        Raises:
            ModelError: names the edit and the layer.
        """
        check_edits(self.edits, model)

    def with_edits(self, edits: Sequence[Edit]) -> "Plan":
        """The same with other edits."""
        return replace(self, edits=tuple(edits))

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values: ``options``, ``totals``, ``edits`` and how it was allocated."""
        return {
            "format": FORMAT,
            "options": self.options.model_dump(mode="json", exclude_unset=True) | {"name": self.method},
            "allocation": self.allocation,
            "budget": None if self.budget is None else dict(self.budget),
            "totals": self.totals,
            "edits": [edit.to_dict() for edit in self.edits],
            "layers": [layer.to_dict() for layer in self.layers],
            "model": self.model.model_dump(),
            "forecast_memory": None if self.forecast_memory is None else dict(self.forecast_memory),
            "dense_nll": self.dense_nll,
            "outside": None if self.outside is None else dict(self.outside),
            "lacking": list(self.lacking),
            "expected": None if self.expected is None else self.expected.model_dump(),
            "caution": self.caution,
        }

    @staticmethod
    def from_dict(raw: Any, where: str = "plan") -> "Plan":
        """Inverse of :meth:`to_dict`.

        Raises:
            FascError: a field is missing, unknown or out of range; names it.
        """
        if not isinstance(raw, Mapping) or raw.get("format") != FORMAT:
            given = raw.get("format") if isinstance(raw, Mapping) else None
            raise BudgetError(f"{where}: not a plan of format {FORMAT} (format {given})", "write one with `fasc plan --json`")
        header = parse(_Header, {k: v for k, v in raw.items() if k not in ("edits", "totals", "format", MARK)}, where)
        edits = raw.get("edits")
        if not isinstance(edits, list):
            raise BudgetError(f"{where}: `edits` is no list", "write one with `fasc plan --json`")
        return Plan(
            options=header.options,
            edits=tuple(read_edit(edit, f"{where}, edit {index}") for index, edit in enumerate(edits)),
            layers=tuple(Layer(**layer.model_dump()) for layer in header.layers),
            model=header.model,
            allocation=header.allocation,
            budget=None if header.budget is None else header.budget.model_dump(mode="json", exclude_none=True),
            forecast_memory=header.forecast_memory,
            dense_nll=header.dense_nll,
            outside=header.outside,
            lacking=header.lacking,
            expected=header.expected,
            caution=header.caution,
        )

    def save(self, path: str | Path) -> Path:
        """Write ``plan.json``."""
        return write_artifact(path, "plan", self.to_dict())

    @staticmethod
    def load(path: str | Path) -> "Plan":
        """Read ``plan.json``.

        Raises:
            BudgetError: it is no plan; names the field.
            StorageError: it cannot be read.
        """
        try:
            return Plan.from_dict(read_json(Path(path)), f"`{path}`")
        except FascError as problem:
            if isinstance(problem, BudgetError):
                raise
            raise BudgetError(problem.message, "write one with `fasc plan --json`") from problem

    def __str__(self) -> str:
        """As tables."""
        from fasc.planning.table import as_text  # noqa: PLC0415 - the table knows the plan

        return as_text(self)


class _LayerRow(BaseModel, frozen=True, extra="forbid"):
    name: str
    d_in: PositiveInt
    d_out: PositiveInt
    bias: bool


class _Header(BaseModel, frozen=True, extra="forbid"):
    options: MethodConfig
    allocation: str
    budget: BudgetConfig | None
    layers: Annotated[tuple[_LayerRow, ...], Field(min_length=1)]
    model: ModelSize
    forecast_memory: dict[str, int] | None
    dense_nll: FiniteFloat | None
    outside: dict[str, NonNegativeInt] | None = None
    lacking: tuple[str, ...] = ()
    expected: Expected | None = None
    caution: str | None = None


def layers_in(groups: Sequence[InputGroup]) -> tuple[Layer, ...]:
    """The layers of groups, in their order."""
    return tuple(layer for group in groups for layer in group.layers)
