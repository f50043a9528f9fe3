"""``--nproc`` and torchrun: one result, one voice, and nothing left behind by what is killed."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from contextlib import nullcontext

import psutil
import pytest
import torch
from safetensors.torch import load_file

from fasc.cli.processes import SILENT
from fasc.statistics.moments import Statistics
from fasc.storage import cache_root
from tests.cli.conftest import CALIBRATION, refused
from tests.conftest import kill_when
from tests.fuzz.kills import fingerprint
from tests.processes import free_port
from tests.statistics.test_processes import require_bound

TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--local-addr", "localhost", "--nproc-per-node", "2"]


def started(*arguments, launcher=(sys.executable,), gpus="", more=()):
    """The command in processes of its own, which see no GPU unless they are told to."""
    command = [*launcher, "-m", "fasc", *map(str, arguments)]
    environment = os.environ | {"CUDA_VISIBLE_DEVICES": gpus} | dict(more)
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)


def ended(process):
    out, err = process.communicate(timeout=120)
    return process.returncode, out, err


@pytest.fixture
def collect(model_folder, text_file, tmp_path):
    """The arguments of ``collect``, and its result, in a folder of its own."""
    file = tmp_path / "out" / "moments.safetensors"
    batches = ["--batch-tokens", "32", "--labels", "sampled", "--device", "cpu"]
    return ["collect", model_folder, "--corpus", text_file, *CALIBRATION, *batches, "--out", file], file


def test_two_processes_write_the_file_of_one(collect, done):
    arguments, file = collect
    done(*arguments)
    one = Statistics.load(file)
    code, out, err = ended(started(*arguments, "--nproc", "2", "--overwrite"))
    assert (code, out) == (0, f"{file}\n"), err
    assert err.count("measuring moments") == len(err.splitlines()) == 1, "one process shows progress, and nothing else is said"
    several = Statistics.load(file)
    require_bound(one, several, 320)
    assert (several.meta["processes"], several.meta["tokens_by_process"]) == (2, [160, 160])
    assert [entry.name for entry in file.parent.iterdir()] == [file.name]
    code, out, err = ended(started(*arguments, "--overwrite", launcher=TORCHRUN))
    assert (code, out) == (0, f"{file}\n"), err
    require_bound(several, Statistics.load(file), 320)


def test_an_error_of_one_process_ends_all_in_one_line_that_names_it(collect, tmp_path):
    arguments, file = collect
    file.parent.mkdir()
    file.write_text("mine")
    lines = refused(ended(started(*arguments, "--nproc", "2")), "already exists", "process 0 (of 2, counted from 0)")
    assert len(lines) == 2
    assert file.read_text() == "mine"
    arguments = [*arguments[:-1], tmp_path / "other", "--data-dir", tmp_path]
    lines = refused(
        ended(started(*arguments, "--corpus", "no-such.txt", "--nproc", "2")), "no-such.txt", "(of 2, counted from 0)"
    )
    assert len(lines) == 2, "all processes fail, and one of them speaks"


def test_what_only_one_process_meets_ends_the_others_without_a_word(collect, tmp_path):
    arguments, file = collect
    port = free_port()
    both = []
    for rank, more in enumerate(([], ["--corpus", tmp_path / "no-such.txt"])):
        as_torchrun = {"RANK": str(rank), "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        both.append(started(*arguments, *more, more=as_torchrun))
    (code, _, err), other = (ended(process) for process in both)
    assert "error" not in err
    assert code == SILENT
    refused(other, "process 1 (of 2, counted from 0): `", "no-such.txt` does not exist")
    assert not list(file.parent.iterdir())


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (["--nproc", "21"], ["21 processes cannot share 20 sequences", "--nproc"]),
        (["--nproc", "2", "--device", "cuda:0"], ["2 processes cannot share the device `cuda:0`"]),
        (["--nproc", "0"], ["--nproc"]),
    ],
)
def test_what_cannot_be_shared_is_refused_before_a_process_is_started(more, words, collect, fasc):
    assert len(refused(fasc(*collect[0], *more), *words)) == 2


def test_other_verbs_are_refused_in_several_processes(fasc, monkeypatch, model_folder):
    for name, value in {"RANK": "0", "WORLD_SIZE": "4"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr("fasc.cli.app.processes.joined", nullcontext)
    monkeypatch.setattr("fasc.cli.processes.leave", sys.exit)
    for verb in ("bench", "run", "validate"):
        refused(
            fasc(verb, model_folder), f"`fasc {verb}` works in one process, and 4 were started", "collect, compress, evaluate"
        )


def test_two_processes_plan_compress_and_recover_as_one_does(done, statistics, model_folder, text_file, tmp_path):
    budget = [model_folder, "--statistics", statistics, "--param-fraction", "0.6", "--overhead", "0"]
    one, _ = done("plan", *budget, "--json", tmp_path / "one.json")
    shutil.rmtree(cache_root() / "forecasts")
    code, out, err = ended(started("plan", *budget, "--json", tmp_path / "two.json", "--nproc", "2"))
    assert (code, out) == (0, one), err
    assert json.loads((tmp_path / "one.json").read_text()) == json.loads((tmp_path / "two.json").read_text())
    assert any((cache_root() / "forecasts").iterdir()), "the first process keeps the forecasts"
    done("compress", *budget, "--device", "cpu", "--out", tmp_path / "alone")
    code, out, err = ended(started("compress", *budget, "--device", "cpu", "--out", tmp_path / "shared", "--nproc", "2"))
    assert code == 0, err
    assert out.splitlines()[-1] == str(tmp_path / "shared")
    for name in ("model.safetensors", "config.json", "fasc_plan.json"):
        assert (tmp_path / "alone" / name).read_bytes() == (tmp_path / "shared" / name).read_bytes(), name
    text = ["--corpus", text_file, "--sequences", "12", "--sequence-length", "16", "--batch-tokens", "80", "--device", "cpu"]
    said, _ = done("recover", tmp_path / "alone", *text, "--out", tmp_path / "recovered")
    code, out, err = ended(started("recover", tmp_path / "shared", *text, "--out", tmp_path / "together", "--nproc", "2"))
    assert code == 0, err
    assert out.splitlines()[0] == said.splitlines()[0], "KL before and after, steps, and how far"
    assert not [entry for entry in tmp_path.iterdir() if entry.name.startswith(".")], "nothing is left beside the results"


def test_a_compress_of_two_processes_measures_shares_and_goes_on_after_a_kill(done, model_folder, text_file, tmp_path):
    arguments = ["compress", model_folder, "--corpus", text_file, *CALIBRATION, "--param-fraction", "0.6", "--overhead", "0"]
    arguments += ["--device", "cpu", "--batch-tokens", "32", "--out"]
    done(*arguments, tmp_path / "one")
    kill_when(
        [sys.executable, "-m", "fasc", *map(str, arguments), str(tmp_path / "two"), "--nproc", "2"],
        tmp_path,
        ".two.work/statistics.safetensors",
    )
    assert not (tmp_path / "two").exists()
    code, _, err = ended(started(*arguments, tmp_path / "two", "--nproc", "2"))
    assert code == 0, err
    assert "measuring moments" not in err, "they were kept"
    weights = [load_file(tmp_path / name / "model.safetensors") for name in ("one", "two")]
    assert list(weights[0]) == list(weights[1])
    assert all(torch.allclose(value.float(), weights[1][name].float(), atol=1e-3) for name, value in weights[0].items())
    refused(ended(started(*arguments, tmp_path / "three", "--propagate", "--nproc", "2")), "which processes cannot share")


def test_a_killed_process_takes_no_finished_work_with_it(done, model_folder, text_file, tmp_path):
    arguments = ["compress", model_folder, "--corpus", text_file, *CALIBRATION, "--param-fraction", "0.6", "--overhead", "0"]
    arguments += ["--device", "cpu", "--batch-tokens", "32", "--out", tmp_path / "two", "--nproc", "2"]
    process, file = started(*arguments), tmp_path / ".two.work" / "statistics.safetensors"
    while not file.exists() and process.poll() is None:
        time.sleep(0.001)
    workers = [child for child in psutil.Process(process.pid).children() if "RANK" in child.environ()]
    os.kill(max(workers, key=lambda child: int(child.environ()["RANK"])).pid, signal.SIGKILL)
    code, _, err = ended(process)
    refused((code, "", err), "process 1 (of 2, counted from 0) was killed: SIGKILL")
    assert file.exists(), "the moments need not be measured again"


def test_scores_of_two_processes_are_those_of_one(done, compressed, text_file, tmp_path):
    arguments = ["evaluate", compressed, "--benchmarks", "facts,perplexity,kl", "--corpus", text_file]
    arguments += ["--limit", "9", "--context", "16", "--batch-tokens", "32", "--device", "cpu"]
    one, _ = done(*arguments, "--json", tmp_path / "one.json")
    code, out, err = ended(started(*arguments, "--json", tmp_path / "two.json", "--nproc", "2"))
    assert (code, out) == (0, one), err
    scores = [json.loads((tmp_path / f"{name}.json").read_text())["scores"] for name in ("one", "two")]
    assert scores[0] == scores[1]


def test_what_is_killed_is_done_anew_and_ends_with_the_same_bits(collect):
    arguments, file = collect
    assert ended(started(*arguments, "--nproc", "2"))[0] == 0
    undisturbed = fingerprint(file)
    for target in ("launcher", 0, 1):
        file.unlink()
        process = started(*arguments, "--nproc", "2")
        workers = at_work(process, file)
        os.kill(process.pid if target == "launcher" else workers[target].pid, signal.SIGKILL)
        code, _, err = ended(process)
        if target != "launcher":
            lines = refused((code, "", err), f"process {target} (of 2, counted from 0) was killed: SIGKILL")
            assert len([line for line in lines if line.startswith("error")]) == 1
        psutil.wait_procs(workers, timeout=60)
        assert not any(worker.is_running() for worker in workers), "they end with whoever started them"
        code, _, err = ended(started(*arguments, "--nproc", "2", "--overwrite"))
        assert code == 0, err
        assert fingerprint(file) == undisturbed
        assert [entry.name for entry in file.parent.iterdir()] == [file.name]


def at_work(process, file):
    """The processes that the command has started, in their order, when the first of them has begun its work."""
    lock = file.with_name(f".{file.name}.lock")
    lock.unlink(missing_ok=True)
    while not lock.exists() and process.poll() is None:
        time.sleep(0.01)
    workers = [child for child in psutil.Process(process.pid).children() if "RANK" in child.environ()]
    assert len(workers) == 2
    return sorted(workers, key=lambda child: int(child.environ()["RANK"]))


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_each_process_has_a_gpu_of_its_own(collect, done):
    arguments, file = collect
    done(*arguments, "--device", "cuda")
    one = Statistics.load(file)
    code, _, err = ended(started(*arguments, "--device", "cuda", "--nproc", "2", "--overwrite", gpus="0,1"))
    assert code == 0, err
    require_bound(one, Statistics.load(file), 320)


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() != 1, reason="needs one GPU")
def test_more_processes_than_gpus_are_refused(collect):
    refused(ended(started(*collect[0], "--nproc", "2", gpus="0")), "2 processes and 1 GPU(s)", "CUDA_VISIBLE_DEVICES")
