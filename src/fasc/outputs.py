"""Where a command's result goes: resolved, compared with what it reads, locked, and refused before the work."""

import fcntl
import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, TextIO

from fasc.errors import StorageError
from fasc.storage import expanded, refuse_existing, storage_error, sweep, write_json

MARK = "written_by"
"""Key of our JSON files: they may be replaced by others of ours, and nothing else may."""

CSV_HEAD = "group,block,kind,"
"""How our tables begin."""

PNG_AUTHOR = "fasc"
"""What our figures say of the software that drew them."""

HTML_HEAD = '<meta name="generator" content="fasc '
"""What our pages say of the program that wrote them."""

MARKDOWN_HEAD = "<!-- written by fasc -->"
"""First line of our Markdown."""

_PNG = b"\x89PNG\r\n\x1a\n"

Inputs = Sequence[str | Path | None]
"""What a command reads: paths, and names that may also be hub ids or corpora, or several separated by commas."""

Owned = Callable[[Path], None]
"""Raises ``StorageError`` where a folder holds something that we have not written."""


def write_artifact(path: str | Path, kind: str, value: Mapping[str, Any]) -> Path:
    """Write a JSON file of ours.

    Args:
        path: where.
        kind: `plan`, `scores`, `diagnosis`, ….
        value: plain JSON values.
    """
    return write_json(Path(path), {MARK: f"fasc {kind}", **value})


def resolved(path: str | Path) -> Path:
    """Where a path leads: ``~`` expanded, made absolute, a link followed to what the user means by it.

    Raises:
        StorageError: it is a link that leads to itself.
    """
    target = Path(os.path.abspath(expanded(path)))  # noqa: PTH100 - resolve() would follow the links of its parents, too
    try:
        return target.resolve() if target.is_symlink() else target
    except (OSError, RuntimeError) as problem:
        raise StorageError(f"`{path}` is a link that leads nowhere", "choose another name") from problem


def existing_paths(given: Inputs) -> list[Path]:
    """The files and folders among what a command reads."""
    parts = [part.strip() for one in given if one is not None for part in (str(one), *str(one).split(","))]
    return [path for path in dict.fromkeys(expanded(part) for part in parts if part) if path.exists()]


def require_output(
    path: str | Path, *, overwrite: bool, inputs: Inputs = (), folder: bool = False, owned: Owned | None = None
) -> Path:
    """See that a result may go somewhere, before the work is done.

    Args:
        path: as given; see :func:`resolved`.
        overwrite: whether an existing result may be replaced.
        inputs: what the command reads; none of it may be replaced.
        folder: whether the result is a folder.
        owned: sees that a folder which would be replaced is ours.

    Returns:
        Where it really goes.

    Raises:
        StorageError: it exists, is an input, is no place for a result, or holds something of the user's.
    """
    target = resolved(path)
    if target.exists():
        _require_kind(target, path, folder=folder)
    _require_writable(target, path)
    for one in existing_paths(inputs):
        _require_other(target, one)
    refuse_existing(target, overwrite=overwrite)
    if owned is not None and target.exists():
        owned(target)
    return target


def require_own_file(path: str | Path, *, inputs: Inputs = ()) -> Path:
    """The same for a file beside the printed result, which may replace a file of ours and nothing else.

    Raises:
        StorageError: as :func:`require_output`, or the file is not ours.
    """
    target = require_output(path, overwrite=True, inputs=inputs)
    if target.exists() and not is_ours(target):
        raise StorageError(f"`{path}` already exists and was not written by fasc", "choose another name, or remove the file")
    return target


def is_ours(file: Path) -> bool:
    """Whether a JSON, CSV, PNG, HTML or Markdown file says that we wrote it; an empty one belongs to nobody."""
    with suppress(OSError, ValueError, RecursionError):
        with file.open("rb") as stream:
            head = stream.read(4096)
        if not head or head.startswith(CSV_HEAD.encode()):
            return True
        if head.startswith(_PNG):
            return f"Software\0{PNG_AUTHOR}".encode() in head
        if head.startswith(MARKDOWN_HEAD.encode()):
            return True
        if head.lstrip().startswith(b"<"):
            return HTML_HEAD.encode() in head
        content = json.loads(file.read_text(encoding="utf-8"))
        return isinstance(content, dict) and str(content.get(MARK, "")).startswith("fasc ")
    return False


def require_same_kind(path: Path, kind: str) -> None:
    """See that a JSON file of ours that is to be replaced holds what it will hold.

    Raises:
        StorageError: it holds a result of another kind.
    """
    with suppress(OSError, ValueError, RecursionError):
        held = str(json.loads(path.read_text(encoding="utf-8")).get(MARK, ""))
        if held and held != f"fasc {kind}":
            raise StorageError(f"`{path}` holds the {held.removeprefix('fasc ')} of fasc, not {kind}", "choose another name")


def _require_kind(target: Path, path: str | Path, *, folder: bool) -> None:
    if not (target.is_file() or target.is_dir()):
        raise StorageError(f"`{path}` is a device, not a place for a result", "choose another name")
    if folder and target.is_file():
        raise StorageError(f"`{path}` is a file, and the result is a folder", "choose another name")
    if not folder and target.is_dir():
        raise StorageError(f"`{path}` is a folder, and the result is a file", "add a file name to it")


def _require_writable(target: Path, path: str | Path) -> None:
    """The nearest folder that exists can be written to."""
    parent = next(one for one in target.parents if one.exists())
    if not parent.is_dir():
        raise StorageError(f"cannot write `{path}`: `{parent}` is a file", "choose another name")
    if not os.access(parent, os.W_OK | os.X_OK):
        raise StorageError(f"cannot write `{path}`: no permission to write to `{parent}`", "choose another name")


def _require_other(target: Path, source: Path) -> None:
    """The output is no input, does not hold one, and does not lie in a model that is one."""
    one, other = target.resolve(), source.resolve()
    if one == other or one in other.parents or (one.exists() and one.samefile(other)):
        raise StorageError(f"`{target}` is or holds what the command reads (`{source}`)", "choose another --out")
    if source.is_dir() and other in one.parents and (source / "config.json").is_file():
        raise StorageError(f"`{target}` lies inside the model that the command reads (`{source}`)", "choose another --out")


@contextmanager
def output(
    path: str | Path, *, overwrite: bool, inputs: Inputs = (), folder: bool = False, owned: Owned | None = None
) -> Iterator[Path]:
    """:func:`require_output` for the length of the work: no other call writes there meanwhile, and litter of killed ones goes.

    Raises:
        StorageError: as :func:`require_output`, or another process is at work on the same result.
    """
    try:
        target = require_output(path, overwrite=overwrite, inputs=inputs, folder=folder, owned=owned)
    except StorageError:
        _clear_after_a_kill(path)
        raise
    with _locked(target):
        sweep(target)
        yield require_output(path, overwrite=overwrite, inputs=inputs, folder=folder, owned=owned)


@contextmanager
def _locked(target: Path) -> Iterator[None]:
    """A lock beside the result; the system lets go of it when its process ends, however that ends."""
    file = target.with_name(f".{target.name}.lock")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        lock = _lock(file)
    except BlockingIOError as problem:
        raise StorageError(f"another process is writing `{target}`", "wait for it, or choose another --out") from problem
    except OSError as problem:
        raise storage_error(problem, target) from problem
    with lock:
        try:
            yield
        finally:
            file.unlink(missing_ok=True)


def _clear_after_a_kill(path: str | Path) -> None:
    """What a process left that was killed after its result stood: its lock, and the work that made the result."""
    with suppress(OSError, StorageError):
        target = resolved(path)
        file, work = (target.with_name(f".{target.name}.{what}") for what in ("lock", "work"))
        if file.is_file():
            with _lock(file):
                file.unlink(missing_ok=True)
                key = work / "key.json"  # the first to go when work is removed
                if target.exists() and (not key.exists() or key.stat().st_mtime_ns <= target.stat().st_mtime_ns):
                    shutil.rmtree(work, ignore_errors=True)


def _lock(file: Path) -> TextIO:
    """Open and lock a file; one that its last owner removed between the two is no lock, and the next is tried."""
    while True:
        lock = file.open("a")
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if file.exists() and os.fstat(lock.fileno()).st_ino == file.stat().st_ino:
                return lock
        except OSError:
            lock.close()
            raise
        lock.close()
