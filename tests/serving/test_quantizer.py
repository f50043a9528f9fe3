"""Damaged checkpoints are refused by plain transformers, in one line; nothing is invented."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from fasc.errors import FascError, ModelError, NonFiniteError
from fasc.model.load import load_model
from fasc.model.structure import FORMAT, FascConfig
from fasc.serving import quantizer
from tests.conftest import logits, tiny_model


@pytest.fixture
def folder(checkpoint, tmp_path):
    shutil.copytree(checkpoint, tmp_path / "damaged")
    return tmp_path / "damaged"


def change_config(folder, change):
    config = json.loads((folder / "config.json").read_text())
    change(config["quantization_config"])
    (folder / "config.json").write_text(json.dumps(config))


def change_weights(folder, change):
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def edit_of(structure, kind):
    return next(edit for edit in structure["edits"] if edit["edit"] == kind)


def a_tensor_of(tensors, ending):
    return next(name for name in sorted(tensors) if name.endswith(ending))


def test_the_undamaged_checkpoint_loads(folder):
    kinds = {edit["edit"] for edit in json.loads((folder / "config.json").read_text())["quantization_config"]["edits"]}
    assert kinds == {"narrow", "factor"}
    AutoModelForCausalLM.from_pretrained(folder)


STRUCTURES = {
    "another rank": (
        lambda s: edit_of(s, "factor").update(rank=5),
        r"`model\.layers\.\d\..*` is \d+×\d+ in the weights and .*5.* by config\.json",
    ),
    "another width": (
        lambda s: edit_of(s, "narrow").update(width=9),
        r"`model\.layers\.0\.mlp\..*` is .* in the weights and .*9.* by config\.json",
    ),
    "rank 0": (lambda s: edit_of(s, "factor").update(rank=0), "`rank`"),
    "a rank that is no number": (lambda s: edit_of(s, "factor").update(rank="many"), "`rank`"),
    "an enormous rank": (lambda s: edit_of(s, "factor").update(rank=10**12), "cannot have rank 1000000000000"),
    "an unknown edit": (lambda s: edit_of(s, "factor").update(edit="explode"), "edit 1: unknown edit `explode`"),
    "an edit without a kind": (lambda s: edit_of(s, "factor").pop("edit"), "unknown edit `None`"),
    "an edit that is no mapping": (lambda s: s["edits"].insert(0, 7), "unknown edit `None`"),
    "an unknown layout": (
        lambda s: edit_of(s, "factor").update(layout="foam"),
        "unknown layout of factors `foam`|unknown layout `foam`",
    ),
    "a layout that stores nothing": (lambda s: edit_of(s, "factor").update(layout="dense"), "unknown layout of factors `dense`"),
    "another layout": (lambda s: edit_of(s, "factor").update(layout="merged"), "lacks|in the weights"),
    "a field that is not known": (lambda s: edit_of(s, "factor").update(code="import os"), "`code`"),
    "a field too few": (lambda s: edit_of(s, "factor").pop("d_in"), "`d_in`"),
    "widths that do not fit the layers": (lambda s: edit_of(s, "factor")["d_outs"].append(4), "do not fit"),
    "another shape": (lambda s: edit_of(s, "factor").update(d_in=31), "is .*×32.* here and .*×31.* in the plan"),
    "a layer of another model": (
        lambda s: edit_of(s, "factor").update(layers=["model.layers.9.x"] * len(edit_of(s, "factor")["layers"])),
        "listed twice|no linear layer of this model",
    ),
    "an edit made twice": (lambda s: s["edits"].append(edit_of(s, "factor")), "an earlier edit has replaced it"),
    "more channels than there are": (
        lambda s: edit_of(s, "narrow").update(channels=50, width=49),
        "cannot keep 49 of 50 channels",
    ),
    "as many channels as there are": (lambda s: edit_of(s, "narrow").update(width=48), "cannot keep 48 of 48 channels"),
    "a list that is none": (lambda s: s.update(edits={"a": 1}), "`edits` is no list"),
    "an old format": (lambda s: s.update(format=4), "has format 4, and this fasc reads 6"),
    "a newer format": (lambda s: s.update(format=99), "has format 99, .*upgrade fasc"),
    "no format": (lambda s: s.pop("format"), "has format None"),
    "a format of another type": (lambda s: s.update(format="5"), "has format 5"),
}


@pytest.mark.parametrize("what", STRUCTURES)
def test_a_structure_that_is_not_the_weights_is_refused_in_one_line(folder, what):
    change, message = STRUCTURES[what]
    change_config(folder, change)
    for load in (AutoModelForCausalLM.from_pretrained, load_model):
        with pytest.raises(FascError, match=message) as problem:
            load(folder)
        assert "\n" not in str(problem.value)
    assert str(folder) in str(problem.value), "load_model names the folder"


@pytest.mark.parametrize("part", ["factor", "narrow"])
def test_every_field_that_is_gone_or_of_another_type_is_refused_or_harmless(folder, part, tokens):
    """Whatever stands in config.json, loading gives the same model or ends in one line."""
    expected = logits(AutoModelForCausalLM.from_pretrained(folder), tokens)
    pristine = (folder / "config.json").read_text()
    refused = 0
    for field in edit_of(json.loads(pristine)["quantization_config"], part):
        for ruined in (None, -1, 0, 1.5, "x", [], {}, [None], 10**9):
            (folder / "config.json").write_text(pristine)
            change_config(folder, lambda s, field=field, ruined=ruined: edit_of(s, part).update({field: ruined}))
            try:
                loaded = AutoModelForCausalLM.from_pretrained(folder)
            except FascError as problem:
                refused += 1
                assert "\n" not in str(problem)
            else:
                assert torch.equal(logits(loaded, tokens), expected), (field, ruined)
    assert refused > 30


def test_edits_of_one_mlp_in_another_order_are_refused(compressed, write, tmp_path):
    """A factored layer cannot lose channels afterwards."""
    model, plan = compressed(param_fraction=0.25)
    (narrow,) = [edit for edit in plan.edits if edit.edit == "narrow"]
    assert any(set(edit.touches) & set(narrow.touches) for edit in plan.edits if edit.edit == "factor")
    folder = write(model, tmp_path / "out", plan)
    AutoModelForCausalLM.from_pretrained(folder)
    change_config(folder, lambda structure: structure["edits"].reverse())
    with pytest.raises(ModelError, match=r"down_proj` is 32×48.* here and 32×12.* in the plan"):
        AutoModelForCausalLM.from_pretrained(folder)


def without(ending):
    def change(tensors):
        del tensors[a_tensor_of(tensors, ending)]

    return change


ABSENT = {
    "a first factor": "down.rest.weight",
    "a second factor": "up.weight",
    "a bias": "up.bias",
    "an order": ".order",
    "a narrower layer": "layers.0.mlp.gate_proj.weight",
    "the bias of a refitted layer": "layers.0.mlp.down_proj.bias",
    "a norm": "model.norm.weight",
    "the embeddings": "embed_tokens.weight",
}


@pytest.mark.parametrize("what", ABSENT)
def test_an_absent_tensor_is_refused_and_not_invented(folder, what):
    change_weights(folder, without(ABSENT[what]))
    for load in (AutoModelForCausalLM.from_pretrained, load_model):
        with pytest.raises(ModelError, match=rf"the checkpoint lacks `.*{ABSENT[what]}`") as problem:
            load(folder)
        assert "\n" not in str(problem.value)


@pytest.mark.parametrize("what", ["a first factor", "a bias", "an order", "a narrower layer"])
def test_an_absent_tensor_is_refused_where_it_would_be_offloaded(folder, what, tmp_path):
    change_weights(folder, without(ABSENT[what]))
    with pytest.raises(ModelError, match="lacks"):
        AutoModelForCausalLM.from_pretrained(folder, device_map={"": "disk"}, offload_folder=tmp_path / "offloaded")


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("ending", ["up.weight", "down.rest.weight", "down_proj.bias", "model.norm.weight"])
def test_weights_that_are_not_finite_are_refused(folder, value, ending):
    def ruin(tensors):
        tensors[a_tensor_of(tensors, ending)].view(-1)[3] = value

    change_weights(folder, ruin)
    for load in (AutoModelForCausalLM.from_pretrained, load_model):
        with pytest.raises(NonFiniteError, match=rf"weight `.*{ending}` is not finite") as problem:
            load(folder)
        assert "\n" not in str(problem.value)


def test_a_tensor_of_another_shape_is_refused_before_anything_is_loaded(folder):
    def ruin(tensors):
        name = a_tensor_of(tensors, "up.weight")
        tensors[name] = tensors[name][:-1].contiguous()

    change_weights(folder, ruin)
    with pytest.raises(ModelError, match=r"up.weight` is \d+×\d+ in the weights and \d+×\d+ by config.json"):
        AutoModelForCausalLM.from_pretrained(folder)


def test_truncated_and_absent_files_are_refused(folder):
    file = folder / "model.safetensors"
    content = file.read_bytes()
    file.write_bytes(content[: len(content) // 2])
    with pytest.raises(ModelError) as problem:
        load_model(folder)
    assert "\n" not in str(problem.value)
    file.unlink()
    with pytest.raises(ModelError):
        load_model(folder)


def test_a_model_of_other_weights_is_refused(folder):
    """The structure of one checkpoint beside the weights and the config of a dense model."""
    structure = json.loads((folder / "config.json").read_text())["quantization_config"]
    tiny_model(layers=3).save_pretrained(folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"quantization_config": structure}))
    with pytest.raises(ModelError, match="in the weights and|lacks"):
        AutoModelForCausalLM.from_pretrained(folder)


def test_a_dense_checkpoint_is_none_of_ours(tmp_path, tokens):
    """Ours or not is said by config.json; what others have left out is transformers' matter."""
    model = tiny_model()
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert getattr(loaded, "hf_quantizer", None) is None
    assert torch.equal(logits(loaded, tokens), logits(model, tokens))


def test_registering_twice_is_harmless():
    quantizer.register()
    quantizer.register()


def test_the_structure_is_plain_json_and_names_its_format(checkpoint):
    raw = json.loads((checkpoint / "config.json").read_text())["quantization_config"]
    assert raw["format"] == FORMAT
    again = FascConfig(**{key: value for key, value in raw.items() if key != "quant_method"})
    assert json.loads(json.dumps(again.to_dict()))["edits"] == raw["edits"]


def test_the_tokenizer_travels(checkpoint, tokenizer):
    assert AutoTokenizer.from_pretrained(checkpoint)("a lazy dog") == tokenizer("a lazy dog")
