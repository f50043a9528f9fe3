"""What a run did not choose: versions, digests, the machine."""

import hashlib
import os
import platform
import subprocess
import sys
from collections.abc import Iterable, Mapping
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

_PACKAGES = ("fasc", "torch", "transformers", "safetensors", "numpy", "scipy")


def digest(parts: Iterable[bytes]) -> str:
    """SHA-256 of the parts in order, as hexadecimal."""
    state = hashlib.sha256()
    for part in parts:
        state.update(part)
    return state.hexdigest()


def file_digest(path: Path) -> str:
    """SHA-256 of a file."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def versions() -> dict[str, str]:
    """Of Python and of the packages that numbers depend on."""
    found = {"python": platform.python_version()}
    for package in _PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def _git_revision() -> str | None:
    """The commit of the source tree this package runs from, if it runs from one."""
    root = Path(__file__).parents[2]
    if not (root / ".git").exists():
        return None
    command = ["git", "-C", str(root), "rev-parse", "HEAD"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return done.stdout.strip() or None


def _processor() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def machine() -> dict[str, Any]:
    """Processor, cores this process may use, operating system, and the first GPU if torch sees one."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    found = {"processor": _processor(), "cores": cores, "system": platform.platform(terse=True)}
    torch = sys.modules.get("torch")  # what has not been loaded did no work
    if torch is not None and torch.cuda.is_available():
        found["accelerator"] = torch.cuda.get_device_name()
    return found


def recoveries(made: Mapping[str, Any]) -> list[dict[str, Any]]:
    """What provenance says of each recovery, the first one first; one that follows another holds that as ``after``."""
    found: list[dict[str, Any]] = []
    one = made.get("recovery")
    while one is not None:
        found.insert(0, one)
        one = one.get("after")
    return found


def provenance(**facts: Any) -> dict[str, Any]:
    """Versions, git revision, command, time and machine, with the caller's own facts (digests, token counts)."""
    return {
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": [Path(sys.argv[0]).name, *sys.argv[1:]],
        "versions": versions(),
        "git_revision": _git_revision(),
        "machine": machine(),
        **facts,
    }
