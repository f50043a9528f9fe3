"""Where a command's result goes: resolved, compared with what it reads, locked, and refused before the work."""

import fcntl
import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from fasc.errors import StorageError
from fasc.storage import refuse_existing, sweep, write_json

MARK = "written_by"
"""Key of our JSON files: they may be replaced by others of ours, and nothing else may."""


def write_artifact(path: str | Path, kind: str, value: Mapping[str, Any]) -> Path:
    """Write a JSON file of ours.

    Args:
        path: where.
        kind: `plan`, `scores`, `diagnosis`, ….
        value: plain JSON values.
    """
    return write_json(Path(path).expanduser(), {MARK: f"fasc {kind}", **value})


def require_output(path: Path, *, overwrite: bool, inputs: Sequence[Path] = (), folder: bool = False) -> Path:
    """See that a result may go somewhere, before the work is done.

    Args:
        path: as given; ``~`` is expanded and a link followed.
        overwrite: whether an existing result may be replaced.
        inputs: what the command reads; none of it may be replaced.
        folder: whether the result is a folder.

    Returns:
        Where it really goes.

    Raises:
        StorageError: it exists, is an input, or is no place for a result.
    """
    target = path.expanduser()
    target = target.resolve() if target.is_symlink() else target
    if target.exists():
        _require_kind(target, folder=folder)
    for one in inputs:
        _require_other(target, one.expanduser())
    refuse_existing(target, overwrite=overwrite)
    return target


def require_json_output(path: Path, *, inputs: Sequence[Path] = ()) -> Path:
    """The same for a JSON file, which may replace a JSON file of ours and nothing else.

    Raises:
        StorageError: as :func:`require_output`, or the file is not ours.
    """
    target = require_output(path, overwrite=True, inputs=inputs)
    if target.exists() and not _is_ours(target):
        raise StorageError(f"`{path}` already exists and was not written by fasc", "choose another name, or remove the file")
    return target


def _is_ours(file: Path) -> bool:
    with suppress(OSError, ValueError, RecursionError):
        content = json.loads(file.read_text(encoding="utf-8"))
        return isinstance(content, dict) and str(content.get(MARK, "")).startswith("fasc ")
    return False


def _require_kind(target: Path, *, folder: bool) -> None:
    if not (target.is_file() or target.is_dir()):
        raise StorageError(f"`{target}` is a device, not a place for a result", "choose another --out")
    if folder and target.is_file():
        raise StorageError(f"`{target}` is a file, and the result is a folder", "choose another --out")
    if not folder and target.is_dir():
        raise StorageError(f"`{target}` is a folder, and the result is a file", "add a file name to it")


def _require_other(target: Path, source: Path) -> None:
    """The output is no input, does not hold one, and does not lie in one that is a folder."""
    if not source.exists():
        return
    one, other = target.resolve(), source.resolve()
    if one == other or one in other.parents:
        raise StorageError(f"`{target}` is or holds what the command reads (`{source}`)", "choose another --out")
    if source.is_dir() and other in one.parents and (source / "config.json").is_file():
        raise StorageError(f"`{target}` lies inside the model that the command reads (`{source}`)", "choose another --out")


@contextmanager
def output(path: Path, *, overwrite: bool, inputs: Sequence[Path] = (), folder: bool = False) -> Iterator[Path]:
    """:func:`require_output` for the length of the work: no other call writes there meanwhile, and litter of killed ones goes.

    Raises:
        StorageError: as :func:`require_output`, or another process is at work on the same result.
    """
    target = require_output(path, overwrite=overwrite, inputs=inputs, folder=folder)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        lock = target.with_name(f".{target.name}.lock").open("a")
    except OSError as problem:
        raise StorageError(
            f"cannot write `{target}`: {problem}", "check the folder's permissions or choose another --out"
        ) from problem
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as problem:
            raise StorageError(f"another process is writing `{target}`", "wait for it, or choose another --out") from problem
        try:
            sweep(target)
            refuse_existing(target, overwrite=overwrite)
            yield target
        finally:
            Path(lock.name).unlink(missing_ok=True)
