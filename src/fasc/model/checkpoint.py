"""Compressed model ↔ Hugging Face checkpoint: safetensors, ``config.json``, and how it was made."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tomli_w
from safetensors import SafetensorError, safe_open
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from fasc.errors import ModelError
from fasc.model.groups import InputGroup
from fasc.model.quiet import quiet_transformers
from fasc.storage import new_folder, read_json, require_free_space, storage_error, write_json

RECIPE_FILE = "fasc_recipe.toml"
PROVENANCE_FILE = "fasc_provenance.json"
PLAN_FILE = "fasc_plan.json"


@dataclass(frozen=True, slots=True)
class CheckpointNotes:
    """What lies in the folder beside the weights."""

    recipe: Mapping[str, Any]
    provenance: Mapping[str, Any]
    plan: Mapping[str, Any]
    card: str
    """The model card, Markdown with YAML front matter."""


def save_checkpoint(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    folder: Path,
    notes: CheckpointNotes,
    *,
    overwrite: bool = False,
) -> None:
    """Write a checkpoint that ``AutoModelForCausalLM.from_pretrained`` loads after ``import fasc``.

    Everything is written aside and renamed when complete.

    Raises:
        StorageError: the folder exists and may not be replaced, or there is no space.
    """
    size = sum(tensor.numel() * tensor.element_size() for tensor in model.state_dict().values())
    require_free_space(folder, int(size * 1.05))
    with new_folder(folder, overwrite=overwrite) as scratch:
        try:
            with quiet_transformers():
                model.save_pretrained(scratch)
                tokenizer.save_pretrained(scratch)
        except SafetensorError as problem:
            raise storage_error(problem, folder) from problem
        (scratch / RECIPE_FILE).write_text(tomli_w.dumps(dict(notes.recipe)), encoding="utf-8")
        write_json(scratch / PROVENANCE_FILE, dict(notes.provenance))
        write_json(scratch / PLAN_FILE, dict(notes.plan))
        (scratch / "README.md").write_text(notes.card, encoding="utf-8")


def header_bytes(model: PreTrainedModel, groups: Sequence[InputGroup]) -> int:
    """Upper bound of the safetensors header of a compressed checkpoint: each tensor's name, shape, type and place.

    Args:
        model: dense.
        groups: whose layers may each be replaced by up to five tensors.
    """
    fixed = 100  # {"dtype":"BF16","shape":[…,…],"data_offsets":[…,…]}, and the name's quotes
    names = [*model.state_dict(), *(f"{layer.name}.down.weight" for group in groups for layer in group.layers for _ in range(5))]
    return sum(len(name) + fixed for name in names) + 4096


def verify_structure(folder: Path) -> None:
    """Check that a compressed checkpoint's weights have the ranks and channels that its ``config.json`` declares.

    Dense checkpoints are not looked at.

    Raises:
        ModelError: a safetensors file cannot be read, or a declared layer is missing, of another rank or of another width.
    """
    declared = read_json(folder / "config.json").get("quantization_config") or {}
    if declared.get("quant_method") != "fasc":
        return
    shapes = _tensor_shapes(folder)
    for unit in declared.get("units", ()):
        if "channels" in unit:
            _require_channels(folder, shapes, unit)
        if unit["rank"] is None:
            continue
        for name in unit["layers"]:
            _require_rank(folder, shapes, name, unit)


def _require_channels(folder: Path, shapes: Mapping[str, list[int]], unit: Mapping[str, Any]) -> None:
    """Of the narrower layers that are stored as one matrix; in factored ones the loader finds what does not fit."""
    kept = unit["channels"][1]
    for name in unit["layers"]:
        shape = shapes.get(f"{name}.weight")
        width = None if shape is None else shape[-1] if name == unit["layers"][-1] else shape[0]
        if width is not None and (width < kept or width % kept):
            raise ModelError(
                f"`{folder}`: config.json says {kept} channels for `{name}`, the weights hold {width}",
                "config.json and the safetensors files are of different runs; compress again",
            )


def _require_rank(folder: Path, shapes: Mapping[str, list[int]], name: str, unit: Mapping[str, Any]) -> None:
    shape = shapes.get(f"{name}.up.weight")
    all_kept = shape is None and f"{name}.order" in shapes  # a layer whose rows are all pivots has no other rows to make
    if all_kept or (shape is not None and shape[1] == unit["rank"]):
        return
    found = "no factors" if shape is None else f"rank {shape[1]}"
    raise ModelError(
        f"`{folder}`: config.json says rank {unit['rank']} for `{name}`, the weights hold {found}",
        "config.json and the safetensors files are of different runs; compress again",
    )


def _tensor_shapes(folder: Path) -> dict[str, list[int]]:
    shapes: dict[str, list[int]] = {}
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise ModelError(f"`{folder}` holds no safetensors file", "copy the whole folder, or compress again")
    for file in files:
        try:
            with safe_open(file, framework="pt") as tensors:
                for name in tensors.keys():  # noqa: SIM118 - not a mapping
                    shapes[name] = tensors.get_slice(name).get_shape()
        except (SafetensorError, OSError) as problem:
            raise ModelError(f"`{file}` is damaged: {problem}", "copy the file again, or compress again") from problem
    return shapes


def read_provenance(folder: str | Path) -> dict[str, Any] | None:
    """How a checkpoint was made, or ``None`` if it was not made by us."""
    file = Path(folder) / PROVENANCE_FILE
    return read_json(file) if file.is_file() else None
