"""The command as a whole: help, exit codes, one clear line for every kind of bad input, interrupts, a full disk."""

import errno
import os
import resource
import signal
import subprocess
import sys
import time
from collections import namedtuple
from pathlib import Path

import pytest

from fasc.cli.app import app
from fasc.errors import UsageError
from tests.cli.conftest import CALIBRATION, refused

VERBS = sorted(command.callback.__name__.replace("_", "-") for command in app.registered_commands)


def test_help_is_fast_and_names_every_verb():
    done = subprocess.run(
        [sys.executable, "-X", "importtime", "-m", "fasc", "--help"], capture_output=True, text=True, check=True
    )
    lines = done.stdout.splitlines()
    summaries = {line.split()[0]: line for line in lines[lines.index("Commands:") + 1 :] if line.strip()}
    assert sorted(summaries) == VERBS
    assert not any(line.endswith("...") for line in summaries.values()), "a summary fits into its line"
    loaded = {line.rpartition("|")[2].strip() for line in done.stderr.splitlines()}
    assert "fasc.cli.app" in loaded
    assert not loaded & {"torch", "transformers", "matplotlib", "datasets", "pandas", "scipy"}


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_explains_each_of_its_options(done, verb):
    out, _ = done(verb, "--help")
    command = next(one for one in app.registered_commands if one.callback.__name__.replace("_", "-") == verb)
    assert out.startswith(f"Usage: fasc {verb}")
    for argument in command.callback.__annotations__:
        if argument not in ("return", "recipe", "folder", "alias", "checkpoint", "model", "models", "runs"):
            flag = {"engine": "for", "form": "format", "kind": "type"}.get(argument, argument.replace("_", "-"))
            assert f"--{flag} " in out.replace("\n", " "), argument
    assert "``" not in out, "help is plain text"


def test_the_version_is_printed(done):
    from fasc import __version__

    assert done("--version")[0].strip() == __version__


def test_debug_shows_the_traceback_wherever_it_stands(fasc, model_folder):
    for arguments in (["--debug", "evaluate", model_folder], ["evaluate", model_folder, "--debug"]):
        code, _, err = fasc(*arguments, "--benchmarks", "fact")
        assert code == 2
        assert "Traceback" in err
        assert err.strip().splitlines()[-1].startswith("hint: ")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["compress", "smollm2-136m", "--out", "OUT"], ["unknown model `smollm2-136m`"]),
        (["compress", "MODEL", "--method", "facs", "--out", "OUT"], ["unknown method `facs`", "did you mean `fasc`?"]),
        (["compress", "MODEL", "--corpus", "wikitxt2", "--out", "OUT"], ["unknown corpus", "did you mean `wikitext2`?"]),
        (["evaluate", "MODEL", "--benchmarks", "fact"], ["unknown benchmark `fact`", "did you mean `facts`?"]),
        (["compress", "MODEL", "--rank-fraction", "0", "--out", "OUT"], ["--rank-fraction is 0, outside (0, 1]"]),
        (["compress", "MODEL", "--rank-fraction", "1.5", "--out", "OUT"], ["--rank-fraction is 1.5, outside (0, 1]"]),
        (
            ["compress", "MODEL", "--rank-fraction", "0.001", "--corpus", "TEXT", *CALIBRATION, "--out", "OUT"],
            ["0.001 leaves no direction"],
        ),
        (["compress", "MODEL", "--rank-fraction", "half", "--out", "OUT"], ["--rank-fraction", "valid number"]),
        (["compress", "MODEL", "--labels", "true", "--corpus", "TEXT", "--out", "OUT"], ["--labels"]),
        (["compress", "MODEL", "--sequences", "0", "--out", "OUT"], ["--sequences"]),
        (["compress", "MODEL", "--seed", str(2**65), "--corpus", "TEXT", "--out", "OUT"], ["--seed"]),
        (["compress", "MODEL", "--corpus", "EMPTY", "--out", "OUT"], ["empty"]),
        (["compress", "MODEL", "--corpus", "TEXT", "--sequences", "99999", "--out", "OUT"], ["too short"]),
        (["compress", "MODEL", "--corpus", "LATIN", "--out", "OUT"], ["line 2", "not UTF-8"]),
        (["compress", "MODEL"], ["--out"]),
        (["compres", "MODEL"], ["compres"]),
        (["compress", "MODEL", "--rnak", "1", "--out", "OUT"], ["--rnak"]),
        (["collect", "MODEL", "--methods", ",", "--out", "OUT"], ["empty list of names"]),
        (["evaluate", "MODEL", "--benchmarks", "kl", "--corpus", "TEXT"], ["--dense"]),
        (["evaluate", "MODEL", "--benchmarks", "lama"], ["lama/trex.jsonl.gz"]),
        (["evaluate", "MODEL", "--device", "warp"], ["unknown device"]),
        (["evaluate", "MODEL", "--device", "meta"], ["meta"]),
        (["evaluate", "MODEL", "--device", "mps"], ["mps"]),
        (["pull", "smollm3"], ["unknown embedded model"]),
        (["report", "OUT"], ["is no folder"]),
        (["run", "nowhere.toml", "--out", "OUT"], ["does not exist"]),
        (["recover", "MODEL", "--out", "OUT"], ["no checkpoint of fasc"]),
        (["compress", "nowhere.gguf", "--out", "OUT"], ["does not exist"]),
        (["diagnose", "MODEL", "--exclusions", "some"], ["--exclusions is `some`"]),
        (["subspace-overlap", "MODEL", "--seeds", "0"], ["leaves nothing to compare"]),
        (["validate", "MODEL", "--rank-fractions", "2"], ["--rank-fraction", "outside (0, 1]"]),
    ],
    ids=lambda value: " ".join(str(v) for v in value)[:60] if isinstance(value, list) else None,
)
def test_bad_arguments_get_one_line_and_a_hint(fasc, model_folder, text_file, tmp_path, monkeypatch, arguments, words):
    monkeypatch.delenv("FASC_DATA", raising=False)
    (tmp_path / "empty.txt").write_text("")
    (tmp_path / "latin.txt").write_bytes(b"ok\ncaf\xe9")
    places = {
        "MODEL": model_folder,
        "OUT": tmp_path / "out",
        "TEXT": text_file,
        "EMPTY": tmp_path / "empty.txt",
        "LATIN": tmp_path / "latin.txt",
    }
    before = set(tmp_path.iterdir())
    refused(fasc(*[places.get(a, a) for a in arguments]), *words)
    assert set(tmp_path.iterdir()) == before, "nothing half-written"


@pytest.mark.parametrize(
    ("problem", "code", "words"),
    [
        (UsageError("what", "do"), 2, ["error: what", "hint: do"]),
        (OSError(errno.ENOSPC, "No space left on device"), 2, ["no space left", "free some space"]),
        (OSError(errno.EACCES, "Permission denied", "x"), 2, ["Permission denied: 'x'"]),
        (MemoryError(), 2, ["out of memory", "--batch-tokens"]),
        (RuntimeError("CUDA out of memory. Tried"), 2, ["out of memory"]),
        (RuntimeError("two\nlines"), 1, ["internal error: RuntimeError: two lines", "--debug"]),
        (KeyboardInterrupt(), 130, ["interrupted"]),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, BaseException) else None,
)
def test_what_is_raised_becomes_one_line_and_an_exit_code(fasc, monkeypatch, problem, code, words):
    def fails(*_arguments, **_options):
        raise problem

    monkeypatch.setattr("fasc.reporting.page.write.report", fails)
    returned, out, err = fasc("report", "folder")
    assert returned == code
    assert not out
    assert len(err.strip().splitlines()) == 2
    assert all(word in err for word in words)


def test_no_space_left_is_seen_before_the_work_is_lost(fasc, model_folder, text_file, tmp_path, monkeypatch):
    """The measured moments stay beside the output, so that the same command goes on from them."""
    usage = namedtuple("usage", "total used free")
    with monkeypatch.context() as patch:
        patch.setattr("fasc.storage.shutil.disk_usage", lambda _: usage(10**9, 10**9 - 1000, 1000))
        command = ["compress", model_folder, "--corpus", text_file, *CALIBRATION, "--damping", "1e-3", "--out", tmp_path / "o"]
        refused(fasc(*command), "no space left")
    assert {file.name for file in tmp_path.iterdir()} == {"text.txt", ".o.work"}
    code, _, err = fasc(*command)
    assert code == 0, err
    assert "measuring moments" not in err
    assert {file.name for file in tmp_path.iterdir()} == {"text.txt", "o"}


def test_a_disk_that_fills_up_while_writing_leaves_no_result(model_folder, text_file, tmp_path):
    """A real refusal by the operating system: the process may write no file larger than 20 kB."""

    def limit():
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))

    arguments = ["compress", model_folder, "--corpus", text_file, *CALIBRATION, "--damping", "1e-3", "--out", tmp_path / "o"]
    command = [sys.executable, "-m", "fasc", *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, preexec_fn=limit, check=False)
    refused((done.returncode, done.stdout, done.stderr), "no space left")
    assert {file.name for file in tmp_path.iterdir()} == {"text.txt", ".o.work"}
    assert [file.name for file in (tmp_path / ".o.work").rglob("*")] == ["key.json"], "nothing half-written"


def _heed_signals():
    """As a terminal does: a shell's background job hands on an ignored SIGINT, and ``nohup`` an ignored SIGHUP."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_DFL)


def started(arguments, until):
    """A command that runs until stderr says so."""
    command = [sys.executable, "-m", "fasc", *map(str, arguments)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, preexec_fn=_heed_signals)
    deadline = time.monotonic() + 120
    line = ""
    while until not in line and time.monotonic() < deadline and process.poll() is None:
        line = process.stderr.readline()
    assert until in line
    return process


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP], ids=lambda number: number.name)
def test_an_interrupt_leaves_nothing_and_exits_with_130(model_folder, tmp_path, number):
    process = started(["compress", model_folder, "--corpus", "self", "--sequences", "5000", "--out", tmp_path / "o"], "sampling")
    os.kill(process.pid, number)
    try:
        _, err = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 130
    assert "Traceback" not in err
    assert err.strip().splitlines()[-2] == "error: interrupted"
    assert not list(tmp_path.iterdir())


def test_a_signal_while_an_error_is_told_changes_nothing(tmp_path):
    """Of several processes that fail alike, one speaks while it is told to end because another has."""
    program = """if True:
        import os, signal
        from fasc.cli import app, processes
        def voice(message, *_, **__):
            os.kill(os.getpid(), signal.SIGTERM)
            return message
        processes.voice = voice
        app.main()
    """
    command = [sys.executable, "-c", program, "plan", str(tmp_path / "none"), "--rank-fraction", "0.5"]
    done = subprocess.run(command, capture_output=True, text=True, preexec_fn=_heed_signals, check=False)
    assert len(refused((done.returncode, done.stdout, done.stderr), "no such")) == 2


def test_a_full_stdout_after_the_work_is_said_and_no_traceback(model_folder, text_file, tmp_path):
    arguments = ["collect", model_folder, "--corpus", text_file, *CALIBRATION, "--out", tmp_path / "s.safetensors"]
    with Path("/dev/full").open("w") as full:
        command = [sys.executable, "-m", "fasc", *map(str, arguments)]
        done = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True, check=False)
    refused((done.returncode, "", done.stderr), "could not be printed")
    assert (tmp_path / "s.safetensors").is_file()


def test_a_reader_that_has_had_enough_is_no_error(model_folder):
    """``fasc plan | head -1``."""
    command = f"{sys.executable} -m fasc plan {model_folder} --rank-fraction 0.5 | true; exit ${{PIPESTATUS[0]}}"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr
    assert "BrokenPipe" not in done.stderr
