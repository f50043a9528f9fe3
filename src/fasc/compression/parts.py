"""Finished parts of a compressed model as files: of a compression that may be killed, and of one that processes share."""

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from transformers import PreTrainedModel

from fasc.edits import read_edit
from fasc.edits.structure import made_modules, record, structure_of
from fasc.errors import ModelError
from fasc.storage import new_file


def recorded(model: PreTrainedModel) -> list[dict[str, Any]]:
    """The edits that the model's structure holds, as JSON values; the list itself, where there is one."""
    structure = structure_of(model)
    return [] if structure is None else structure.edits


def save_part(model: PreTrainedModel, edits: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Write edits that were made, and the modules that they left."""
    tensors: dict[str, Tensor] = {}
    for name in made_modules(model, [read_edit(edit, f"`{path}`") for edit in edits]):
        tensors |= {f"{name}.{key}": value.contiguous() for key, value in model.get_submodule(name).state_dict().items()}
    with new_file(path) as scratch:
        save_file(tensors, scratch, metadata={"edits": json.dumps(edits)})


def load_part(model: PreTrainedModel, path: Path) -> None:
    """Make the edits of a part in a model where they have not been made.

    Raises:
        ModelError: the file is damaged.
    """
    with _as_model_error(path), safe_open(path, framework="pt") as file:
        edits = [read_edit(raw, f"`{path}`") for raw in json.loads(file.metadata()["edits"])]
        for edit in edits:
            edit.build(model)
            record(model, edit)
        for name in made_modules(model, edits):
            module = model.get_submodule(name)
            module.load_state_dict({key: file.get_tensor(f"{name}.{key}") for key in module.state_dict()})


@contextmanager
def _as_model_error(path: Path) -> Iterator[None]:
    try:
        yield
    except (OSError, ValueError, KeyError, TypeError, RuntimeError, SafetensorError) as problem:
        raise ModelError(f"`{path}` is damaged: {problem}", "delete it and run the same command again") from problem
