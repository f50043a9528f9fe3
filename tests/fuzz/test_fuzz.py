"""Whatever is handed in ends well, or in one clear line; and nothing else of the user's is touched.

A case is a surface and a seed, so that it can be repeated: ``FASC_FUZZ_CASE=corpus:17 pytest tests/fuzz``. ``make test`` runs a few;
``make fuzz`` runs many and writes the table of docs/security.md.
"""

import hashlib
import json
import math
import os
import random
import shutil
import signal
import sys
import warnings
from pathlib import Path

import pytest
from safetensors.torch import load_file

from fasc.cli.app import main
from tests.fuzz.surfaces import SURFACES, make_base

BUDGET = int(os.environ.get("FASC_FUZZ", "63"))
FOUND = [tuple(line.split(":")) for line in Path(__file__).with_name("found.txt").read_text().split()]
"""Cases that failed once."""

ONE = os.environ.get("FASC_FUZZ_CASE")
CASES = (
    [tuple(ONE.split(":"))]
    if ONE
    else list(
        dict.fromkeys([*FOUND, *((name, str(seed)) for seed in range(math.ceil(BUDGET / len(SURFACES))) for name in SURFACES)])
    )
)
SECONDS = 20
"""After these a case is interrupted: what asks for much work gets it."""

INTERRUPTED = 130
LITTER = (".partial-", ".old-", ".tmp")


class NotGoodError(Exception):
    """What became of a case, where it is not good."""


@pytest.fixture(scope="module")
def run():
    """The command in this process."""

    def call(*arguments):
        import io
        from contextlib import redirect_stderr, redirect_stdout

        out, err = io.StringIO(), io.StringIO()
        before = sys.argv
        sys.argv = ["fasc", *map(str, arguments), *(["--debug"] if ONE else [])]
        try:
            signal.alarm(SECONDS)
            with redirect_stdout(out), redirect_stderr(err), warnings.catch_warnings():
                warnings.simplefilter("ignore")
                main()
        except SystemExit as stopped:
            code = stopped.code or 0
        finally:
            signal.alarm(0)
            sys.argv = before
        return code, out.getvalue(), err.getvalue()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("fasc.cli.app.INTERRUPT.install", lambda: None)
        patch.setattr("fasc.cli.app._let_go_of_stdout", lambda: True)
        patch.setattr("fasc.model.embedded.EMBEDDED", {})  # a recipe that lost its model would take the real one
        before = signal.signal(signal.SIGALRM, _stop)
        yield call
        signal.signal(signal.SIGALRM, before)


@pytest.fixture(scope="module")
def base(run, model_folder, tmp_path_factory):
    return make_base(tmp_path_factory.mktemp("base"), model_folder, run)


@pytest.fixture(scope="module")
def tally():
    """Outcomes by surface; written where ``FASC_FUZZ_OUT`` says."""
    counts = {name: {"success": 0, "one clean line": 0, "still at work": 0, "internal": 0, "silent": 0} for name in SURFACES}
    yield counts
    out = os.environ.get("FASC_FUZZ_OUT")
    if out:
        Path(out).write_text(json.dumps(counts, indent=1) + "\n", encoding="utf-8")


def _stop(*_):
    raise KeyboardInterrupt


def digest(folder):
    """Of every file that was there before."""
    return {file: hashlib.sha256(file.read_bytes()).hexdigest() for file in sorted(folder.rglob("*")) if file.is_file()}


def require_clean(code, err):
    """Exit code 2, one error line, one hint."""
    lines = err.strip().splitlines()
    clean = code == 2 and "Traceback" not in err and "internal error" not in err
    if not (
        clean and len(lines) >= 2 and lines[-2].startswith("error: ") and lines[-1].startswith("hint: ") and len(lines[-1]) > 6
    ):
        raise NotGoodError("internal", f"exit code {code}: {err[-1500:]}")


def require_sound(place):
    """What a successful command wrote holds finite numbers."""
    for file in place.rglob("*.safetensors"):
        if file.parent.name in ("model", "small") or file.name == "statistics.safetensors":
            continue  # the input
        for name, tensor in load_file(file).items():
            if tensor.is_floating_point() and not bool(tensor.isfinite().all()):
                raise NotGoodError("silent", f"`{name}` in {file.name} is not finite")


@pytest.mark.parametrize("surface,seed", CASES, ids=lambda part: part)
@pytest.mark.filterwarnings("ignore")
def test_any_input_ends_well_or_in_one_clear_line(surface, seed, base, run, tally, tmp_path, monkeypatch):
    place = tmp_path / "here"
    place.mkdir()
    (tmp_path / "beside").mkdir()
    (tmp_path / "beside" / "precious.json").write_text("{}", encoding="utf-8")
    (place / "precious.txt").write_text("mine", encoding="utf-8")
    monkeypatch.chdir(place)
    command = SURFACES[surface](base, place, random.Random(f"{surface}:{seed}"))
    before = digest(tmp_path) | digest(base.text.parent) | digest(base.model)
    code, out, err = run(*command)
    kind = {0: "success", INTERRUPTED: "still at work"}.get(code, "one clean line")
    try:
        if code == 0:
            require_sound(place)
            if "nan" in out.lower().split() and "nan" not in command:
                raise NotGoodError("silent", f"printed: {out[-500:]}")
        elif code != INTERRUPTED:
            require_clean(code, err)
        after = digest(tmp_path) | digest(base.text.parent) | digest(base.model)
        cards = (
            [place / "small" / "README.md"] if command[0] == "evaluate" else []
        )  # scores go into the card of a checkpoint of ours
        changed = [file for file, value in before.items() if after.get(file) != value and file not in cards]
        if changed:
            raise NotGoodError("silent", f"changed: {changed}")
        named = [(place / part).resolve() for part in command if "\0" not in part]  # `--out ../x` means what it says
        new = [file for file in after if file not in before and not any(file.is_relative_to(one) for one in named)]
        outside = [file for file in new if not file.is_relative_to(place) and "cache" not in str(file)]
        litter = [
            file for file in after if any(mark in str(file.relative_to(file.anchor)) for mark in LITTER) and file not in before
        ]
        if outside or litter:
            raise NotGoodError("silent", f"left behind: {outside or litter}")
    except NotGoodError as outcome:
        kind = outcome.args[0]
        pytest.fail(f"{surface}:{seed} `fasc {' '.join(command)}` → {outcome.args[0]}: {outcome.args[1]}")
    finally:
        tally[surface][kind] += 1
        shutil.rmtree(tmp_path, ignore_errors=True)


@pytest.mark.parametrize("surface", sorted(set(SURFACES) - {"options"}))
@pytest.mark.filterwarnings("ignore")
def test_undamaged_the_same_command_succeeds(surface, base, run, tmp_path, monkeypatch):
    """So that no case is refused for another reason than its damage."""
    monkeypatch.chdir(tmp_path)
    for name in ("json_of", "bytes_of"):
        monkeypatch.setattr(
            f"tests.fuzz.mutations.{name}", lambda value, _: json.dumps(value) if not isinstance(value, bytes) else value
        )
    for name in ("json_file", "safetensors_file", "text_file", "toml_file"):
        monkeypatch.setattr(f"tests.fuzz.mutations.{name}", lambda *_: None)
    for seed in range(3):
        place = tmp_path / str(seed)
        place.mkdir()
        monkeypatch.chdir(place)
        monkeypatch.setattr(Path, "unlink", lambda *_, **__: None) if surface in ("model", "checkpoint") else None
        code, _, err = run(*SURFACES[surface](base, place, random.Random(seed)))
        assert code == 0, err
