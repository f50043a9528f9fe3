"""Sublayers: an attention or an MLP that a block adds to what it passes on, and what stands there when it is left out."""

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from fasc.model.groups import InputGroup, try_out
from fasc.model.layers import Layer
from fasc.model.scopes import restored

Kind = Literal["attention", "mlp"]


@dataclass(frozen=True, slots=True)
class Sublayer:
    """An attention or an MLP whose output is that of its last layer."""

    name: str
    """Qualified name of its module."""

    groups: tuple[InputGroup, ...]
    """The one group that reads its input, and the one layer that makes its output."""

    returns: int
    """Values that its module returns beside the output; none of them is used."""

    others: int
    """Parameters of the module beside those of the layers: norms of queries and keys."""

    @property
    def kind(self) -> Kind:
        """An attention gives its weights as well."""
        return "attention" if self.returns else "mlp"

    @property
    def layers(self) -> tuple[Layer, ...]:
        """All linear layers, the last one last."""
        return tuple(layer for group in self.groups for layer in group.layers)


class Skipped(nn.Module):
    """Stands where a sublayer was: its mean output, whatever is read.

    Args:
        width: output features.
        returns: values beside the output that whoever calls it expects; they are ``None``.
        layer: name within the sublayer of one that it had. A program that does not know this module looks for its matrix, finds
            one number, and stops.
    """

    def __init__(self, width: int, returns: int, layer: str) -> None:
        super().__init__()
        self.returns = returns
        self.mean = nn.Parameter(torch.empty(width))
        inner: nn.Module = self
        for part in layer.split("."):
            inner.add_module(part, nn.Module())
            inner = inner.get_submodule(part)
        inner.register_buffer("weight", torch.zeros(1))

    def forward(self, *args: Any, **given: Any) -> Any:
        """The mean at every position of the input, [sequences, positions, width]."""
        x: Tensor = args[0] if args else given["hidden_states"]
        output = self.mean.to(x.dtype).expand(*x.shape[:-1], -1)
        return (output, *[None] * self.returns) if self.returns else output


def find_sublayers(model: PreTrainedModel, groups: Sequence[InputGroup]) -> list[Sublayer]:
    """The sublayers that may be left out, found by running the model without them.

    The first attention of each kind stays: caches count positions there. So does the last block's MLP, whose removal ½J
    underestimates, as that of its channels.

    Args:
        model: dense; comes out as it went in.
        groups: its input groups, in the order of the calls.
    """
    candidates = [one for one in (_sublayer(model, pair) for pair in pairwise(groups)) if one is not None]
    outputs = _outputs(model, candidates)
    known = [replace(one, returns=outputs[one.name]) for one in candidates if one.name in outputs]
    return [one for one in known if _may_go(model, one, known)] if _runs_without(model, known) else []


def _sublayer(model: PreTrainedModel, pair: tuple[InputGroup, InputGroup]) -> Sublayer | None:
    """A module that holds the layers of two groups, the second of one layer, and no other linear layer."""
    first, last = pair
    if len(last.layers) != 1 or first.block is None or first.block != last.block:
        return None
    names = [layer.name for group in pair for layer in group.layers]
    parent = names[-1].rpartition(".")[0]
    held = {f"{parent}.{name}" for name, module in model.get_submodule(parent).named_modules() if _is_matrix(module)}
    if held != set(names):
        return None
    layers = {id(parameter) for name in names for parameter in model.get_submodule(name).parameters()}
    others = sum(one.numel() for one in model.get_submodule(parent).parameters() if id(one) not in layers)
    return Sublayer(parent, pair, 0, others)


def _is_matrix(module: nn.Module) -> bool:
    weight = getattr(module, "weight", None)
    return isinstance(weight, Tensor) and weight.dim() == 2


def _outputs(model: PreTrainedModel, candidates: Sequence[Sublayer]) -> dict[str, int]:
    """How many values each module returns beside its last layer's output; those that return something else are left out."""
    made: dict[str, Tensor] = {}
    found: dict[str, int] = {}

    def remember(name: str) -> Callable[..., None]:
        def hook(_module: nn.Module, _args: Any, output: Any) -> None:
            made[name] = output

        return hook

    def compare(one: Sublayer) -> Callable[..., None]:
        def hook(_module: nn.Module, _args: Any, output: Any) -> None:
            first, *others = output if isinstance(output, tuple) else (output,)
            if isinstance(first, Tensor) and torch.equal(first, made[one.layers[-1].name]):
                found[one.name] = len(others)

        return hook

    with ExitStack() as stack:
        for one in candidates:
            last = one.layers[-1].name
            stack.callback(model.get_submodule(last).register_forward_hook(remember(last)).remove)
            stack.callback(model.get_submodule(one.name).register_forward_hook(compare(one)).remove)
        try_out(model)
    return found


def _runs_without(model: PreTrainedModel, sublayers: Sequence[Sublayer]) -> bool:
    with restored(model, [one.name for one in sublayers]):
        try:
            for one in sublayers:
                leave_out(model, one.name, one.layers[-1], one.returns)
                nn.init.zeros_(model.get_submodule(one.name).mean)
            try_out(model)
        except (RuntimeError, ValueError, TypeError, AttributeError, IndexError):  # what calls it wants more of it
            return False
    return True


def leave_out(model: nn.Module, sublayer: str, last: Layer, returns: int) -> None:
    """Put a module without content in the place of a sublayer, in the precision and on the device of its last layer."""
    parent, _, leaf = sublayer.rpartition(".")
    layer = model.get_submodule(last.name)
    weight: Tensor = layer.weight  # type: ignore[assignment]
    new = Skipped(last.d_out, returns, last.name.removeprefix(f"{sublayer}.")).to(weight.dtype)
    new = new.to("meta") if weight.device.type == "meta" else new.to(weight.device)
    new.requires_grad_(weight.requires_grad)
    new.train(layer.training)
    setattr(model.get_submodule(parent), leaf, new)


def _may_go(model: PreTrainedModel, one: Sublayer, known: Sequence[Sublayer]) -> bool:
    block = one.groups[0].block or 0
    if one.kind == "mlp":
        return block < max(other.groups[0].block or 0 for other in known)
    kinds = getattr(model.config.get_text_config(), "layer_types", None)
    if not kinds:
        return block > 0
    return block > 0 and kinds[block] in kinds[:block]
