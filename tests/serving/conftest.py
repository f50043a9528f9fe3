"""Checkpoints of tiny models: MLPs with fewer channels, groups and layers in several layouts."""

import json
import os
import subprocess
import sys

import pytest
from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerFast

from fasc.compression.compress import carry_out
from fasc.serving.checkpoint import CheckpointNotes, save_checkpoint
from fasc.serving.quantizer import attach
from fasc.stages.plan import plan
from tests.conftest import tiny_model

WITHOUT_US = """
import sys
sys.meta_path[:] = [finder for finder in sys.meta_path if getattr(finder, "__module__", "") != "_fasc_transformers"]
sys.modules["fasc"] = None
"""


@pytest.fixture(scope="session")
def compressed(measured):
    """A model compressed as by default, and the plan as it was carried out."""

    def of(architecture="llama", *, propagate=False, **options):
        model = tiny_model(architecture)
        budget = options or {"param_fraction": 0.6}
        made = plan(model, measured(architecture), damping=1e-2, **budget)
        done = carry_out(model, measured(architecture), made, propagate=propagate)
        attach(model)
        return model, done

    return of


@pytest.fixture(scope="session")
def write(tokenizer):
    """Save a model as compression does."""

    def save(model, folder, plan=None, **options):
        notes = CheckpointNotes({"a": 1}, {"versions": {}}, {} if plan is None else plan.to_dict(), "card")
        save_checkpoint(model, tokenizer, folder, notes, **options)
        return folder

    return save


@pytest.fixture(scope="session")
def checkpoint(compressed, write, tmp_path_factory):
    """A folder of the default plan; to be copied before it is changed."""
    model, plan = compressed()
    return write(model, tmp_path_factory.mktemp("checkpoint") / "small", plan)


@pytest.fixture
def python(tmp_path):
    """Runs code in a fresh process, with or without us; its bytecode is kept, as that of installed modules is."""
    kept = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
    environment = kept | {"PYTHONPYCACHEPREFIX": str(tmp_path / "bytecode")}

    def run(code, *arguments, without_us=False):
        text = (WITHOUT_US if without_us else "") + code
        command = [sys.executable, "-c", text, *map(str, arguments)]
        return subprocess.run(command, capture_output=True, text=True, timeout=300, check=False, env=environment)

    return run


@pytest.fixture
def merging(tokenizer):
    """With a merge, which llama.cpp insists on."""
    parts = json.loads(tokenizer.backend_tokenizer.to_str())
    vocabulary = parts["model"]["vocab"]
    last = max(vocabulary, key=vocabulary.get)
    vocabulary["th"] = vocabulary.pop(last)
    parts["model"]["merges"] = [["t", "h"]]
    special = {"bos_token": "<bos>", "eos_token": "<eos>", "pad_token": "<pad>"}
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(json.dumps(parts)), **special)
