"""Bits at the command line: planned, carried out, loaded, weighed against width, and refused where they cannot be."""

import json

import pytest

from tests.cli.conftest import CALIBRATION, refused


@pytest.fixture
def measured(done, model_folder, text_file, tmp_path):
    file = tmp_path / "statistics.safetensors"
    done("collect", model_folder, "--corpus", text_file, *CALIBRATION, "--out", file)
    return file


def test_bits_are_planned_carried_out_and_evaluated(done, model_folder, measured, text_file, tmp_path):
    plan, out = tmp_path / "plan.json", tmp_path / "small"
    chosen = ["--bits", "3,4,6,8", "--bits-group", "16", "--max-bytes", "60kB", "--damping", "1e-2"]
    shown, _ = done("plan", model_folder, *chosen, "--statistics", measured, "--json", plan)
    assert "bits per weight of the chosen layers" in shown
    raw = json.loads(plan.read_text())
    assert {edit["edit"] for edit in raw["edits"]} >= {"quantise"}
    done("compress", model_folder, "--plan", plan, "--statistics", measured, "--out", out)
    assert (out / "model.safetensors").stat().st_size <= 60_000
    shown, _ = done(
        "evaluate", out, "--dense", model_folder, "--benchmarks", "kl", "--corpus", text_file, "--windows", "2", "--context", "16"
    )
    assert "kl" in shown


def test_a_frontier_is_printed_drawn_and_written(done, model_folder, measured, tmp_path):
    figure, file = tmp_path / "frontier.png", tmp_path / "frontier.json"
    options = ["--bits", "3,4,6", "--bits-group", "16", "--damping", "1e-2"]
    shown, _ = done("plan", model_folder, *options, "--statistics", measured, "--frontier", figure, "--json", file)
    assert "better buy" in shown
    assert figure.stat().st_size > 1000
    points = json.loads(file.read_text())["points"]
    assert points
    assert all(point["better_buy"] in ("width", "bits", "both") for point in points)


def test_multiply_adds_are_a_budget(done, model_folder, measured, tmp_path):
    file = tmp_path / "plan.json"
    both = ["--param-fraction", "0.9", "--flop-fraction", "0.7", "--damping", "1e-2", "--rank-multiple", "1"]
    done("plan", model_folder, *both, "--statistics", measured, "--json", file)
    totals = json.loads(file.read_text())["totals"]
    assert totals["multiply_add_fraction"] <= 0.7
    assert totals["param_fraction"] <= 0.9


@pytest.mark.parametrize(
    "options,words",
    [
        (["--bits", "4", "--param-fraction", "0.5"], ["param_fraction counts weights", "--max-bytes"]),
        (["--bits", "12", "--max-bytes", "60kB"], ["cannot be rounded to 12 bits"]),
        (["--bits", "four", "--max-bytes", "60kB"], ["--bits"]),
        (["--bits", "4", "--max-bytes", "60kB", "--method", "svd"], ["svd"]),
        (["--bits", "4", "--max-bytes", "60kB", "--propagate"], ["no propagation"]),
        (["--bits", "4", "--max-bytes", "60kB", "--merge"], ["few bits cannot be merged"]),
        (["--bits", "4", "--max-bytes", "60kB", "--format", "compressed-tensors"], ["--layouts dense"]),
        (["--param-fraction", "0.5", "--format", "compressed-tensors"], ["rounded layers and no others"]),
    ],
)
def test_what_bits_cannot_do_is_refused_before_the_work(fasc, model_folder, text_file, tmp_path, options, words):
    result = fasc("compress", model_folder, "--corpus", text_file, *CALIBRATION, *options, "--out", tmp_path / "out")
    refused(result, *words)
    assert not (tmp_path / "out").exists()


def test_rounded_layers_are_written_for_other_programs(done, model_folder, measured, tmp_path):
    out = tmp_path / "out"
    chosen = ["--layouts", "dense", "--bits", "4,8", "--bits-group", "16", "--max-bytes", "60kB", "--damping", "1e-2"]
    done("compress", model_folder, *chosen, "--statistics", measured, "--format", "compressed-tensors", "--out", out)
    assert json.loads((out / "config.json").read_text())["quantization_config"]["quant_method"] == "compressed-tensors"
