"""Files that are either whole or not there: write aside, then rename. Nothing that is not ours is replaced."""

import errno
import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from math import isfinite
from pathlib import Path
from typing import Any

from platformdirs import user_cache_path

from fasc.errors import ProcessError, StorageError


def expanded(path: str | Path) -> Path:
    """A path with its ``~``; one that begins with ``~`` and is no user's home is taken as it is."""
    try:
        return Path(path).expanduser()
    except RuntimeError:
        return Path(path)


def cache_root() -> Path:
    """Where what can be had again is kept; ``FASC_CACHE`` overrides the user's cache folder."""
    root = os.environ.get("FASC_CACHE")
    return expanded(root) if root else user_cache_path("fasc")


_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}


def is_full(problem: Exception) -> bool:
    """Whether a write failed for want of space. Some libraries carry the system's message in their text alone."""
    words = ("no space left", "file too large", "disk quota")
    return getattr(problem, "errno", None) in _FULL or any(word in str(problem).lower() for word in words)


def storage_error(problem: OSError | Exception, path: Path) -> StorageError:
    """Say in one line what the operating system refused.

    Args:
        problem: an ``OSError``, or another library's error whose text carries the system's message.
        path: what was being written.
    """
    if is_full(problem):
        return StorageError(f"no space left to write `{path}`", "free some space or choose another --out")
    return StorageError(f"cannot write `{path}`: {problem}", "check the folder's permissions or choose another --out")


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
    removed and nothing has changed. A folder that appeared meanwhile is not replaced.

    Raises:
        StorageError: the folder exists and ``overwrite`` is false, or it cannot be written.
    """
    path = expanded(path)
    sweep(path)
    refuse_existing(path, overwrite=overwrite)
    path = path.resolve() if path.is_symlink() else path
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        scratch = Path(tempfile.mkdtemp(prefix=f".{path.name}.partial-{os.getpid()}-", dir=path.parent))
    except OSError as problem:
        raise storage_error(problem, path) from problem
    try:
        yield scratch
        for file in [scratch, *scratch.rglob("*")]:
            open_permissions(file)
        refuse_existing(path, overwrite=overwrite)
        _swap(scratch, path)
    except OSError as problem:
        raise storage_error(problem, path) from problem
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def open_permissions(path: Path) -> None:
    """Scratch folders and some writers make private files; a result gets the mode that any other new file gets."""
    mask = os.umask(0)
    os.umask(mask)
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

    A link is followed: its target is what is replaced.

    Raises:
        StorageError: the file cannot be written.
    """
    path = expanded(path)
    path = path.resolve() if path.is_symlink() else path
    sweep(path)
    scratch = path.with_name(f".{path.name}.partial-{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield scratch
        open_permissions(scratch)
        scratch.replace(path)
    except OSError as problem:
        raise storage_error(problem, path) from problem
    finally:
        with suppress(OSError):
            scratch.unlink(missing_ok=True)


def sweep(path: Path) -> None:
    """Remove what killed processes have left beside a file or folder.

    One that was killed while it put a new folder in the place of an old one has left neither there: the old one is put back.
    """
    old = _litter(path, "old")
    if old and not path.exists():
        old.pop().rename(path)
    for litter in (*old, *_litter(path, "partial")):
        shutil.rmtree(litter, ignore_errors=True) if litter.is_dir() else litter.unlink(missing_ok=True)


def _litter(path: Path, kind: str) -> list[Path]:
    """Scratch files and folders of processes that run no more, the last changed last."""
    left = []
    for litter in path.parent.glob(f".{_escaped(path.name)}.{kind}-*"):
        number = litter.name.removeprefix(f".{path.name}.{kind}-").partition("-")[0]
        if not (number.isdigit() and _is_running(int(number))):
            left.append(litter)
    return sorted(left, key=lambda litter: litter.stat().st_mtime_ns)


def _escaped(name: str) -> str:
    return "".join(f"[{character}]" if character in "*?[" else character for character in name)


def _is_running(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except OSError:
        return True
    return True


@contextmanager
def work_folder(folder: Path, key: Mapping[str, Any]) -> Iterator[Path]:
    """A folder for unfinished work: it outlives an interrupted or killed process, and goes when the body succeeds.

    What an interrupted try has left is there again, if it belongs to the same key; otherwise it is removed. A body that fails for
    want of space leaves it, too: what it has measured need not be measured again.

    Args:
        folder: the folder.
        key: plain JSON values that say what the work is: digests of contents, never paths alone.

    Raises:
        StorageError: it cannot be written.
    """
    file = folder / "key.json"
    wanted = json.loads(json.dumps(key))
    try:
        same = file.is_file() and json.loads(file.read_text(encoding="utf-8")) == wanted
    except (OSError, ValueError):
        same = False
    if not same:
        shutil.rmtree(folder, ignore_errors=True)
        write_json(file, wanted)
    try:
        yield folder
    except KeyboardInterrupt:
        if {entry.name for entry in folder.iterdir()} <= {file.name}:
            shutil.rmtree(folder, ignore_errors=True)
        raise
    except (ProcessError, StorageError, OSError, MemoryError):  # the same command can succeed later
        raise
    except Exception as problem:  # the same command would fail again, and another one has another key
        if "out of memory" not in str(problem).lower():  # torch's own error of a GPU, unless another program leaves it
            shutil.rmtree(folder, ignore_errors=True)
        raise
    shutil.rmtree(folder, ignore_errors=True)


def write_json(path: Path, value: Any) -> Path:
    """Write ``value`` as JSON; non-finite numbers are refused because JSON has none."""
    with new_file(path) as scratch:
        scratch.write_text(json.dumps(value, indent=2, allow_nan=False, ensure_ascii=False) + "\n", encoding="utf-8")
    return path


def read_json(path: Path, *, finite: bool = True) -> Any:
    """Read a JSON file.

    Args:
        path: the file.
        finite: refuse NaN and infinity, which our files never hold and others may.

    Raises:
        StorageError: missing, unreadable, or not JSON; names the line.
    """
    if path.exists() and not path.is_file():
        raise StorageError(f"cannot read `{path}`: it is no file", "name a JSON file")
    numbers: dict[str, Any] = {"parse_float": _finite, "parse_constant": _finite} if finite else {}
    try:
        value = json.loads(path.read_text(encoding="utf-8-sig"), **numbers)
        json.dumps(value, ensure_ascii=False).encode()  # half a character can be written in JSON and nowhere else
        return value
    except FileNotFoundError as problem:
        raise StorageError(f"`{path}` does not exist", "run the stage that writes it first") from problem
    except json.JSONDecodeError as problem:
        raise StorageError(f"`{path}` line {problem.lineno}: not valid JSON ({problem.msg})", "write it again") from problem
    except RecursionError as problem:
        raise StorageError(f"`{path}`: nested too deeply to be one of ours", "write it again") from problem
    except UnicodeEncodeError as problem:
        raise StorageError(f"`{path}` holds half a character ({problem.object[problem.start]!r})", "write it again") from problem
    except (OSError, UnicodeDecodeError) as problem:
        raise StorageError(f"cannot read `{path}`: {problem}", "check the path and its permissions") from problem
    except ValueError as problem:  # a number that is not finite, or of thousands of digits
        raise StorageError(f"`{path}`: {problem}", "write it again") from problem


def _finite(digits: str) -> float:
    number = float(digits)
    if not isfinite(number):
        raise ValueError(f"{digits} is no finite number")
    return number
