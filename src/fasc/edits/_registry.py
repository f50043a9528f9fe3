"""What an edit is: one change of a model that a plan lists.

Edits are plain data: a plan's JSON and a checkpoint's structure are lists of them. Anything read from a file is validated here,
by its fields and then against the model, before it is used.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import Annotated, Any, ClassVar, Self

from pydantic import BaseModel, Field
from torch import nn
from transformers import PreTrainedModel

from fasc.errors import ModelError, StatisticsError
from fasc.model.layers import Layer, oriented_weight
from fasc.options import parse
from fasc.registry import Registry
from fasc.statistics.moments import Statistics

Layers = Mapping[str, Layer]
"""The linear layers of a model that no edit has replaced yet, by name, in the shapes that they have left."""

Loss = Annotated[float, Field(ge=0, allow_inf_nan=False)]


class Edit(BaseModel, ABC, frozen=True, extra="forbid"):
    """One change of a model. ``edit`` names its kind."""

    edit: str
    predicted_loss: Loss | None = None
    """π · ½J in nats per token of text, where it is known."""

    keeps_weights: ClassVar[bool] = False
    """Whether the modules that it leaves hold the very weights that were there."""

    structural: ClassVar[bool] = True
    """Whether loading the checkpoint must make the change again, because the model's own config cannot say it."""

    @property
    @abstractmethod
    def touches(self) -> tuple[str, ...]:
        """Names of the layers that it changes."""

    @property
    def places(self) -> tuple[str, ...]:
        """Names of the modules that it exchanges: those layers, where it says nothing else."""
        return self.touches

    @property
    def makes(self) -> tuple[str, ...]:
        """Names of the modules with new weights that it leaves: those layers, where it says nothing else."""
        return self.touches

    @property
    @abstractmethod
    def saved(self) -> int:
        """Parameters fewer than before it."""

    @property
    @abstractmethod
    def saved_multiply_adds(self) -> int:
        """Per token."""

    def saved_bytes(self, bytes_per_parameter: int) -> int:
        """On disk, with weights of that precision."""
        return self.saved * bytes_per_parameter

    def new_bytes(self, bytes_per_parameter: int) -> int:
        """Of the weights that it makes, which are in memory beside the old ones."""
        del bytes_per_parameter
        return 0

    @abstractmethod
    def check(self, layers: Layers) -> Layers:
        """See that the edit fits the model as the edits before it have left it.

        Returns:
            The layers that later edits may work on.

        Raises:
            ModelError: a layer that is not there, of another shape or replaced already; a size that is not possible.
        """

    @abstractmethod
    def require(self, statistics: Statistics) -> None:
        """See that the statistics hold what the edit needs, before anything is changed.

        Raises:
            StatisticsError: names the layer or unit.
            UsageError: the edit's method does not exist or has no such option.
        """

    @abstractmethod
    def apply(self, model: PreTrainedModel, statistics: Statistics) -> Statistics:
        """Change the model in place.

        Returns:
            The statistics of what is left.

        Raises:
            StatisticsError: a moment or a group is missing.
            NonFiniteError: a new weight holds NaN or infinity; names the layer. The model is then partly changed: load it again.
        """

    def build(self, model: nn.Module) -> None:
        """Put empty modules of the new shape into a model or skeleton, for weights that are loaded afterwards."""
        raise NotImplementedError(f"`{self.edit}` is no structural edit")

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values; what is unset is left out."""
        return self.model_dump(mode="json", exclude_none=True)

    def with_loss(self, loss: float | None) -> Self:
        """The same with a forecast."""
        return self.model_copy(update={"predicted_loss": loss})


EDITS: Registry[type[Edit]] = Registry("edit", "fasc.edits")
"""Every kind of edit by name."""


def edit_kind(name: str) -> Callable[[type[Edit]], type[Edit]]:
    """Register a kind of edit."""

    def register(kind: type[Edit]) -> type[Edit]:
        return EDITS.add(name, kind)

    return register


def read_edit(raw: Any, where: str) -> Edit:
    """An edit from plain JSON values.

    Args:
        raw: what a plan or a checkpoint holds.
        where: the file and position, for the message.

    Raises:
        ModelError: it is no edit that this version knows, or a field is missing or out of range.
    """
    kind = raw.get("edit") if isinstance(raw, Mapping) else None
    if not isinstance(kind, str) or kind not in EDITS:
        raise ModelError(f"{where}: unknown edit `{kind}`", f"known: {', '.join(sorted(EDITS))}; was it made by a newer fasc?")
    return parse(EDITS[kind], raw, where)


def layers_of(model: nn.Module) -> dict[str, Layer]:
    """The linear layers of a model by name."""
    layers = {}
    for name, module in model.named_modules():
        weight = oriented_weight(module)
        if weight is not None:
            layers[name] = Layer(name, weight.shape[1], weight.shape[0], bias=getattr(module, "bias", None) is not None)
    return layers


class Factored(Layer):
    """A layer that holds factors now: it may be rounded and nothing else."""


def require_layers(wanted: Sequence[Layer], layers: Layers, what: str) -> None:
    """See that layers are there, each once, in the shapes that an edit was made for.

    Raises:
        ModelError: names the first that is not.
    """
    if len({layer.name for layer in wanted}) < len(wanted):
        raise ModelError(f"{what}: a layer is listed twice", "the plan or checkpoint is damaged")
    for layer in wanted:
        now = layers.get(layer.name)
        if now is None or isinstance(now, Factored):
            raise ModelError(
                f"{what}: `{layer.name}` is no linear layer of this model, or an earlier edit has replaced it",
                "the plan or checkpoint belongs to another model",
            )
        if (now.d_in, now.d_out) != (layer.d_in, layer.d_out):
            raise ModelError(
                f"{what}: `{layer.name}` is {now.d_out}×{now.d_in} here and {layer.d_out}×{layer.d_in} in the plan",
                "the plan or checkpoint belongs to another model",
            )
        if now.bias != layer.bias:
            here, there = ("a bias", "none") if now.bias else ("no bias", "one")
            raise ModelError(
                f"{what}: `{layer.name}` has {here} here and {there} in the plan",
                "the plan or checkpoint belongs to another model",
            )


def require_members(statistics: Statistics, group: str, names: Sequence[str]) -> None:
    """See that layers are in the group whose moments an edit will use.

    Raises:
        StatisticsError: there is no such group, or it has no such layer.
    """
    members = {layer.name for layer in statistics.group(group).group.layers}
    absent = [name for name in names if name not in members]
    if absent:
        raise StatisticsError(
            f"the group `{group}` of the statistics has no layer `{absent[0]}`", "run `fasc collect` on this model"
        )
