"""A compressed model as a folder: what lies in it, and that it comes back to the very bit."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from fasc.compression.compress import carry_out
from fasc.edits.structure import edited_layers, parsed, structure_of
from fasc.errors import StorageError
from fasc.methods import METHODS
from fasc.model.groups import find_groups
from fasc.model.load import load_model
from fasc.model.options import LayersConfig
from fasc.serving.checkpoint import header_bytes, read_provenance
from fasc.serving.quantizer import attach
from fasc.stages.plan import plan
from fasc.statistics.collect import collect_moments
from tests.conftest import CONFIGS, PARALLEL, in_new_process, logits, tiny_model

NEEDS = METHODS["fasc"].needs_in(("group", "layer"))

READER = """
import sys
import fasc, torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM
for folder in sys.argv[2:]:
    seen = load_file(folder + "/expected")
    model = AutoModelForCausalLM.from_pretrained(folder)
    with torch.no_grad():
        assert torch.equal(model(input_ids=seen["tokens"]).logits, seen["logits"]), folder
    assert not model.training
print("read", len(sys.argv) - 2)
"""


def test_a_new_process_gives_identical_logits(compressed, write, tokens, tmp_path):
    """Of every architecture, with fewer channels and factors in it."""
    folders = []
    for architecture in CONFIGS:
        model, made = compressed(architecture)
        assert {edit.edit for edit in made.edits} == {"narrow", "factor"}
        folders.append(write(model, tmp_path / architecture, made))
        save_file({"tokens": tokens, "logits": logits(model, tokens)}, folders[-1] / "expected")
    assert in_new_process(READER, "-", *folders).split() == ["read", str(len(CONFIGS))]


@pytest.mark.parametrize("method", ["fasc", "svd", "two-sided"])
def test_ranks_of_every_scope_come_back(compressed, write, tokens, tmp_path, architecture, method):
    model, made = compressed(architecture, method=method, rank_fraction=0.6)
    loaded = AutoModelForCausalLM.from_pretrained(write(model, tmp_path / "out", made))
    assert torch.equal(logits(loaded, tokens), logits(model, tokens))


def test_what_was_propagated_comes_back(compressed, write, tokens, tmp_path, architecture):
    model, made = compressed(architecture, propagate=True)
    loaded = AutoModelForCausalLM.from_pretrained(write(model, tmp_path / "out", made))
    assert torch.equal(logits(loaded, tokens), logits(model, tokens))


@pytest.mark.parametrize("name", PARALLEL)
@pytest.mark.parametrize("propagate", [False, True])
def test_a_parallel_block_keeps_its_budget_and_comes_back(name, propagate, tokens, write, tmp_path):
    model = tiny_model(name)
    moments = collect_moments(model, tokens, NEEDS)
    made = plan(model, moments, param_fraction=0.6, damping=1e-2)
    assert "narrow" in {edit.edit for edit in made.edits}
    assert made.totals["param_fraction"] <= 0.6
    done = carry_out(model, moments, made, propagate=propagate)
    attach(model)
    orders = sum(buffer.numel() for key, buffer in model.named_buffers() if key.endswith(".order"))
    assert model.num_parameters() + orders == made.totals["parameters"]
    loaded = AutoModelForCausalLM.from_pretrained(write(model, tmp_path / "out", done))
    assert torch.equal(logits(loaded, tokens), logits(model, tokens))


def test_experts_travel_beside_what_was_compressed(mixture, tokens, write, tmp_path):
    """Files name the experts' weights otherwise than the model does; none of them may be taken for absent."""
    statistics = collect_moments(mixture, tokens, NEEDS)
    made = plan(mixture, statistics, rank_fraction=0.25, damping=1e-2)
    done = carry_out(mixture, statistics, made)
    attach(mixture)
    assert edited_layers(mixture)
    folder = write(mixture, tmp_path / "out", done)
    for options in ({}, {"device_map": {"": "disk"}, "offload_folder": tmp_path / "offloaded"}):
        loaded = AutoModelForCausalLM.from_pretrained(folder, **options)
        assert torch.equal(logits(loaded, tokens), logits(mixture, tokens))


def test_the_structure_is_the_plans_edits(compressed, write, tmp_path):
    model, made = compressed()
    loaded = AutoModelForCausalLM.from_pretrained(write(model, tmp_path / "out", made))
    assert parsed(structure_of(loaded)) == list(made.edits)
    assert edited_layers(loaded) == edited_layers(model)


def test_the_folder_holds_safetensors_and_how_it_was_made_and_no_pickle(checkpoint):
    files = {file.name for file in checkpoint.iterdir()}
    ours = {"fasc_recipe.toml", "fasc_provenance.json", "fasc_plan.json", "README.md"}
    assert {"config.json", "model.safetensors", "tokenizer.json"} | ours <= files
    assert not [name for name in files if name.endswith((".bin", ".pt", ".pth", ".pkl", ".py"))]
    assert [file.name for file in checkpoint.parent.iterdir()] == ["small"]
    config = json.loads((checkpoint / "config.json").read_text())
    assert config["quantization_config"]["quant_method"] == "fasc"
    assert "auto_map" not in config
    files = sorted(file.name for file in checkpoint.iterdir())
    assert read_provenance(checkpoint) == {"versions": {}, "files": files}
    assert read_provenance(checkpoint.parent) is None


def test_tied_embeddings_stay_tied(checkpoint):
    loaded = AutoModelForCausalLM.from_pretrained(checkpoint)
    assert loaded.lm_head.weight is loaded.model.embed_tokens.weight
    assert "lm_head.weight" not in load_file(checkpoint / "model.safetensors")


def test_a_loaded_checkpoint_can_be_saved_again(checkpoint, tokens, tmp_path):
    loaded = AutoModelForCausalLM.from_pretrained(checkpoint)
    loaded.save_pretrained(tmp_path / "again", max_shard_size="20KB")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "again")
    assert torch.equal(logits(again, tokens), logits(loaded, tokens))


def test_a_checkpoint_loads_in_another_precision(checkpoint):
    loaded = load_model(checkpoint, dtype="bfloat16", device="cpu").model
    assert {parameter.dtype for parameter in loaded.parameters()} == {torch.bfloat16}


def test_an_existing_folder_survives_unless_it_may_be_replaced(compressed, write, tmp_path):
    model, made = compressed()
    out = tmp_path / "out"
    out.mkdir()
    (out / "precious.txt").write_text("mine")
    with pytest.raises(StorageError, match="already exists"):
        write(model, out, made)
    assert (out / "precious.txt").read_text() == "mine"
    assert [file.name for file in tmp_path.iterdir()] == ["out"]


def test_the_headers_bound_covers_the_headers_that_are_written(compressed, write, tmp_path, architecture):
    model, made = compressed(architecture, rank_fraction=0.25)
    file = write(model, tmp_path / "out", made) / "model.safetensors"
    weights = sum(tensor.numel() * tensor.element_size() for tensor in load_file(file).values())
    dense = tiny_model(architecture)
    assert 0 < file.stat().st_size - weights <= header_bytes(dense, find_groups(dense, LayersConfig()))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_a_checkpoint_loads_onto_a_gpu(checkpoint, tokens):
    loaded = load_model(checkpoint, device="cuda").model
    assert {parameter.device.type for parameter in loaded.parameters()} == {"cuda"}
    expected = logits(AutoModelForCausalLM.from_pretrained(checkpoint), tokens)
    torch.testing.assert_close(logits(loaded, tokens.cuda()).cpu(), expected, rtol=0, atol=1e-2)
