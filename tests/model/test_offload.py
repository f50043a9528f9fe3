"""A model whose layers lie on disk is measured, compressed and saved like one in memory, and left as it was."""

import json

import pytest
import torch

from fasc.errors import ModelError, UsageError
from fasc.model.load import load_model, model_fingerprint
from fasc.model.offload import all_numbers, is_offloaded, numbers_of, place_of, read_device_map
from fasc.planning.options import MethodConfig
from fasc.stages.compress import compress
from fasc.stages.plan import plan
from fasc.statistics.collect import collect_moments
from fasc.statistics.options import CalibrationConfig
from tests.conftest import logits, tiny_model
from tests.statistics.needs import EVERYTHING
from tests.statistics.test_passes import equal

ON_DISK = {"": "cpu", "model.layers.0": "disk", "model.layers.1": "disk"}
OPTIONS = CalibrationConfig(batch_tokens=160, labels="sampled")


@pytest.fixture
def offloaded(model_folder):
    return load_model(model_folder, device_map=ON_DISK).model


def test_layers_on_disk_hold_no_numbers_and_compute_the_same(offloaded, model_folder, tokens):
    dense = load_model(model_folder).model
    assert is_offloaded(offloaded)
    assert not is_offloaded(dense)
    assert offloaded.model.layers[0].mlp.down_proj.weight.is_meta
    assert torch.equal(logits(offloaded, tokens), logits(dense, tokens))
    assert torch.equal(numbers_of(offloaded.model.layers[1].mlp.up_proj), dense.model.layers[1].mlp.up_proj.weight)
    assert model_fingerprint(offloaded) == model_fingerprint(dense)


def test_the_moments_are_those_of_the_model_in_memory(offloaded, model_folder, tokens):
    before = [(name, one.requires_grad, one.is_meta) for name, one in offloaded.named_parameters()]
    whole = collect_moments(load_model(model_folder).model, tokens, EVERYTHING, calibration=OPTIONS)
    assert any(trainable for _, trainable, _ in before)
    same = collect_moments(offloaded, tokens, EVERYTHING, calibration=OPTIONS)
    equal(whole, same)
    assert same.meta["model_fingerprint"] == whole.meta["model_fingerprint"]
    assert [(name, one.requires_grad, one.is_meta) for name, one in offloaded.named_parameters()] == before


@pytest.mark.parametrize("layouts", [("pivoted", "pivoted-columns", "dense"), ("factors", "dense"), None])
def test_a_model_on_disk_is_compressed_to_the_same_checkpoint(offloaded, model_folder, tokens, tmp_path, layouts):
    dense = load_model(model_folder)
    statistics = collect_moments(dense.model, tokens, EVERYTHING, calibration=OPTIONS)
    method = MethodConfig(name="fasc", layouts=layouts)
    plans = [plan(one, statistics, method=method, param_fraction=0.6) for one in (dense.model, offloaded)]
    assert plans[0].edits == plans[1].edits
    folders = [tmp_path / "memory", tmp_path / "disk"]
    for one, made, folder in zip((dense.model, offloaded), plans, folders, strict=True):
        small = compress(one, statistics, made)
        small.save(folder, tokenizer=dense.tokenizer, max_shard_size="40kB" if layouts is None else None)
    assert all(tensor.is_meta for name, tensor in offloaded.named_parameters() if ".layers." in name)
    here, there = (dict(all_numbers(one)) for one in (dense.model, offloaded))
    assert here.keys() == there.keys()
    for name, tensor in here.items():
        assert torch.equal(tensor, there[name]), name
    again = [load_model(folder).model for folder in folders]
    assert torch.equal(logits(again[0], tokens), logits(again[1], tokens))
    sizes = [{file.name: file.stat().st_size for file in folder.glob("*.safetensors")} for folder in folders]
    assert sizes[0].keys() == sizes[1].keys()
    assert (len(sizes[0]) > 1) == (layouts is None)
    assert layouts is None or sizes[0] == sizes[1]


def test_a_compressed_checkpoint_is_offloaded_too(offloaded, model_folder, tokens, tmp_path):
    dense = load_model(model_folder)
    statistics = collect_moments(dense.model, tokens, EVERYTHING, calibration=OPTIONS)
    small = compress(dense.model, statistics, param_fraction=0.6)
    small.save(tmp_path / "small", tokenizer=dense.tokenizer)
    placed = load_model(tmp_path / "small", device_map=ON_DISK).model
    assert is_offloaded(placed)
    assert torch.equal(logits(placed, tokens), logits(load_model(tmp_path / "small").model, tokens))


def test_what_needs_all_weights_is_refused_before_the_work(offloaded, model_folder, tokens):
    statistics = collect_moments(tiny_model(), tokens, EVERYTHING, calibration=OPTIONS)
    method = MethodConfig(name="fasc", propagate=True)
    made = plan(offloaded, statistics, method=method, param_fraction=0.6)
    with pytest.raises(ModelError, match="--propagate needs all weights in memory"):
        compress(offloaded, statistics, made)


def test_a_map_that_splits_a_block_is_refused(model_folder):
    split = ON_DISK | {"model.layers.1.mlp": "cpu"}
    with pytest.raises(ModelError, match=r"splits `model\.layers\.1`: .* goes to disk and .* to cpu"):
        load_model(model_folder, device_map=split)
    whole = ON_DISK | {"model.layers.1.mlp": "disk"}
    assert is_offloaded(load_model(model_folder, device_map=whole).model)


def test_other_maps_that_cannot_be_are_refused(model_folder, tmp_path):
    with pytest.raises(ModelError, match="embedding"):
        load_model(model_folder, device_map={"": "cpu", "model.embed_tokens": "disk", "lm_head": "disk"})
    with pytest.raises(UsageError, match="a device .* and a device map"):
        load_model(model_folder, device="cpu", device_map="auto")
    with pytest.raises(UsageError, match="no way of placing"):
        load_model(model_folder, device_map="anywhere")
    file = tmp_path / "map.json"
    for wrong in ("[]", "{}", '{"a": 1.5}', "{"):
        file.write_text(wrong)
        with pytest.raises(UsageError, match="device map"):
            load_model(model_folder, device_map=str(file))
    file.write_text(json.dumps(ON_DISK))
    assert read_device_map(str(file)) == ON_DISK
    assert is_offloaded(load_model(model_folder, device_map=str(file)).model)


def test_the_smallest_part_around_a_name_counts():
    places = {"": "cpu", "model.layers.1": "disk", "model.layers.1.mlp": 0}
    assert place_of("model.layers.1.mlp.up_proj.weight", places) == 0
    assert place_of("model.layers.1.self_attn.q_proj.weight", places) == "disk"
    assert place_of("model.layers.10.mlp.up_proj.weight", places) == "cpu"
    assert place_of("lm_head.weight", {"model": "cpu"}) is None


def test_an_automatic_map_places_a_small_model_in_memory(model_folder, tokens):
    placed = load_model(model_folder, device_map="auto").model
    assert not is_offloaded(placed)
    if placed.device.type == "cpu":
        assert torch.equal(logits(placed, tokens), logits(load_model(model_folder).model, tokens))


def test_experts_are_refused(mixture, tokenizer, tmp_path):
    mixture.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    with pytest.raises(ModelError, match=r"experts|offload_folder"):
        load_model(tmp_path, device_map=ON_DISK)
