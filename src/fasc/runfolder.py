"""A run's folder: a marker says which recipe it belongs to and which entries are ours. Nothing else in it is ever touched."""

import re
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from fasc.errors import StorageError, UsageError
from fasc.outputs import Inputs, output
from fasc.storage import read_json, write_json

MARKER = ".fasc-run.json"

_NAME = re.compile(r"[^\W_][\w .,+@%=()-]{0,99}")


def require_name(name: str, reserved: Sequence[str]) -> str:
    """A label becomes a folder: see that it is the name of one, and no path.

    Raises:
        UsageError: says what is wrong with it.
    """
    if not _NAME.fullmatch(name) or name != name.strip(" .") or ".." in name:
        raise UsageError(
            f"`{name}` cannot be the name of a result", "use letters, digits, spaces and -_.,+@%=(), at most 100, a letter first"
        )
    if name.lower() in reserved:
        raise UsageError(f"a result cannot be called `{name}`: the run keeps its own files there", "choose another label")
    return name


@contextmanager
def run_folder(
    out: Path,
    identity: dict[str, Any],
    entries: Sequence[str],
    *,
    overwrite: bool,
    inputs: Inputs = (),
    owned: Callable[[Path], None] | None = None,
) -> Iterator[tuple[Path, bool]]:
    """The folder in which a run works, locked for its length.

    A new run works in ``out`` itself. One that replaces another run works beside it, and takes its place when it has succeeded:
    only the entries that the old run's marker lists are removed.

    Args:
        out: the run's folder.
        identity: what the run is, its recipe and its texts, as plain values; an interrupted run of the same is gone on with.
        entries: names of what the run will write into it.
        overwrite: replace a run of another recipe, or start over.
        inputs: what the run reads: it may not write there.
        owned: sees that an entry of a run that is replaced holds nothing else.

    Yields:
        The folder to work in, and whether it goes on with an interrupted run.

    Raises:
        StorageError: the folder holds something else, or another process is at work in it.
    """
    with output(out, overwrite=True, folder=True, inputs=inputs) as target:
        marker = _marker(target)
        if marker is not None and marker["run"] == identity and not overwrite:
            yield target, True
            return
        if marker is None and target.exists() and any(target.iterdir()):
            raise StorageError(f"`{out}` already exists and holds no run of fasc", "choose another --out")
        if marker is not None and not overwrite:
            raise StorageError(
                f"`{out}` holds a run of another recipe, or of text that has changed since",
                "choose another --out, or pass --overwrite",
            )
        if marker is None:
            write_json(target / MARKER, _content(identity, entries))
            with _nothing_left_of_nothing(target):
                yield target, False
            return
        for name in marker["entries"]:
            if owned is not None and (target / name).is_dir() and not (target / name).is_symlink():
                owned(target / name)
        _require_free(target, entries, marker["entries"])
        beside = target.with_name(f".{target.name}.run")
        unfinished = _marker(beside)
        goes_on = unfinished is not None and unfinished["run"] == identity
        if not goes_on:
            shutil.rmtree(beside, ignore_errors=True)
            write_json(beside / MARKER, _content(identity, entries))
        yield beside, goes_on
        _take_place(beside, target, marker["entries"])


@contextmanager
def _nothing_left_of_nothing(target: Path) -> Iterator[None]:
    """A run that failed before it wrote anything leaves no marker."""
    try:
        yield
    finally:
        with suppress(OSError):
            if [entry.name for entry in target.iterdir()] == [MARKER]:
                (target / MARKER).unlink()


def _content(identity: dict[str, Any], entries: Sequence[str]) -> dict[str, Any]:
    return {"written_by": "fasc run", "run": identity, "entries": [*entries, MARKER]}


def _marker(folder: Path) -> dict[str, Any] | None:
    file = folder / MARKER
    if not file.is_file():
        return None
    content = read_json(file)
    entries = content.get("entries") if isinstance(content, dict) else None
    if not isinstance(entries, list) or "run" not in content or not all(_is_plain(name) for name in entries):
        raise StorageError(f"`{file}` is no marker of a run", "choose another --out")
    found: dict[str, Any] = content
    return found


def _is_plain(name: Any) -> bool:
    """Whether an entry lies in the folder itself: a path would lead to what is not ours."""
    return isinstance(name, str) and name not in ("", ".", "..") and Path(name).name == name


def _require_free(target: Path, entries: Sequence[str], own: Sequence[str]) -> None:
    """What the new run will write must be new, or the old run's."""
    taken = [name for name in entries if (target / name).exists() and name not in own]
    if taken:
        raise StorageError(f"`{target / taken[0]}` is not the run's, and the new run would write there", "choose another --out")


def _take_place(beside: Path, target: Path, own: Sequence[str]) -> None:
    for name in own:
        entry = target / name
        if entry.is_dir() and not entry.is_symlink():
            shutil.rmtree(entry)
        else:
            entry.unlink(missing_ok=True)
    for entry in list(beside.iterdir()):
        entry.rename(target / entry.name)
    beside.rmdir()
