"""The structure of a compressed model: the list of edits that made it, kept in its config.

``config.json`` carries it as ``quantization_config``, which is how transformers lets the quantizer (``serving/quantizer.py``)
build the modules before weights are loaded.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from fasc.edits._registry import Edit, Layers, layers_of, read_edit
from fasc.errors import ModelError, NonFiniteError
from fasc.model.structure import FORMAT, FascConfig


def parsed(structure: FascConfig | None) -> list[Edit]:
    """The edits of a structure, validated field by field; none without one.

    Raises:
        ModelError: names the edit and the field.
    """
    return [] if structure is None else [read_edit(raw, f"config.json, edit {i}") for i, raw in enumerate(structure.edits)]


def structure_of(model: nn.Module) -> FascConfig | None:
    """The structure of a compressed model, or ``None`` if it is not one of ours."""
    config = getattr(getattr(model, "config", None), "quantization_config", None)
    return config if isinstance(config, FascConfig) else None


def require_uncompressed(model: PreTrainedModel) -> None:
    """Refuse a model of ours, also one that was built from its config alone.

    Raises:
        ModelError: it is one.
    """
    config = getattr(model.config, "quantization_config", None)
    if structure_of(model) is not None or (isinstance(config, dict) and config.get("quant_method") == "fasc"):
        raise ModelError("the model is compressed already", "give the dense model that it was made from")


def edited_layers(model: nn.Module) -> list[str]:
    """Names of the modules with weights of their own that edits have put in the place of layers, each once."""
    return made_modules(model, [edit for edit in parsed(structure_of(model)) if not edit.keeps_weights])


def made_modules(model: nn.Module, edits: Sequence[Edit]) -> list[str]:
    """Names of the modules with new weights that these edits have left in a model, each once."""
    there = {name for name, _ in model.named_modules()}  # a sublayer that is left out takes its layers with it
    return [name for name in dict.fromkeys(name for edit in edits for name in edit.makes) if name in there]


def record(model: PreTrainedModel, edit: Edit) -> None:
    """Add an edit that was made to the model's structure."""
    structure = structure_of(model) or FascConfig(format=FORMAT)
    structure.edits.append(edit.to_dict())
    model.config.quantization_config = structure


def build_structure(model: nn.Module, edits: Sequence[Edit]) -> None:
    """Make every edit's empty modules, in place, after seeing that all of them fit.

    Raises:
        ModelError: an edit does not fit the model; nothing was changed.
    """
    check_edits(edits, model)
    for edit in edits:
        edit.build(model)


def check_edits(edits: Sequence[Edit], model: nn.Module) -> None:
    """See that edits fit a model, one after the other.

    Raises:
        ModelError: the first that does not.
    """
    layers: Layers = layers_of(model)
    for edit in edits:
        layers = edit.check(layers)


def put_module(model: nn.Module, name: str, new: nn.Module) -> None:
    """Put an empty module where a layer is, on its device, in its precision, as trainable and in the mode that it was in."""
    parent, _, leaf = name.rpartition(".")
    old = model.get_submodule(name)
    weight: Tensor = old.weight  # type: ignore[assignment]
    new.to(weight.dtype)
    if weight.device.type != "meta":
        new.to_empty(device=weight.device)
    new.requires_grad_(weight.requires_grad)
    new.train(old.training)
    setattr(model.get_submodule(parent), leaf, new)


def fill(model: nn.Module, states: Mapping[str, Mapping[str, Tensor]], where: str) -> None:
    """Load the contents of modules, in their own precision: the one place through which new weights enter a model.

    Raises:
        NonFiniteError: a tensor holds NaN or infinity, before or after it is cast; names the module.
    """
    for name, state in states.items():
        module = model.get_submodule(name)
        given = {key: value.contiguous() for key, value in state.items()}
        marks = {key: torch.zeros_like(value) for key, value in module.named_buffers() if key.endswith("weight")}  # no content
        module.load_state_dict(marks | given)
        for key, value in module.state_dict().items():
            if value.is_floating_point() and not bool(torch.isfinite(value).all()):
                raise NonFiniteError(f"{where}: `{name}.{key}`", "raise --damping, or calibrate on more tokens")


@contextmanager
def empty_modules() -> Iterator[None]:
    """Modules made here have shapes and no contents, and draw no random numbers."""
    with torch.device("meta"):
        yield


@contextmanager
def structure_kept(model: PreTrainedModel) -> Iterator[None]:
    """Whatever edits the body records, the model's structure is as before afterwards."""
    before = structure_of(model)
    edits = None if before is None else list(before.edits)
    try:
        yield
    finally:
        if before is not None:
            before.edits = edits or []
            model.config.quantization_config = before
        elif hasattr(model.config, "quantization_config"):
            del model.config.quantization_config
