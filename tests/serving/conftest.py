"""Compressed tiny models, and Python without fasc."""

import os
import subprocess
import sys

import pytest

import fasc
from tests.conftest import tiny_model

WITHOUT_US = """
import sys
sys.meta_path[:] = [finder for finder in sys.meta_path if getattr(finder, "__module__", "") != "_fasc_transformers"]
sys.modules["fasc"] = None
"""


def compressed(architecture, tokens, **options):
    """A tiny model with its plan, of every kind of layer by default."""
    model = tiny_model(architecture)
    statistics = fasc.collect(model, corpus=tokens, sequences=len(tokens), sequence_length=tokens.shape[1])
    budget = {"merged": {"rank_fraction": 0.5}, "dense,channels": {"param_fraction": 0.8}}
    return fasc.compress(model, statistics, **(budget.get(options.get("layouts"), {"param_fraction": 0.7}) | options))


@pytest.fixture(params=["factors", "shared", "pivoted", "pivoted-columns", "merged", "dense,channels"])
def layouts(request):
    return request.param


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
