"""The command line as scripts and people use it: contracts, and one clear line for every kind of bad input."""

import errno
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections import namedtuple
from functools import partial

import pytest
import torch
from safetensors.torch import load_file, save_file

from fasc.cli.app import main
from fasc.planning.options import BudgetConfig
from fasc.pipeline import budget_of

CALIBRATION = ["--sequences", "20", "--sequence-length", "16", "--damping", "1e-3"]


@pytest.fixture
def fasc(monkeypatch, capsys):
    """Run the command in this process; give back (exit code, stdout, stderr)."""

    monkeypatch.setattr("fasc.cli.app.INTERRUPT.install", lambda: None)  # pytest keeps its own Ctrl-C

    def call(*arguments):
        monkeypatch.setattr(sys, "argv", ["fasc", *map(str, arguments)])
        with pytest.raises(SystemExit) as stopped:
            main()
        out, err = capsys.readouterr()
        return stopped.value.code or 0, out, err

    return call


def refused(result, *words):
    """Exit code 2, one error line with these words, one hint line, no traceback."""
    code, out, err = result
    assert code == 2, err
    lines = err.strip().splitlines()
    assert lines[-2].startswith("error: "), err
    assert lines[-1].startswith("hint: "), err
    assert len(lines[-1]) > len("hint: ")
    assert "Traceback" not in err
    assert "internal error" not in err
    for word in words:
        assert word in "\n".join(lines[-2:]), err
    return lines


@pytest.fixture
def compressed(fasc, model_folder, text_file, tmp_path):
    out = tmp_path / "compressed"
    code, _, err = fasc(
        "compress",
        model_folder,
        "--method",
        "fasc",
        "--rank-fraction",
        "0.5",
        "--corpus",
        text_file,
        *CALIBRATION,
        "--out",
        out,
    )
    assert code == 0, err
    return out


def test_compress_and_evaluate_keep_their_contract(fasc, compressed, model_folder, text_file, tmp_path):
    scores = tmp_path / "scores.json"
    code, out, err = fasc(
        "evaluate",
        compressed,
        "--benchmarks",
        "facts,perplexity,kl",
        "--corpus",
        text_file,
        "--context",
        "16",
        "--limit",
        "20",
        "--dense",
        model_folder,
        "--json",
        scores,
    )
    assert code == 0, err
    found = json.loads(scores.read_text())
    assert {"benchmark", "metric", "value", "low", "high", "n"} <= set(found[0])
    assert {row["benchmark"] for row in found} == {"facts", "perplexity", "kl"}
    assert all(row["low"] <= row["value"] <= row["high"] for row in found)
    assert "facts" in out
    assert "warning" in err, "the text is the one it was calibrated on"


def test_kl_finds_the_dense_model_by_itself(fasc, compressed, text_file, tmp_path):
    code, _, err = fasc("evaluate", compressed, "--benchmarks", "kl", "--corpus", text_file, "--context", "16", "--limit", "4")
    assert code == 0, err


def test_results_go_to_stdout_and_progress_to_stderr(fasc, model_folder, text_file, tmp_path):
    code, out, err = fasc(
        "collect",
        model_folder,
        "--methods",
        "fasc,svd",
        "--corpus",
        text_file,
        *CALIBRATION[:4],
        "--out",
        tmp_path / "s.safetensors",
    )
    assert code == 0
    assert out.strip() == str(tmp_path / "s.safetensors")
    assert "measuring moments" in err
    assert "left" in err


def test_stored_statistics_and_plans_are_used(fasc, model_folder, text_file, tmp_path):
    statistics, plan = tmp_path / "s.safetensors", tmp_path / "plan.json"
    assert (
        fasc("collect", model_folder, "--methods", "fasc", "--corpus", text_file, *CALIBRATION[:4], "--out", statistics)[0] == 0
    )
    code, out, _ = fasc("plan", model_folder, "--rank-fraction", "0.5", "--json", plan)
    assert code == 0
    assert "q_proj+k_proj+v_proj" in out
    raw = json.loads(plan.read_text())
    assert {"rank_fraction", "param_fraction", "model_fraction", "bytes", "predicted_loss"} <= set(raw["totals"])
    raw["groups"][0]["rank"] = 3
    plan.write_text(json.dumps(raw))
    code, _, err = fasc(
        "compress",
        model_folder,
        "--statistics",
        statistics,
        "--plan",
        plan,
        "--damping",
        "1e-3",
        "--out",
        tmp_path / "o",
    )
    assert code == 0, err
    assert "measuring" not in err
    stored = load_file(tmp_path / "o" / "model.safetensors")
    assert stored["model.layers.0.self_attn.q_proj.up.weight"].shape == (32, 3)
    refused(
        fasc("compress", model_folder, "--statistics", statistics, "--method", "fasc-eq6", "--out", tmp_path / "p"),
        "lack",
        "cross",
    )
    refused(fasc("compress", model_folder, "--method", "svd", "--plan", plan, "--out", tmp_path / "p"), "plan for `fasc`")
    assert not (tmp_path / "p").exists()


def test_statistics_of_another_model_are_refused(fasc, model_folder, text_file, tmp_path):
    statistics = tmp_path / "s.safetensors"
    assert fasc("collect", model_folder, "--methods", "svd", "--corpus", text_file, *CALIBRATION[:4], "--out", statistics)[0] == 0
    other = tmp_path / "other"
    shutil.copytree(model_folder, other)
    tensors = load_file(other / "model.safetensors")
    tensors["model.norm.weight"] += 1
    save_file(tensors, other / "model.safetensors", metadata={"format": "pt"})
    refused(fasc("compress", other, "--method", "svd", "--statistics", statistics, "--out", tmp_path / "o"), "another model")


def test_diagnose_writes_a_row_per_group(fasc, model_folder, text_file, tmp_path):
    code, out, err = fasc("diagnose", model_folder, "--corpus", text_file, *CALIBRATION, "--json", tmp_path / "d.json")
    assert code == 0, err
    rows = json.loads((tmp_path / "d.json").read_text())
    assert len(rows) == 8
    assert {"group", "block", "kind", "input", "gradient", "methods"} <= set(rows[0])
    assert all(0 < row["rho"] <= 1 and row["rho_floor"] > 0 for row in rows)
    assert rows[0]["predicted_loss"]["fasc"] > 0
    curve = rows[0]["methods"]["fasc"]["curve"]
    assert curve[0] == pytest.approx(1)
    assert curve[-1] == pytest.approx(0, abs=1e-9)
    assert all(a >= b for a, b in zip(curve, curve[1:], strict=False))


def test_merge_writes_a_dense_checkpoint(fasc, model_folder, text_file, tmp_path):
    code, _, err = fasc("compress", model_folder, "--corpus", text_file, *CALIBRATION, "--merge", "--out", tmp_path / "o")
    assert code == 0, err
    assert "quantization_config" not in json.loads((tmp_path / "o" / "config.json").read_text())


def write_recipe(path, model_folder, text_file):
    path.write_text(f"""
[source]
model = "{model_folder}"
[calibration]
corpus = "{text_file}"
sequences = 20
sequence_length = 16
[[methods]]
name = "svd"
[[methods]]
name = "fasc"
damping = 1e-3
[evaluation]
benchmarks = ["facts", "kl", "perplexity"]
corpus = "{text_file}"
context = 16
limit = 10
""")
    return path


def test_a_run_reports_and_goes_on_where_it_stopped(fasc, model_folder, text_file, tmp_path):
    recipe, out = write_recipe(tmp_path / "recipe.toml", model_folder, text_file), tmp_path / "run"
    code, table, err = fasc("run", recipe, "--out", out)
    assert code == 0, err
    assert "dense" in table
    assert "svd" in table
    report = (out / "report.md").read_text()
    assert "| fasc |" in report
    assert "How it was made" in report
    assert (out / "figures" / "summary.png").read_bytes().startswith(b"\x89PNG")
    before = {file: file.stat().st_mtime_ns for file in out.rglob("*.safetensors")}
    (out / "fasc" / "scores.json").unlink()
    code, _, err = fasc("run", recipe, "--out", out)
    assert code == 0, err
    assert {file: file.stat().st_mtime_ns for file in out.rglob("*.safetensors")} == before
    assert "measuring moments" not in err
    assert (out / "fasc" / "scores.json").is_file()
    code, _, _ = fasc("report", out)
    assert code == 0
    recipe.write_text(recipe.read_text().replace("sequences = 20", "sequences = 21"))
    refused(fasc("run", recipe, "--out", out), "another recipe")
    assert (out / "report.md").is_file()
    recipe.write_text(recipe.read_text() + "[[budgets]]\nrank_fraction = 0.25\n")
    code, _, err = fasc("run", recipe, "--out", out, "--overwrite")
    assert code == 0, err
    assert json.loads((out / "fasc" / "plan.json").read_text())["totals"]["rank_fraction"] == pytest.approx(0.25)


def test_a_run_recovers_what_the_recipe_says_and_scores_it_beside_the_rest(fasc, model_folder, text_file, tmp_path):
    recipe, out = write_recipe(tmp_path / "recipe.toml", model_folder, text_file), tmp_path / "run"
    recipe.write_text(
        recipe.read_text()
        + '[[methods]]\nname = "magnitude"\n[[budgets]]\nparam_fraction = 0.6\n'
        + f'[recovery]\ncorpus = "{text_file}"\nsequences = 40\nsequence_length = 16\nbatch_tokens = 64\nlearning_rate = 3e-3\n'
    )
    code, table, err = fasc("run", recipe, "--out", out)
    assert code == 0, err
    rows = {folder.parent.name for folder in out.glob("*/scores.json")}
    assert rows == {"dense", "svd", "svd-recovered", "fasc", "fasc-recovered", "magnitude"}, "masks have no layers to train"
    assert all(row in table for row in rows)
    kl = {
        name: next(s for s in json.loads((out / name / "scores.json").read_text())["scores"] if s["benchmark"] == "kl")["value"]
        for name in ("fasc", "fasc-recovered")
    }
    assert kl["fasc-recovered"] < kl["fasc"]
    assert "recovery" not in json.loads((out / "fasc" / "model" / "fasc_provenance.json").read_text())
    assert json.loads((out / "fasc-recovered" / "model" / "fasc_provenance.json").read_text())["recovery"]["tokens"] == 640
    before = {file: file.stat().st_mtime_ns for file in out.rglob("*.safetensors")}
    (out / "fasc-recovered" / "scores.json").unlink()
    code, _, err = fasc("run", recipe, "--out", out)
    assert code == 0, err
    assert {file: file.stat().st_mtime_ns for file in out.rglob("*.safetensors")} == before
    assert (out / "fasc-recovered" / "scores.json").is_file()


def test_two_results_of_one_name_are_refused(fasc, model_folder, text_file, tmp_path):
    recipe = write_recipe(tmp_path / "recipe.toml", model_folder, text_file)
    plain = recipe.read_text()
    recipe.write_text(plain + '[[methods]]\nname = "fasc"\ndamping = 1e-2\n')
    refused(fasc("run", recipe, "--out", tmp_path / "run"), "`fasc`", "label")
    recipe.write_text(plain + '[[methods]]\nname = "fasc"\nlabel = "svd-recovered"\n[recovery]\n')
    refused(fasc("run", recipe, "--out", tmp_path / "run"), "`svd-recovered`")
    recipe.write_text(plain + '[[methods]]\nname = "fasc"\nlabel = "dense"\n')
    refused(fasc("run", recipe, "--out", tmp_path / "run"), "`dense`")
    assert not (tmp_path / "run").exists()


# ---- bad input -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["compress", "smollm2-136m", "--out", "OUT"], ["unknown model `smollm2-136m`"]),
        (["compress", "MODEL", "--method", "facs", "--out", "OUT"], ["unknown method `facs`", "did you mean `fasc`?"]),
        (
            ["compress", "MODEL", "--corpus", "wikitxt2", "--out", "OUT"],
            ["unknown corpus", "did you mean `wikitext2`?"],
        ),
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
        (["compress", "MODEL", "--corpus", "EMPTY", "--out", "OUT"], ["empty"]),
        (["compress", "MODEL", "--corpus", "TEXT", "--sequences", "99999", "--out", "OUT"], ["too short"]),
        (["compress", "MODEL", "--corpus", "LATIN", "--out", "OUT"], ["line 2", "not UTF-8"]),
        (["compress", "MODEL"], ["--out"]),
        (["compres", "MODEL"], ["compres"]),
        (["compress", "MODEL", "--rnak", "1", "--out", "OUT"], ["--rnak"]),
        (["evaluate", "MODEL", "--benchmarks", "kl", "--corpus", "TEXT"], ["--dense"]),
        (["evaluate", "MODEL", "--benchmarks", "lama"], ["lama/trex.jsonl.gz"]),
        (["evaluate", "MODEL", "--device", "warp"], ["unknown device"]),
        (["pull", "smollm3"], ["unknown embedded model"]),
        (["report", "OUT"], ["no scores"]),
        (["run", "nowhere.toml", "--out", "OUT"], ["does not exist"]),
        (["compress", "nowhere.gguf", "--out", "OUT"], ["does not exist"]),
    ],
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
    ("text", "words"),
    [
        ("[calibration]\nsequence = 3\n", ["calibration.sequence", "no such field"]),
        ("[calibration\n", ["not valid TOML", "line 1"]),
        ("[[budgets]]\nrank_fraction = 2.0\n", ["outside (0, 1]"]),
        ("[[methods]]\nname = 'fas'\n", ["unknown method"]),
    ],
)
def test_bad_recipes_name_the_field(fasc, tmp_path, text, words):
    (tmp_path / "r.toml").write_text(text)
    refused(fasc("run", tmp_path / "r.toml", "--out", tmp_path / "out"), *words)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--gate", "maybe"], "error: --gate: "),
        (["--damping", "-1"], "error: --damping: "),
        (["--layouts", "nope"], "error: --layouts: "),
        (["--param-fraction", "2"], "error: --param-fraction is 2, outside (0, 1]"),
        (["--param-fraction", "0.8", "--layouts", "dense"], "error: a fraction of 0.8 leaves no direction"),
    ],
)
def test_an_option_is_named_as_it_is_typed(fasc, model_folder, arguments, says):
    lines = refused(fasc("plan", model_folder, *arguments))
    assert lines[-2].startswith(says)


def test_an_existing_output_is_refused_before_any_work(fasc, model_folder, text_file, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    (out / "mine.txt").write_text("precious")
    lines = refused(fasc("compress", model_folder, "--corpus", text_file, "--out", out), "already exists", "--overwrite")
    assert len(lines) == 2, "no work was started"
    assert (out / "mine.txt").read_text() == "precious"


def test_a_failed_overwrite_leaves_the_old_output(fasc, compressed, model_folder, text_file):
    before = (compressed / "model.safetensors").read_bytes()
    refused(
        fasc("compress", model_folder, "--corpus", text_file, "--sequences", "99999", "--out", compressed, "--overwrite"),
        "too short",
    )
    assert (compressed / "model.safetensors").read_bytes() == before
    code, _, err = fasc(
        "compress",
        model_folder,
        "--corpus",
        text_file,
        "--rank-fraction",
        "0.25",
        *CALIBRATION,
        "--out",
        compressed,
        "--overwrite",
    )
    assert code == 0, err
    assert (compressed / "model.safetensors").read_bytes() != before
    assert not [file for file in compressed.parent.iterdir() if "partial" in file.name or "old" in file.name]


def damage(model_folder, tmp_path, change):
    folder = tmp_path / "damaged"
    shutil.copytree(model_folder, folder)
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_named(fasc, model_folder, text_file, tmp_path, value):
    def change(tensors):
        tensors["model.layers.1.mlp.up_proj.weight"][3, 4] = value

    folder = damage(model_folder, tmp_path, change)
    refused(
        fasc("compress", folder, "--corpus", text_file, "--out", tmp_path / "o"),
        "model.layers.1.mlp.up_proj.weight",
        "not finite",
    )


def test_a_batch_that_overflows_is_named(fasc, model_folder, text_file, tmp_path):
    def change(tensors):
        tensors["model.layers.1.mlp.up_proj.weight"].mul_(1e30)
        tensors["model.layers.1.mlp.gate_proj.weight"].mul_(1e30)

    folder = damage(model_folder, tmp_path, change)
    refused(
        fasc("compress", folder, "--corpus", text_file, *CALIBRATION, "--out", tmp_path / "o"),
        "calibration sequences 0-",
        "not finite",
    )
    refused(
        fasc("evaluate", folder, "--benchmarks", "perplexity", "--corpus", text_file, "--context", "16"),
        "windows 0-",
        "not finite",
    )
    assert not (tmp_path / "o").exists()


def test_damaged_checkpoints_are_refused(fasc, compressed, text_file):
    file = compressed / "model.safetensors"
    content = file.read_bytes()
    evaluate = ["evaluate", compressed, "--benchmarks", "perplexity", "--corpus", text_file, "--context", "16"]
    file.write_bytes(content[: len(content) // 2])
    refused(fasc(*evaluate), "model.safetensors")
    file.unlink()
    refused(fasc(*evaluate), "no safetensors file")
    file.write_bytes(content)
    config = json.loads((compressed / "config.json").read_text())
    config["quantization_config"]["units"][0]["rank"] = 7
    (compressed / "config.json").write_text(json.dumps(config))
    refused(fasc(*evaluate), "rank 7", "the weights hold rank 16")
    config["quantization_config"]["units"][0]["layers"][0] = "model.layers.0.self_attn.x_proj"
    (compressed / "config.json").write_text(json.dumps(config))
    refused(fasc(*evaluate), "x_proj")


def test_pickled_weights_are_never_loaded(fasc, model_folder, text_file, tmp_path):
    folder = tmp_path / "pickled"
    shutil.copytree(model_folder, folder)
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    refused(fasc("evaluate", folder, "--benchmarks", "perplexity", "--corpus", text_file))


def test_no_space_left_is_seen_before_the_work_is_lost(fasc, model_folder, text_file, tmp_path, monkeypatch):
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr("fasc.storage.shutil.disk_usage", lambda _: usage(10**9, 10**9 - 1000, 1000))
    refused(fasc("compress", model_folder, "--corpus", text_file, *CALIBRATION, "--out", tmp_path / "o"), "no space left")
    assert {file.name for file in tmp_path.iterdir()} == {"text.txt"}


def test_a_disk_that_fills_up_while_writing_leaves_nothing(model_folder, text_file, tmp_path):
    """A real refusal by the operating system: the process may write no file larger than 20 kB."""

    def limit():
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))

    command = [
        sys.executable,
        "-m",
        "fasc",
        "compress",
        str(model_folder),
        "--corpus",
        str(text_file),
        *CALIBRATION,
        "--out",
        str(tmp_path / "o"),
    ]
    done = subprocess.run(command, capture_output=True, text=True, preexec_fn=limit, check=False)
    refused((done.returncode, done.stdout, done.stderr), "no space left")
    assert {file.name for file in tmp_path.iterdir()} == {"text.txt"}


def test_interrupting_leaves_nothing_and_exits_with_130(model_folder, text_file, tmp_path):
    command = [
        sys.executable,
        "-m",
        "fasc",
        "compress",
        str(model_folder),
        "--corpus",
        "self",
        "--sequences",
        "5000",
        "--out",
        str(tmp_path / "o"),
    ]
    # A shell's background job (a CI runner, say) hands on an ignored SIGINT: give the process the default, as a terminal does.
    default = partial(signal.signal, signal.SIGINT, signal.SIG_DFL)
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, preexec_fn=default)
    deadline = time.monotonic() + 60
    line = ""
    while "sampling" not in line and time.monotonic() < deadline:
        line = process.stderr.readline()
    os.kill(process.pid, signal.SIGINT)
    try:
        _, err = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 130
    assert "Traceback" not in err
    assert err.strip().splitlines()[-2] == "error: interrupted"
    assert {file.name for file in tmp_path.iterdir()} == {"text.txt"}


def test_an_interrupt_that_was_swallowed_is_raised_at_the_next_step(monkeypatch):
    from fasc import progress

    interrupt = progress.Interrupt()
    monkeypatch.setattr(progress, "INTERRUPT", interrupt)
    with pytest.raises(KeyboardInterrupt):
        interrupt._on_signal(2, None)
    with progress.progress("work", 3, "steps") as advance, pytest.raises(KeyboardInterrupt):
        advance()


def test_debug_shows_the_traceback(fasc, model_folder):
    code, _, err = fasc("evaluate", model_folder, "--benchmarks", "fact", "--debug")
    assert code == 2
    assert "Traceback" in err


def test_help_is_fast_and_names_every_verb():
    done = subprocess.run(
        [sys.executable, "-X", "importtime", "-m", "fasc", "--help"], capture_output=True, text=True, check=True
    )
    for verb in ("pull", "collect", "diagnose", "plan", "compress", "evaluate", "report", "run", "demo"):
        assert f"\n  {verb} " in done.stdout
    loaded = {line.rpartition("|")[2].strip() for line in done.stderr.splitlines()}
    assert not loaded & {"torch", "transformers", "matplotlib", "datasets", "pandas"}


def test_storage_errors_say_what_the_system_said():
    from pathlib import Path

    from fasc.storage import storage_error

    assert "no space left" in storage_error(OSError(errno.ENOSPC, "No space left on device"), Path("x")).message
    assert "Permission denied" in storage_error(OSError(errno.EACCES, "Permission denied"), Path("x")).message


def test_plan_knows_every_budget(fasc, model_folder, text_file, tmp_path):
    """Before calibration a uniform plan; with statistics the forecast, and budgets in losses."""
    file = tmp_path / "plan.json"
    code, out, err = fasc("plan", model_folder, "--param-fraction", "0.8", "--json", file)
    assert code == 0, err
    raw = json.loads(file.read_text())
    assert raw["totals"]["param_fraction"] <= 0.8
    assert raw["totals"]["predicted_loss"] is None
    assert "80.0% of dense" in out or "79." in out
    statistics = tmp_path / "s.safetensors"
    assert fasc("collect", model_folder, "--corpus", text_file, *CALIBRATION[:4], "--out", statistics)[0] == 0
    for budget in (
        ["--param-fraction", "0.8"],
        ["--model-fraction", "0.9"],
        ["--max-bytes", "120kB"],
        ["--max-perplexity-increase", "5%"],
        ["--max-kl", "0.5"],
    ):
        options = [*budget, "--statistics", statistics, "--damping", "1e-2", "--json", file]
        code, out, err = fasc("plan", model_folder, *options)
        assert code == 0, err
        raw = json.loads(file.read_text())
        assert raw["allocation"] == "fisher"
        assert raw["totals"]["predicted_loss"] >= 0
        assert {"layout", "rank", "parameters", "predicted_loss"} <= set(raw["groups"][0])
        assert "perplexity of the calibration text" in out
    refused(fasc("plan", model_folder, "--max-kl", "0.1"), "no statistics")
    refused(fasc("plan", model_folder, "--param-fraction", "0.5", "--max-kl", "0.1"), "are both budgets")
    refused(fasc("plan", model_folder, "--max-bytes", "lots"), "no number")
    refused(fasc("plan", model_folder, "--param-fraction", "1.2"), "--param-fraction is 1.2, outside (0, 1]")
    options = ["--method", "svd", "--param-fraction", "0.8", "--allocation", "fisher", "--statistics", statistics]
    refused(fasc("plan", model_folder, *options), "differs from layer to layer")


def test_compress_takes_the_options_of_plan_and_bench_compares(fasc, model_folder, text_file, tmp_path):
    statistics, out = tmp_path / "s.safetensors", tmp_path / "o"
    assert fasc("collect", model_folder, "--corpus", text_file, *CALIBRATION[:4], "--out", statistics)[0] == 0
    options = ["--param-fraction", "0.7", "--allocation", "uniform", "--layouts", "shared,pivoted", "--damping", "1e-2"]
    code, _, err = fasc("compress", model_folder, *options, "--statistics", statistics, "--gate", "predicted", "--out", out)
    assert code == 0, err
    raw = json.loads((out / "fasc_plan.json").read_text())
    assert {unit["layout"] for unit in raw["groups"]} == {"pivoted"}
    assert {unit["method"] for unit in raw["groups"]} == {"fasc"}, "fasc has the lower forecast everywhere"
    assert all(unit["gate"]["score"] <= 0 for unit in raw["groups"])
    file = tmp_path / "b.json"
    small = ["--prefill", "16", "--prompt", "4", "--decode", "4", "--batches", "1,2", "--repeats", "2"]
    code, shown, err = fasc("bench", out, *small, "--json", file)
    assert code == 0, err
    rows = {row["what"]: row for row in json.loads(file.read_text())["comparisons"]}
    assert {"prefill, 1 × 16", "prefill, blocks alone", "decode, batch 1", "decode, batch 2", "weights on disk"} <= set(rows)
    assert all(row["low"] <= row["ratio"] <= row["high"] for row in rows.values())
    assert rows["weights on disk"]["ratio"] < 1
    assert "fewer parameters" in shown
    assert budget_of(str(out)) == BudgetConfig(param_fraction=0.7)
    assert budget_of(str(model_folder)) is None
    refused(fasc("bench", model_folder), "does not say")


def test_diagnose_and_validate_write_tables_and_figures(fasc, model_folder, text_file, tmp_path):
    options = ["--corpus", text_file, *CALIBRATION[:4], "--damping", "1e-2"]
    figures, table, file = tmp_path / "figures", tmp_path / "d.csv", tmp_path / "d.json"
    code, out, err = fasc("diagnose", model_folder, *options, "--figures", figures, "--csv", table, "--json", file)
    assert code == 0, err
    assert {path.name for path in figures.iterdir()} == {"rho.png", "angles.png"}
    row = json.loads(file.read_text())[0]
    assert row["rho_low"] <= row["rho"] <= row["rho_high"]
    assert row["excluded"] == "attention of blocks 0-2"
    assert table.read_text().startswith("group,block,kind")
    assert "of noise alone" in out
    refused(fasc("diagnose", model_folder, *options, "--exclusions", "some"), "--exclusions is `some`")
    png = tmp_path / "v.png"
    code, out, err = fasc(
        "validate", model_folder, *options, "--rank-fractions", "0.5", "--held-out", "4", "--figure", png, "--json", file
    )
    assert code == 0, err
    found = json.loads(file.read_text())
    assert len(found["rows"]) == 16
    assert {"pearson", "spearman", "median_ratio"} <= set(found["summary"][0])
    assert [plan["budget"] for plan in found["plans"]] == [f"params{f}" for f in (0.95, 0.9, 0.8, 0.7, 0.6)]
    assert png.stat().st_size > 1000


def test_a_plan_is_forecast_on_text_that_did_not_calibrate(fasc, model_folder, text_file, tmp_path):
    options = ["--corpus", text_file, "--sequence-length", "16", "--sequences"]
    seen, unseen = tmp_path / "seen.safetensors", tmp_path / "unseen.safetensors"
    assert fasc("collect", model_folder, *options, "40", "--out", seen, "--methods", "fasc")[0] == 0
    assert fasc("collect", model_folder, *options, "40", "--skip", "40", "--out", unseen, "--methods", "fasc")[0] == 0
    plan = ["plan", model_folder, "--param-fraction", "0.7", "--rank-multiple", "1", "--damping", "1e-3", "--statistics", seen]
    losses = {}
    for name, more in {"seen": [], "unseen": ["--held-out", unseen]}.items():
        file = tmp_path / f"{name}.json"
        code, _, err = fasc(*plan, *more, "--json", file)
        assert code == 0, err
        losses[name] = json.loads(file.read_text())["totals"]["predicted_loss"]
    assert losses["unseen"] > losses["seen"] > 0, "a subspace looks better on the tokens that chose it"
    refused(fasc(*plan, "--held-out", seen), "the very tokens that calibrate")
    out = tmp_path / "out"
    code, _, err = fasc(
        "compress", model_folder, "--statistics", seen, "--held-out", unseen, "--param-fraction", "0.7", "--rank-multiple", "1",
        "--damping", "1e-3", "--out", out,
    )  # fmt: skip
    assert code == 0, err
    assert json.loads((out / "fasc_plan.json").read_text())["totals"]["predicted_loss"] == pytest.approx(losses["unseen"])
    refused(fasc("collect", model_folder, "--corpus", "self", "--skip", "4", "--out", tmp_path / "x"), "another --seed")
