"""Statistics in a folder: a shard for each pass, and an index that says which belong together."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import BaseModel, PositiveInt, ValidationError

from fasc.errors import StatisticsError, StorageError
from fasc.provenance import digest, file_digest
from fasc.statistics.file import Contents, read_statistics
from fasc.statistics.unit import GroupStatistics
from fasc.storage import read_json, write_json

INDEX = "index.json"
PASS = "pass"
"""In a shard's meta: the pass that made it."""

_FORMAT = 1
_AGAIN = "run `fasc collect` again"


class _Shard(BaseModel, frozen=True, strict=True, extra="forbid"):
    file: str
    sha256: str
    groups: list[str]


class _Index(BaseModel, frozen=True, strict=True, extra="forbid"):
    written_by: str
    format: PositiveInt
    run: str
    shards: list[_Shard]


def shard_name(number: int, count: int) -> str:
    """File of a pass, counted from 0."""
    return f"statistics-{number + 1:05}-of-{count:05}.safetensors"


def run_of(facts: Mapping[str, Any], passes: Sequence[Sequence[str]]) -> str:
    """Identity of what is measured and of how it is split; a shard of another run has another one."""
    return digest([repr(sorted(facts.items())).encode(), *(repr(tuple(groups)).encode() for groups in passes)])


def write_index(folder: Path, run: str, shards: Sequence[tuple[str, Sequence[str]]]) -> None:
    """Say that the shards of a folder are whole.

    Args:
        folder: of the shards.
        run: see :func:`run_of`.
        shards: name and groups of each.
    """
    rows = [{"file": name, "sha256": file_digest(folder / name), "groups": list(groups)} for name, groups in shards]
    write_json(folder / INDEX, {"written_by": "fasc statistics", "format": _FORMAT, "run": run, "shards": rows})


def digest_of(path: Path) -> str:
    """SHA-256 of a file of moments; of a folder that of its index, which holds those of its shards.

    Raises:
        StatisticsError: there is no such file, or no index in the folder.
    """
    if path.is_dir():
        _index(path)
    elif not path.is_file():
        raise StatisticsError(f"`{path}` does not exist", "run `fasc collect` first")
    return file_digest(path / INDEX if path.is_dir() else path)


def read_shards(folder: Path) -> Contents:
    """What the shards of a folder hold together; their tensors stay on disk until they are used.

    Raises:
        StatisticsError: the index or a shard is missing, damaged, or of another run; names it.
    """
    index = _index(folder)
    groups: dict[str, GroupStatistics] = {}
    metas, text, vocabulary = [], None, None
    for shard in index.shards:
        path = folder / shard.file
        if path.name != shard.file:
            raise StatisticsError(f"`{folder / INDEX}` names `{shard.file}`, which is no file of the folder", _AGAIN)
        if not path.is_file():
            raise StatisticsError(f"`{folder}` lacks `{shard.file}`, one of its {len(index.shards)} shards", _AGAIN)
        if file_digest(path) != shard.sha256:
            raise StatisticsError(f"`{path}` is damaged: its digest is not that of the index", _AGAIN)
        part, meta, own_text, own_ends = read_statistics(path)
        if meta.get(PASS, {}).get("run") != index.run or meta["groups"] != shard.groups:
            raise StatisticsError(f"`{path}` is a shard of another run", _AGAIN)
        if groups.keys() & part.keys():
            raise StatisticsError(f"`{folder}` holds `{min(groups.keys() & part.keys())}` twice", _AGAIN)
        groups |= part
        metas.append(meta)
        text = own_text if text is None else text
        vocabulary = own_ends if vocabulary is None else vocabulary
    return groups, _joined(metas), text, vocabulary


def _index(folder: Path) -> _Index:
    if not (folder / INDEX).is_file():
        raise StatisticsError(f"`{folder}` is a folder without `{INDEX}`, not statistics of fasc", _AGAIN)
    try:
        index = _Index.model_validate(read_json(folder / INDEX))
    except (ValidationError, StorageError) as problem:
        raise StatisticsError(f"`{folder / INDEX}` is damaged", _AGAIN) from problem
    if index.format != _FORMAT or not index.shards:
        raise StatisticsError(f"`{folder / INDEX}` is not of format {_FORMAT}", _AGAIN)
    return index


def _joined(metas: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Of all passes: what the first says, which measured at the embedding as well, with the groups of all."""
    first = metas[0]
    meta = {key: value for key, value in first.items() if key != PASS}
    for key in ("groups", "without_gradient"):
        meta[key] = [name for one in metas for name in one[key]]
    meta["pooled"] = {name: count for one in metas for name, count in one["pooled"].items()}
    meta["passes"] = len(metas)
    return meta


def require_own_shards(folder: Path) -> None:
    """See that a folder that is to be replaced holds statistics of ours and nothing else, or nothing at all.

    Raises:
        StorageError: names what is not ours.
    """
    entries = sorted(entry.name for entry in folder.iterdir())
    if not entries:
        return
    try:
        own = {INDEX, *(shard.file for shard in _index(folder).shards)}
    except StatisticsError as problem:
        raise StorageError(
            f"`{folder}` already exists and holds no statistics that fasc wrote", "choose another --out, or remove the folder"
        ) from problem
    other = next((name for name in entries if name not in own), None)
    if other is not None:
        raise StorageError(f"`{folder}` holds `{other}`, which fasc did not write", "move it elsewhere, or choose another --out")
