"""``fasc export``, and the presets of ``--for``."""

import json

import pytest
from gguf import GGUFReader
from safetensors import safe_open

from tests.cli.conftest import CALIBRATION, refused


def test_a_dense_model_is_written_and_its_place_is_printed(done, model_folder, tmp_path):
    out, err = done("export", model_folder, "--out", tmp_path / "a.gguf")
    assert out.strip() == str(tmp_path / "a.gguf")
    assert "graph `llama`" in err
    assert len(GGUFReader(tmp_path / "a.gguf").tensors) > 10


@pytest.mark.parametrize("engine,graph", [("llama.cpp", "deci"), ("plain", "llama")])
def test_a_plan_for_an_engine_is_one_that_it_can_hold(done, model_folder, statistics, tmp_path, engine, graph):
    small = tmp_path / "small"
    options = ["--param-fraction", "0.8", "--statistics", statistics, "--damping", "1e-2"]
    _, said = done("compress", model_folder, *options, "--for", engine, "--out", small)
    edits = json.loads((small / "fasc_plan.json").read_text())["edits"] if (small / "fasc_plan.json").exists() else []
    assert all(edit["edit"] == "narrow" for edit in edits)
    _, err = done("export", small, "--out", tmp_path / "small.gguf")
    assert f"graph `{graph}`" in err


def test_what_plain_writes_needs_nothing_of_ours(done, model_folder, statistics, tmp_path):
    done(
        "compress",
        model_folder,
        "--param-fraction",
        "0.8",
        "--statistics",
        statistics,
        "--for",
        "plain",
        "--out",
        tmp_path / "small",
    )
    config = json.loads((tmp_path / "small" / "config.json").read_text())
    assert config["model_type"] == "llama"
    assert "quantization_config" not in config
    with safe_open(tmp_path / "small" / "model.safetensors", framework="pt") as file:
        assert "fasc" not in " ".join(file.keys())


def test_what_an_engine_cannot_hold_is_refused_with_a_way_out(fasc, model_folder, compressed, statistics, tmp_path):
    refused(fasc("export", compressed, "--out", tmp_path / "a.gguf"), "stored as factors", "--for llama.cpp")
    refused(fasc("export", model_folder, "--format", "onnx", "--out", tmp_path / "a"), "onnx")
    refused(fasc("plan", model_folder, "--for", "lama.cpp", "--param-fraction", "0.8"), "lama.cpp", "llama.cpp")
    both = ["--for", "vllm", "--layouts", "factors", "--param-fraction", "0.8", "--statistics", statistics]
    refused(fasc("plan", model_folder, *both), "--for vllm chooses --layouts itself")
    assert not list(tmp_path.glob("a*"))


def test_what_export_reads_is_never_replaced(fasc, done, model_folder, tmp_path):
    done("export", model_folder, "--out", tmp_path / "a.gguf")
    before = (tmp_path / "a.gguf").read_bytes()
    refused(fasc("export", model_folder, "--out", tmp_path / "a.gguf"), "a.gguf")
    refused(fasc("export", tmp_path / "a.gguf", "--out", tmp_path / "a.gguf", "--overwrite"), "a.gguf")
    assert (tmp_path / "a.gguf").read_bytes() == before


@pytest.mark.parametrize(
    "options,words",
    [
        (["--type", "Q4_L"], ["Q4_L", "Q4_K"]),
        (["--max-bytes", "1MB"], ["no moments", "--corpus"]),
        (["--corpus", "self"], ["no budget", "--max-bytes"]),
        (["--type", "Q8_0", "--max-bytes", "1MB"], ["--type and a budget"]),
        (["--max-bytes", "nan", "--corpus", "self"], ["--max-bytes"]),
    ],
)
def test_types_that_cannot_be_chosen_are_refused(fasc, model_folder, tmp_path, options, words):
    refused(fasc("export", model_folder, *options, "--out", tmp_path / "a.gguf"), *words)
    assert not list(tmp_path.glob("a*"))


def test_types_are_chosen_from_a_corpus(done, model_folder, text_file, tmp_path):
    pytest.importorskip("llama_cpp", reason="llama-cpp-python is an extra: fasc[gguf]")
    _, err = done("export", model_folder, "--max-kl", "1", "--corpus", text_file, *CALIBRATION, "--out", tmp_path / "a.gguf")
    assert "forecast KL" in err
    kinds = {tensor.tensor_type.name for tensor in GGUFReader(tmp_path / "a.gguf").tensors}
    assert kinds - {"F32"}
