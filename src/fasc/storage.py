"""Files that are either whole or not there: write aside, then rename."""

import errno
import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from platformdirs import user_cache_path

from fasc.errors import StorageError


def cache_root() -> Path:
    """Where what can be had again is kept; ``FASC_CACHE`` overrides the user's cache folder."""
    root = os.environ.get("FASC_CACHE")
    return Path(root) if root else user_cache_path("fasc")


_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}


def storage_error(problem: OSError | Exception, path: Path) -> StorageError:
    """Say in one line what the operating system refused.

    Args:
        problem: an ``OSError``, or another library's error whose text carries the system's message.
        path: what was being written.
    """
    text = str(problem)
    full = getattr(problem, "errno", None) in _FULL or any(
        word in text.lower() for word in ("no space left", "file too large", "disk quota")
    )
    if full:
        return StorageError(f"no space left to write `{path}`", "free some space or choose another --out")
    return StorageError(f"cannot write `{path}`: {text}", "check the folder's permissions or choose another --out")


def require_free_space(folder: Path, needed: int) -> None:
    """Refuse to start a write that cannot fit.

    Args:
        folder: where the files will go; its nearest existing parent is asked.
        needed: bytes that will be written.

    Raises:
        StorageError: less than ``needed`` bytes are free.
    """
    parent = folder.absolute()
    while not parent.exists():
        parent = parent.parent
    free = shutil.disk_usage(parent).free
    if free < needed:
        raise StorageError(
            f"no space left for `{folder}`: it needs {needed / 1e6:,.0f} MB and {free / 1e6:,.0f} MB are free",
            "free some space or choose another --out",
        )


def refuse_existing(path: Path, *, overwrite: bool) -> None:
    """Raise ``StorageError`` if ``path`` exists and may not be replaced."""
    if path.exists() and not overwrite:
        raise StorageError(f"`{path}` already exists", "choose another --out, or pass --overwrite to replace it")


@contextmanager
def new_folder(path: Path, *, overwrite: bool = False) -> Iterator[Path]:
    """Give a scratch folder beside ``path`` that takes its place when the body succeeds.

    The folder that was there before is removed only after the new one stands; if the body raises, the scratch folder is
    removed and nothing has changed.

    Raises:
        StorageError: the folder exists and ``overwrite`` is false, or it cannot be written.
    """
    refuse_existing(path, overwrite=overwrite)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        scratch = Path(tempfile.mkdtemp(prefix=f".{path.name}.partial-", dir=path.parent))
    except OSError as problem:
        raise storage_error(problem, path) from problem
    try:
        yield scratch
        _open_permissions(scratch)
        _swap(scratch, path)
    except OSError as problem:
        raise storage_error(problem, path) from problem
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def _open_permissions(folder: Path) -> None:
    """Scratch folders and some writers make private files; what they hold is as readable as any other file."""
    mask = os.umask(0)
    os.umask(mask)
    for path in [folder, *folder.rglob("*")]:
        path.chmod((0o777 if path.is_dir() else 0o666) & ~mask)


def _swap(scratch: Path, path: Path) -> None:
    """Put ``scratch`` where ``path`` is, keeping the old folder until the new one stands."""
    if not path.exists():
        scratch.rename(path)
        return
    old = scratch.with_name(scratch.name.replace(".partial-", ".old-"))
    path.rename(old)
    try:
        scratch.rename(path)
    except OSError:
        old.rename(path)
        raise
    if old.is_dir():
        shutil.rmtree(old, ignore_errors=True)
    else:
        old.unlink(missing_ok=True)


@contextmanager
def new_file(path: Path) -> Iterator[Path]:
    """Give a scratch file name beside ``path`` that is renamed onto it when the body succeeds.

    Raises:
        StorageError: the file cannot be written.
    """
    scratch = path.with_name(f".{path.name}.partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield scratch
        _open_permissions(scratch)
        scratch.replace(path)
    except OSError as problem:
        raise storage_error(problem, path) from problem
    finally:
        scratch.unlink(missing_ok=True)


@contextmanager
def work_folder(folder: Path, key: Mapping[str, Any]) -> Iterator[Path]:
    """A folder for unfinished work: it outlives an interrupted or killed process, and goes when the body succeeds or fails.

    What an interrupted try has left is there again, if it belongs to the same key; otherwise it is removed.

    Args:
        folder: the folder.
        key: plain JSON values that say what the work is.

    Raises:
        StorageError: it cannot be written.
    """
    file = folder / "key.json"
    wanted = json.loads(json.dumps(key))
    try:
        kept = file.is_file() and json.loads(file.read_text(encoding="utf-8")) == wanted
    except (OSError, ValueError):
        kept = False
    if not kept:
        shutil.rmtree(folder, ignore_errors=True)
    try:
        if not kept:
            write_json(file, wanted)
        yield folder
    except KeyboardInterrupt:
        if {entry.name for entry in folder.iterdir()} <= {file.name}:
            shutil.rmtree(folder, ignore_errors=True)
        raise
    except Exception:  # the same command would fail again, and another one has another key
        shutil.rmtree(folder, ignore_errors=True)
        raise
    shutil.rmtree(folder, ignore_errors=True)


def write_json(path: Path, value: Any) -> Path:
    """Write ``value`` as JSON; non-finite numbers are refused because JSON has none."""
    with new_file(path) as scratch:
        scratch.write_text(json.dumps(value, indent=2, allow_nan=False, ensure_ascii=False) + "\n", encoding="utf-8")
    return path


def read_json(path: Path) -> Any:
    """Read a JSON file.

    Raises:
        StorageError: missing, unreadable, or not JSON; names the line.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as problem:
        raise StorageError(f"`{path}` does not exist", "run the stage that writes it first") from problem
    except json.JSONDecodeError as problem:
        raise StorageError(f"`{path}` line {problem.lineno}: not valid JSON ({problem.msg})", "write it again") from problem
    except (OSError, UnicodeDecodeError) as problem:
        raise StorageError(f"cannot read `{path}`: {problem}", "check the path and its permissions") from problem
