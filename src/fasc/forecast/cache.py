"""Forecasts kept in the cache: planning another rate from the same moments does not compute them again."""

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from fasc.processes import current
from fasc.provenance import digest
from fasc.storage import cache_root

Curves = Mapping[str, NDArray[np.float64]]

_FILES = 16
"""So many files are kept, the last used; one of a model of 135M parameters has 4 MB for each way to forecast."""


@contextmanager
def kept_forecasts(statistics: str | None, held_out: str | None = None) -> Iterator[dict[str, Curves]]:
    """Forecasts of earlier calls, to be handed to :func:`~fasc.planning.make.plan_model`; what that adds is kept.

    They are those of the same moments by the same code: the file's name is a digest of both. A file that cannot be read or
    written is as good as none.

    Args:
        statistics: digest of the file of moments that calibrate; nothing is kept of moments that no file holds.
        held_out: of that of other text, by which the loss is forecast.
    """
    if statistics is None:
        yield {}
        return
    file = cache_root() / "forecasts" / f"{digest(_parts(statistics, held_out))}.safetensors"
    known = _of_the_first(file)
    before = set(known)
    try:
        yield known
    finally:
        if set(known) != before and current().first:
            _write(file, known)


def _of_the_first(file: Path) -> dict[str, Curves]:
    """What the first process has kept, at each of them: all must leave out the same work."""
    own = _read(file) if current().first else {}
    first = current().exchanged({name: torch.from_numpy(np.ascontiguousarray(curve)) for name, curve in own.items()})[0]
    return _nested({name: curve.numpy() for name, curve in first.items()})


def _parts(statistics: str, held_out: str | None) -> Iterator[bytes]:
    yield f"{torch.__version__} {statistics} {held_out}".encode()
    for path in sorted(Path(__file__).parents[1].rglob("*.py")):
        yield path.read_bytes()


_BETWEEN = "\n"
"""Separates the two keys of a curve in a tensor's name."""


def _read(file: Path) -> dict[str, NDArray[np.float64]]:
    found: dict[str, NDArray[np.float64]] = {}
    with suppress(OSError, SafetensorError):
        found = load_file(file)
        file.touch()
    return found


def _nested(found: Mapping[str, NDArray[np.float64]]) -> dict[str, Curves]:
    known: dict[str, dict[str, NDArray[np.float64]]] = {}
    for name, curve in found.items():
        key, _, unit = name.partition(_BETWEEN)
        known.setdefault(key, {})[unit] = curve
    return {**known}


def _write(file: Path, known: dict[str, Curves]) -> None:
    curves = {f"{key}{_BETWEEN}{unit}": curve for key, found in known.items() for unit, curve in found.items()}
    # Not `storage.new_file`: its scratch has one name, and calls from the same moments may well run side by side.
    scratch = file.with_name(f".{os.getpid()}.partial")
    with suppress(OSError, SafetensorError):
        file.parent.mkdir(parents=True, exist_ok=True)
        save_file({name: np.ascontiguousarray(curve) for name, curve in curves.items()}, scratch)
        scratch.replace(file)
        for old in sorted(file.parent.glob("*.safetensors"), key=lambda path: path.stat().st_mtime)[:-_FILES]:
            old.unlink(missing_ok=True)
    with suppress(OSError):
        scratch.unlink(missing_ok=True)
