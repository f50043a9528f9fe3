"""A checkpoint loads right or not at all."""

import json

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

import fasc
from fasc.edits.structure import edited_layers
from fasc.planning.needs import needs_for
from fasc.planning.options import MethodConfig
from fasc.serving.model_type import MODEL_TYPE
from tests.conftest import tiny_model
from tests.serving.small import small_of
from tests.statistics.needs import EVERYTHING
from tests.zoo.walk import build

LOAD = """
import io, json, sys
from contextlib import redirect_stderr
from transformers import AutoModelForCausalLM, LlamaForCausalLM
from transformers.utils import logging
logging.set_verbosity_error()
for folder in sys.argv[1:]:
    for kind in (AutoModelForCausalLM, LlamaForCausalLM):
        try:
            kind.from_pretrained(folder)
            print(json.dumps("LOADED"))
        except Exception as problem:
            print(json.dumps(str(problem)))
"""
"""Prints, for every folder, what the automatic class and a class named by hand say."""


def logits_of(folder, tokens):
    with torch.no_grad():
        return AutoModelForCausalLM.from_pretrained(folder)(input_ids=tokens).logits


@pytest.fixture
def saved(tokens, tokenizer, tmp_path):
    small = small_of("llama", tokens)
    return small, small.save(tmp_path / "small", tokenizer=tokenizer)


LAYOUTS = ["factors", "shared", "pivoted", "pivoted-columns", "merged", "dense,channels"]


def test_without_us_nothing_loads_and_our_own_checkpoints_say_what_to_install(saved, tokens, tmp_path, python):
    """A model that was written by plain ``save_pretrained`` stops at the sizes of its tensors."""
    folders = [saved[1]]
    for layouts in LAYOUTS:
        folders.append(tmp_path / layouts)
        small_of("llama", tokens, layouts=layouts).model.save_pretrained(folders[-1])
    result = python(LOAD, *folders, without_us=True)
    said = [json.loads(line) for line in result.stdout.splitlines()]
    assert len(said) == 2 * len(folders), result.stderr
    assert "pip install fasc" in said[0]
    for answer in said[1:]:
        assert "mismatch" in answer


@pytest.mark.filterwarnings("ignore")
def test_whatever_one_edit_leaves_a_class_named_by_hand_stops_without_us(tokens, tmp_path, python):
    """Each kind of edit by itself, the only one in the model."""
    shared = tiny_model(layers=4)
    needs = EVERYTHING | needs_for(MethodConfig(name="fasc", bits=(8,), bits_vocabulary=True), None)
    statistics = fasc.collect(shared, corpus=tokens, sequences=len(tokens), sequence_length=tokens.shape[1], needs=needs)
    asked = {
        "heads": {"layouts": "dense,heads", "param_fraction": 0.9},
        "values": {"layouts": "dense,values", "param_fraction": 0.95},
        "skip": {"layouts": "dense,skip", "param_fraction": 0.9},
        "quantise": {"layouts": "dense", "bits": (8,), "max_kl": 1.0},
        "vocabulary": {"layouts": "dense", "bits": (8,), "bits_vocabulary": True, "max_kl": 1.0},
    }
    folders = []
    for kind, options in asked.items():
        small = fasc.compress(tiny_model(layers=4), statistics, damping=1e-2, **options)
        edits = {edit.edit for edit in small.plan.edits}
        assert kind in edits
        folders.append(tmp_path / kind)
        small.model.save_pretrained(folders[-1])
    result = python(LOAD, *folders, without_us=True)
    said = [json.loads(line) for line in result.stdout.splitlines()]
    assert len(said) == 2 * len(folders), result.stderr
    for answer in said:
        assert "mismatch" in answer


@pytest.mark.filterwarnings("ignore")
def test_experts_that_are_layers_of_their_own_load_nowhere_else(tokens, tmp_path, python):
    asked = []
    for family in ("mixtral", "olmoe", "qwen3_moe", "gpt_oss", "deepseek_v3", "llama4_text"):
        model = build(family)
        statistics = fasc.collect(model, corpus=tokens, sequences=len(tokens), sequence_length=tokens.shape[1])
        small = fasc.compress(model, statistics, param_fraction=0.5, damping=1e-2, overhead=0, rank_multiple=1)
        assert any(edit.edit == "unfuse" for edit in small.plan.edits), family
        folder = small.save(tmp_path / family)
        with torch.no_grad():
            torch.testing.assert_close(logits_of(folder, tokens), small.model(input_ids=tokens).logits)
        asked += [folder, type(model).__name__]
    code = """
import sys, transformers
transformers.logging.set_verbosity_error()
for folder, name in zip(sys.argv[1::2], sys.argv[2::2]):
    try:
        getattr(transformers, name).from_pretrained(folder)
        print("LOADED", name)
    except Exception as problem:
        print("refused:", "mismatch" in str(problem))
"""
    said = python(code, *asked, without_us=True).stdout.splitlines()
    assert said == ["refused: True"] * 6


@pytest.mark.parametrize("layouts", LAYOUTS)
@pytest.mark.parametrize("architecture", ["llama", "gpt2", "gemma3"])
def test_every_replaced_layer_holds_a_tensor_that_no_dense_layer_fits(tokens, architecture, layouts):
    small = small_of(architecture, tokens, layouts=layouts)
    dense = {name: tensor.shape for name, tensor in tiny_model(architecture).state_dict().items()}
    state = small.model.state_dict()
    assert edited_layers(small.model)
    for name in edited_layers(small.model):
        assert state[f"{name}.weight"].shape != dense[f"{name}.weight"], name


def test_a_process_that_never_imports_us_loads_it(saved, tokens, tmp_path, python):
    small, folder = saved
    torch.save(tokens, tmp_path / "tokens.pt")
    code = (
        "import sys, torch\n"
        "assert 'fasc' not in sys.modules\n"
        "from transformers import AutoModelForCausalLM\n"
        "model = AutoModelForCausalLM.from_pretrained(sys.argv[1])\n"
        "torch.save(model(input_ids=torch.load(sys.argv[2])).logits.detach(), sys.argv[3])"
    )
    if not _hook_is_installed(python):
        code = "import _fasc_transformers\n" + code
    result = python(code, folder, tmp_path / "tokens.pt", tmp_path / "logits.pt")
    assert result.returncode == 0, result.stderr
    with torch.no_grad():
        expected = small.model(input_ids=tokens).logits
    torch.testing.assert_close(torch.load(tmp_path / "logits.pt"), expected)


def _hook_is_installed(python):
    return "True" in python("import sys; print('_fasc_transformers' in sys.modules)").stdout


def test_the_config_comes_back_as_the_dense_models_own(saved):
    config = AutoConfig.from_pretrained(saved[1])
    assert type(config) is LlamaConfig
    assert config.model_type == "llama"
    assert not hasattr(config, "dense_model_type")
    assert json.loads((saved[1] / "config.json").read_text())["model_type"] == MODEL_TYPE


def test_a_model_class_named_by_hand_loads_with_its_own_type(saved, tokens):
    model = LlamaForCausalLM.from_pretrained(saved[1])
    assert model.config.model_type == "llama"
    assert not hasattr(model.config, "dense_model_type")
    with torch.no_grad():
        torch.testing.assert_close(model(input_ids=tokens).logits, saved[0].model(input_ids=tokens).logits)


def test_saving_a_loaded_model_again_keeps_it_loadable(saved, tokens, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(saved[1])
    model.save_pretrained(tmp_path / "again")
    assert json.loads((tmp_path / "again" / "config.json").read_text())["model_type"] == "llama"
    torch.testing.assert_close(logits_of(tmp_path / "again", tokens), logits_of(saved[1], tokens))


def test_the_tokenizer_loads_beside_it(saved, tokenizer):
    assert AutoTokenizer.from_pretrained(saved[1])("knowledge").input_ids == tokenizer("knowledge").input_ids


def test_an_unknown_dense_model_is_refused(saved):
    content = json.loads((saved[1] / "config.json").read_text())
    (saved[1] / "config.json").write_text(json.dumps(content | {"dense_model_type": "no-such-model"}))
    with pytest.raises(Exception, match="no-such-model"):
        AutoConfig.from_pretrained(saved[1])


def test_the_hook_takes_less_than_a_millisecond(python):
    code = (
        "import time; start = time.perf_counter(); import _fasc_transformers; seconds = time.perf_counter() - start\n"
        "import sys; print(seconds, 'fasc' in sys.modules, 'transformers' in sys.modules)"
    )
    if _hook_is_installed(python):
        code = "import sys; del sys.modules['_fasc_transformers']\n" + code
    tries = []
    for _ in range(3):
        seconds, *imported = python(code).stdout.split()
        tries.append(float(seconds))
        assert imported == ["False", "False"]
    assert min(tries) < 1e-3


def test_the_hook_leaves_transformers_alone_where_we_cannot_be_imported(python):
    result = python(
        "import sys; import _fasc_transformers; sys.modules['fasc'] = None\n"
        "import warnings; warnings.simplefilter('always')\n"
        "from transformers import LlamaConfig; print(LlamaConfig().model_type)"
    )
    assert result.stdout.strip() == "llama", result.stderr
    assert "cannot be imported" in result.stderr
