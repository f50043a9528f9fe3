"""Compressed model ↔ Hugging Face checkpoint: safetensors, ``config.json``, and how it was made."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tomli_w
from safetensors import SafetensorError, safe_open
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from fasc.edits.structure import structure_of
from fasc.errors import StorageError
from fasc.model.groups import InputGroup
from fasc.model.quiet import quiet_transformers
from fasc.serving.model_type import disguised
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
    tokenizer: PreTrainedTokenizerBase | None,
    folder: Path,
    notes: CheckpointNotes,
    *,
    overwrite: bool = False,
    max_shard_size: int | None = None,
) -> None:
    """Write a checkpoint that ``AutoModelForCausalLM.from_pretrained`` loads where fasc is installed, and refuses elsewhere.

    Everything is written aside and renamed when complete.

    Args:
        model: compressed, or merged.
        tokenizer: written beside it.
        folder: where it goes.
        notes: how it was made.
        overwrite: replace what is there.
        max_shard_size: bytes of a file of weights at most; of an offloaded model so much is in memory at a time.

    Raises:
        StorageError: the folder exists and may not be replaced, it holds something that we did not write, or there is no space.
    """
    if overwrite and folder.exists():
        require_own_checkpoint(folder)
    size = sum(tensor.numel() * tensor.element_size() for tensor in model.state_dict().values())
    require_free_space(folder, int(size * 1.05))
    with new_folder(folder, overwrite=overwrite) as scratch:
        try:
            with quiet_transformers():
                model.save_pretrained(scratch, **({} if max_shard_size is None else {"max_shard_size": max_shard_size}))
                if tokenizer is not None:
                    tokenizer.save_pretrained(scratch)
            if structure_of(model) is not None:
                write_json(scratch / "config.json", disguised(read_json(scratch / "config.json")))
        except SafetensorError as problem:
            raise storage_error(problem, folder) from problem
        (scratch / RECIPE_FILE).write_text(tomli_w.dumps(dict(notes.recipe)), encoding="utf-8")
        write_json(scratch / PLAN_FILE, dict(notes.plan))
        (scratch / "README.md").write_text(notes.card, encoding="utf-8")
        files = sorted([*(file.name for file in scratch.iterdir()), PROVENANCE_FILE])
        write_json(scratch / PROVENANCE_FILE, {**notes.provenance, "files": files})


def require_own_checkpoint(folder: Path) -> None:
    """See that a folder that is to be replaced holds a checkpoint of ours and nothing else, or nothing at all.

    Raises:
        StorageError: names what is not ours.
    """
    entries = sorted(entry.name for entry in folder.iterdir())
    made = read_provenance(folder) if entries else {"files": []}
    own = made.get("files") if isinstance(made, dict) else None
    if not isinstance(own, list):
        raise StorageError(
            f"`{folder}` already exists and is no checkpoint that fasc wrote", "choose another --out, or remove the folder"
        )
    other = next((name for name in entries if name not in own), None)
    if other is not None:
        raise StorageError(f"`{folder}` holds `{other}`, which fasc did not write", "move it elsewhere, or choose another --out")


def header_bytes(model: PreTrainedModel, groups: Sequence[InputGroup], tensors: int = 5) -> int:
    """Upper bound of the safetensors header of a compressed checkpoint: each tensor's name, shape, type and place.

    Args:
        model: dense.
        groups: whose layers may be replaced.
        tensors: that a layer may be stored in, at most.
    """
    fixed = 100  # {"dtype":"BF16","shape":[…,…],"data_offsets":[…,…]}, and the name's quotes
    names = [
        *model.state_dict(),
        *(f"{layer.name}.down.weight" for group in groups for layer in group.layers for _ in range(tensors)),
    ]
    return sum(len(name) + fixed for name in names) + 4096


def read_provenance(folder: str | Path) -> dict[str, Any] | None:
    """How a checkpoint was made, or ``None`` if it was not made by us."""
    file = Path(folder) / PROVENANCE_FILE
    return read_json(file) if file.is_file() else None


def is_whole(folder: Path) -> bool:
    """Whether a checkpoint's files are there and can be opened: its config and every safetensors file, each of full length."""
    files = sorted(folder.glob("*.safetensors"))
    listed = folder / "model.safetensors.index.json"
    try:
        if listed.is_file():
            files = [folder / name for name in sorted(set(read_json(listed)["weight_map"].values()))]
        read_json(folder / "config.json")
        for file in files:
            with safe_open(file, framework="pt") as tensors:
                tensors.keys()
    except (OSError, SafetensorError, StorageError, KeyError, TypeError):
        return False
    return bool(files)
