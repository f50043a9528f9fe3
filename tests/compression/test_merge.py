"""Merging: an ordinary dense checkpoint that computes the same and loads without fasc."""

import copy
import json

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM

import fasc
from fasc.compression.compress import carry_out
from fasc.compression.merge import merge
from fasc.edits.structure import edited_layers, structure_of
from fasc.errors import UsageError
from fasc.stages.plan import plan
from tests.conftest import in_new_process, logits, tiny_model

WITHOUT_FASC = """
import sys
sys.modules["fasc"] = None  # as where it is not installed
from transformers import AutoModelForCausalLM
model, info = AutoModelForCausalLM.from_pretrained(sys.argv[1], output_loading_info=True)
assert not info["missing_keys"] and not info["unexpected_keys"], info
"""


@pytest.fixture
def compressed(measured):
    def of(architecture="llama", **options):
        model = tiny_model(architecture)
        made = plan(model, measured(architecture), **({"rank_fraction": 0.5} | options))
        return model, carry_out(model, measured(architecture), made)

    return of


def test_a_merged_checkpoint_is_an_ordinary_one(compressed, measured, tokens, tmp_path, architecture):
    model, _ = compressed(architecture)
    before = logits(model, tokens)
    folded = merge(model, measured(architecture), 1e-6)
    merged = logits(model, tokens)
    model.save_pretrained(tmp_path)
    assert "quantization_config" not in json.loads((tmp_path / "config.json").read_text())
    assert structure_of(model) is None
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(logits(again, tokens), merged)
    dense = tiny_model(architecture)
    assert {name: type(module) for name, module in again.named_modules()} == {
        name: type(module) for name, module in dense.named_modules()
    }
    if architecture in ("llama", "gpt2"):  # every layer has, or can be given, a bias
        assert not folded
        torch.testing.assert_close(merged, before, rtol=0, atol=1e-4)
    else:
        assert folded


def test_a_merged_checkpoint_loads_where_fasc_is_not_imported(compressed, measured, tmp_path):
    model, _ = compressed()
    merge(model, measured(), 1e-6)
    model.save_pretrained(tmp_path)
    in_new_process(WITHOUT_FASC, tmp_path)


def test_a_folded_bias_is_better_than_a_dropped_one(compressed, measured, tokens):
    model, _ = compressed("mistral")
    expected = logits(model, tokens)
    dropped = copy.deepcopy(model)
    for name in edited_layers(dropped):
        for linear in dropped.get_submodule(name).modules():
            if isinstance(linear, nn.Linear) and linear.bias is not None:
                linear.bias.data.zero_()
    assert merge(model, measured("mistral"), 1e-6)
    assert (logits(model, tokens) - expected).norm() < 0.9 * (logits(dropped, tokens) - expected).norm()


def test_layers_of_a_group_of_which_one_is_merged_elsewhere_keep_their_projection(compressed, measured, tokens):
    """The first layer of a unit holds what the others read; all are read out before any is replaced."""
    model, made = compressed(layouts=("shared", "factors"), rank_fraction=0.25)
    assert any(len(edit.layers) > 1 for edit in made.edits)
    before = logits(model, tokens)
    merge(model, measured(), 1e-6)
    torch.testing.assert_close(logits(model, tokens), before, rtol=0, atol=1e-4)


def test_fewer_channels_cannot_be_merged_and_the_model_stays(compressed, measured, tokens):
    model, _ = compressed(rank_fraction=None, param_fraction=0.85, damping=1e-2, layouts=("dense", "channels"))
    before = logits(model, tokens)
    with pytest.raises(UsageError, match="cannot be merged"):
        merge(model, measured(), 1e-2)
    assert torch.equal(logits(model, tokens), before)


def test_compressing_for_a_merged_checkpoint_leaves_channels_alone(model_folder, text_file, tmp_path):
    done = fasc.compress_checkpoint(
        model_folder,
        str(text_file),
        out=tmp_path / "merged",
        merge=True,
        param_fraction=0.6,
        sequences=16,
        sequence_length=16,
        damping=1e-2,
    )
    assert {edit.edit for edit in done.plan.edits} == {"factor"}
    assert done.merged
    config = json.loads((tmp_path / "merged" / "config.json").read_text())
    assert "quantization_config" not in config
    assert config["attention_bias"]
