"""Killing a verb at every file that it finishes or gives its name, and seeing whether the same command ends as if nothing had been.

A kill point is the n-th call of the interpreter that renames, removes or opens a file for writing (``sys.addaudithook`` sees all).
"""

import contextlib
import hashlib
import io
import json
import os
import shutil
import signal
import sys
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path

from tests.fuzz.surfaces import Base, make_base

WATCHED = ("os.rename", "os.remove", "os.rmdir", "open")
SIGNALS = (signal.SIGKILL, signal.SIGTERM, signal.SIGINT)


def verbs(base: Base, place: Path) -> dict[str, tuple[list[str], Path]]:
    """Each verb that works for long: its arguments, and what it makes."""
    budget = ["--param-fraction", "0.7", "--overhead", "0", "--damping", "1e-2", "--rank-multiple", "1"]
    text = ["--corpus", str(base.text), "--sequences", "20", "--sequence-length", "16"]
    recover = [str(base.checkpoint), *text, "--batch-tokens", "64", "--out", str(place / "recovered")]
    score = ["--benchmarks", "perplexity,kl", "--corpus", str(base.text), "--windows", "2", "--context", "16"]
    return {
        "collect": (
            ["collect", str(base.model), *text, "--out", str(place / "moments.safetensors")],
            place / "moments.safetensors",
        ),
        "plan": (
            ["plan", str(base.model), "--statistics", str(base.statistics), *budget, "--json", str(place / "plan.json")],
            place / "plan.json",
        ),
        "compress": (["compress", str(base.model), *text, *budget, "--out", str(place / "small")], place / "small"),
        "recover": (["recover", *recover], place / "recovered"),
        "evaluate": (["evaluate", str(base.checkpoint), *score, "--json", str(place / "scores.json")], place / "scores.json"),
        "run": (["run", str(base.recipe), "--out", str(place / "run")], place / "run"),
    }


def command(arguments: Sequence[str]) -> int:
    """The command in this process, silently."""
    from fasc.cli.app import main

    sys.argv = ["fasc", *arguments]
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            main()
        except SystemExit as stopped:
            return int(stopped.code or 0)
    return 0


def _counted(event: str, arguments: tuple[object, ...], inside: str) -> bool:
    if event not in WATCHED or not arguments or inside not in str(arguments[0]):
        return False
    return event != "open" or any(letter in str(arguments[1] or "") for letter in "wax")


def _child(arguments: Sequence[str], inside: str, stop: tuple[int, int] | None, counter: Path | None) -> None:
    """Run the command; at the n-th watched call the process gets a signal, or the calls are counted."""
    os.environ["FASC_CACHE"] = inside + "/cache"
    seen = 0

    def hook(event: str, given: tuple[object, ...]) -> None:
        nonlocal seen
        if _counted(event, given, inside):
            seen += 1
            if stop is not None and seen == stop[0]:
                os.kill(os.getpid(), stop[1])

    sys.addaudithook(hook)
    code = command(arguments)
    if counter is not None:
        done = seen
        counter.write_text(str(done), encoding="utf-8")
    os._exit(code)


def apart(arguments: Sequence[str], inside: Path, stop: tuple[int, int] | None = None, counter: Path | None = None) -> int | None:
    """Run in a process of its own; its exit code."""
    process = get_context("fork").Process(target=_child, args=(list(arguments), str(inside), stop, counter))
    process.start()
    process.join(180)
    if process.is_alive():
        process.kill()
        process.join()
        return None
    return process.exitcode


def fingerprint(made: Path) -> dict[str, str]:
    """Weights, moments and numbers; not the times and places at which they were made."""
    files = [made] if made.is_file() else sorted(file for file in made.rglob("*") if file.is_file())
    result = {}
    for file in files:
        name = str(file.relative_to(made)) if file != made else file.name
        if file.suffix == ".safetensors":
            from safetensors import safe_open

            with safe_open(file, framework="pt") as tensors:
                content = b"".join(key.encode() + tensors.get_tensor(key).numpy().tobytes() for key in sorted(tensors.keys()))
        elif file.suffix == ".json" and file.name in ("scores.json", "plan.json", "fasc_plan.json"):
            value = json.loads(file.read_text(encoding="utf-8"))
            content = json.dumps({key: one for key, one in value.items() if key != "provenance"}).encode()
        else:
            content = b""
        result[name] = hashlib.sha256(content).hexdigest()
    return result


@dataclass(frozen=True)
class Kill:
    """One kill point and what became of it."""

    verb: str
    call: int
    of: int
    signal: str
    survived: bool
    why: str = ""


def kill_everywhere(folder: Path, model: Path, most: int, only: Sequence[str] = ()) -> Iterator[Kill]:
    """Every verb, at points spread over its calls.

    Args:
        folder: to work in.
        model: a tiny dense model.
        most: points for each verb.
        only: verbs; all without.
    """
    base = make_base(_fresh(folder / "base"), model, lambda *arguments: (command([str(one) for one in arguments]), "", ""))
    for verb in verbs(base, folder):
        if only and verb not in only:
            continue
        whole = _fresh(folder / f"{verb}-whole")
        arguments, made = verbs(base, whole)[verb]
        counter = folder / f"{verb}-calls"
        assert apart(arguments, whole, counter=counter) == 0, verb
        expected, calls = fingerprint(made), int(counter.read_text())
        count = min(most, calls)
        for number in range(count):
            call, sign = 1 + number * calls // count, SIGNALS[number % len(SIGNALS)]
            place = _fresh(folder / f"{verb}-killed")
            arguments, made = verbs(base, place)[verb]
            apart(arguments, place, (call, sign))
            done = made.exists() and fingerprint(made) == expected  # killed when all was written
            code = apart(arguments, place)
            why = "" if code == 0 or (done and code == 2) else f"the second call ended with {code}"
            if not why and fingerprint(made) != expected:
                why = "other numbers or files than of an undisturbed run"
            litter = [
                str(file.relative_to(place))
                for file in place.rglob("*")
                if any(part in file.name for part in (".partial-", ".old-", ".tmp"))
            ]
            litter += [entry.name for entry in place.iterdir() if entry not in (made, place / "cache")]
            if not why and litter:
                why = f"left {litter[:3]}"
            yield Kill(verb, call, calls, signal.Signals(sign).name, not why, why)


def _fresh(folder: Path) -> Path:
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    return folder
