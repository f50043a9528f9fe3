"""``fasc collect``."""

import re
import sys

import torch

from fasc.statistics.moments import Need, Statistics
from tests.cli.conftest import CALIBRATION, refused
from tests.conftest import kill_when


def test_results_go_to_stdout_and_progress_to_stderr(done, model_folder, text_file, tmp_path):
    file = tmp_path / "s.safetensors"
    out, err = done("collect", model_folder, "--methods", "fasc,svd", "--corpus", text_file, *CALIBRATION, "--out", file)
    assert out.strip() == str(file)
    assert "measuring moments" in err
    assert "left" in err


def test_a_diagnosis_needs_more_moments(done, model_folder, text_file, tmp_path):
    needs = {}
    for option in ([], ["--diagnosis"]):
        file = tmp_path / f"{len(option)}.safetensors"
        done("collect", model_folder, "--methods", "svd", "--corpus", text_file, *CALIBRATION, *option, "--out", file)
        needs[len(option)] = {Need(*need) for need in Statistics.load(file).meta["needs"]}
    assert needs[1] - needs[0] >= {Need("cross", "group"), Need("sequences", "group")}


def test_text_that_is_sampled_has_no_order_to_skip_in(fasc, model_folder, tmp_path):
    refused(fasc("collect", model_folder, "--corpus", "self", "--skip", "4", "--out", tmp_path / "x"), "another --seed")


def test_an_existing_file_is_replaced_only_if_that_is_asked_for(fasc, done, statistics, model_folder, text_file):
    before = statistics.read_bytes()
    again = ["collect", model_folder, "--corpus", text_file, *CALIBRATION, "--seed", "1", "--out", statistics]
    lines = refused(fasc(*again), "already exists", "--overwrite")
    assert len(lines) == 2, "no work was started"
    assert statistics.read_bytes() == before
    done(*again, "--overwrite")
    assert statistics.read_bytes() != before


SLOWLY = ["--batch-tokens", "16"]
"""There is time to kill a call between two of its shards."""


def least_memory(fasc, command):
    """What the refusal of too little says is enough."""
    lines = refused(fasc(*command, "--max-memory", "1MB"), "do not hold the moments of one block")
    return re.search(r"--max-memory (\S+),", lines[-1])[1]


def test_a_limit_of_memory_gives_a_folder_that_other_verbs_read(fasc, done, model_folder, text_file, tmp_path):
    folder, file = tmp_path / "moments", tmp_path / "moments.safetensors"
    command = ["collect", model_folder, "--methods", "fasc", "--corpus", text_file, *CALIBRATION, "--out"]
    limit = least_memory(fasc, [*command, folder])
    assert not folder.exists()
    out, _ = done(*command, folder, "--max-memory", limit)
    assert out.strip() == str(folder)
    done(*command, file)
    plans = [done("plan", model_folder, "--param-fraction", "0.6", "--statistics", one)[0] for one in (folder, file)]
    assert plans[0] == plans[1]
    for one in (folder, file):
        small = tmp_path / f"small-{one.name}"
        done("compress", model_folder, "--param-fraction", "0.6", "--statistics", one, "--out", small)
    assert len({(tmp_path / f"small-{one.name}" / "model.safetensors").read_bytes() for one in (folder, file)}) == 1
    refused(fasc(*command, folder, "--max-memory", limit), "already exists", "--overwrite")
    (folder / "mine.txt").write_text("mine")
    refused(fasc(*command, folder, "--max-memory", limit, "--overwrite"), "mine.txt")
    assert (folder / "mine.txt").read_text() == "mine"
    for wrong in ("0", "much", "-1GB"):
        refused(fasc(*command, tmp_path / "x", "--max-memory", wrong), "--max-memory")


def test_a_collect_in_passes_that_was_killed_goes_on(fasc, done, model_folder, text_file, tmp_path):
    command = ["collect", model_folder, "--methods", "fasc", "--corpus", text_file, *CALIBRATION, *SLOWLY, "--out"]
    limit = least_memory(fasc, [*command, tmp_path / "x"])
    done(*command, tmp_path / "whole", "--max-memory", limit)
    folder = tmp_path / "moments"
    kill_when(
        [sys.executable, "-m", "fasc", *map(str, command), str(folder), "--max-memory", limit],
        tmp_path,
        ".moments.work/statistics-00001-of-*",
    )
    assert not folder.exists()
    _, err = done(*command, folder, "--max-memory", limit)
    assert "pass 1 of" not in err
    whole, again = (Statistics.load(tmp_path / name) for name in ("whole", "moments"))
    assert all(torch.equal(one.input.matrix, again.groups[name].input.matrix) for name, one in whole.groups.items())
    assert [entry.name for entry in tmp_path.iterdir() if "moments" in entry.name] == ["moments"]


def same_moments(one, other):
    here, there = Statistics.load(one), Statistics.load(other)
    assert list(here.groups) == list(there.groups)
    for name, group in here.groups.items():
        assert torch.equal(group.input.matrix, there.groups[name].input.matrix)
        for unit, moment in group.gradients.items():
            assert torch.equal(moment.covariance.matrix, there.groups[name].gradients[unit].covariance.matrix)


def test_replayed_blocks_give_the_same_moments_also_from_disk_and_after_a_kill(
    fasc, done, places, model_folder, text_file, tmp_path
):
    command = ["collect", model_folder, "--methods", "fasc", "--corpus", text_file, *CALIBRATION, *SLOWLY, "--out"]
    done(*command, tmp_path / "memory.safetensors")
    out, _ = done(*command, tmp_path / "blocks", "--block-replay")
    assert out.strip() == str(tmp_path / "blocks")
    same_moments(tmp_path / "memory.safetensors", tmp_path / "blocks")
    done(*command, tmp_path / "disk", "--block-replay", "--device-map", places)
    same_moments(tmp_path / "memory.safetensors", tmp_path / "disk")
    kill_when(
        [sys.executable, "-m", "fasc", *map(str, command), str(tmp_path / "killed"), "--block-replay"],
        tmp_path,
        ".killed.work/statistics-00002-of-*",
    )
    assert not (tmp_path / "killed").exists()
    done(*command, tmp_path / "killed", "--block-replay")
    same_moments(tmp_path / "memory.safetensors", tmp_path / "killed")
    refused(fasc(*command, tmp_path / "x", "--block-replay", "--max-memory", "1GB"), "--max-memory means nothing beside")


def test_layers_that_lie_on_disk_give_the_same_file(done, places, model_folder, text_file, tmp_path):
    command = ["collect", model_folder, "--methods", "fasc", "--corpus", text_file, *CALIBRATION, "--out"]
    done(*command, tmp_path / "memory.safetensors")
    done(*command, tmp_path / "disk.safetensors", "--device-map", places)
    same_moments(tmp_path / "memory.safetensors", tmp_path / "disk.safetensors")


def test_a_map_that_splits_a_block_is_refused_before_the_work(fasc, places, model_folder, text_file, tmp_path):
    places.write_text('{"": "cpu", "model.layers.1.mlp": "disk"}')
    command = ["collect", model_folder, "--corpus", text_file, *CALIBRATION, "--device-map", places, "--out", tmp_path / "x"]
    refused(fasc(*command), "splits `model.layers.1`", "give a block one place")
    assert not (tmp_path / "x").exists()
