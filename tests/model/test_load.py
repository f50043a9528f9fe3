"""A model from a folder: everything that is not whole is refused, nothing is unpickled, no code of it is run."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from fasc.errors import ModelError, NonFiniteError, UsageError
from fasc.model.load import load_model, model_fingerprint, model_of_config
from fasc.model.options import ModelConfig
from fasc.options import parse
from tests.conftest import logits, tiny_model
from tests.zoo.tiny import tiny_config


@pytest.fixture
def folder(model_folder, tmp_path):
    shutil.copytree(model_folder, tmp_path / "model")
    return tmp_path / "model"


def change(folder, what):
    tensors = load_file(folder / "model.safetensors")
    what(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def refusal(folder, **options):
    with pytest.raises(ModelError) as problem:
        load_model(folder, **options)
    assert "\n" not in str(problem.value)
    return str(problem.value)


def test_a_folder_loads_as_a_str_and_as_a_path(model_folder, tokens):
    for spec in (str(model_folder), model_folder):
        loaded = load_model(spec)
        assert not loaded.model.training
        assert torch.equal(logits(loaded.model, tokens), logits(tiny_model(), tokens))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_it_loads_in_the_precision_asked_for(model_folder, dtype):
    assert {parameter.dtype for parameter in load_model(model_folder, dtype=dtype).model.parameters()} == {getattr(torch, dtype)}


def test_absent_tensors_are_refused_and_not_invented(folder):
    change(folder, lambda tensors: tensors.pop("model.layers.1.mlp.up_proj.weight"))
    assert "1 weights are missing, the first is `model.layers.1.mlp.up_proj.weight`" in refusal(folder)


def test_weights_that_are_not_finite_are_refused(folder):
    change(folder, lambda tensors: tensors["model.norm.weight"].fill_(float("nan")))
    with pytest.raises(NonFiniteError, match=r"weight `model\.norm\.weight`"):
        load_model(folder)


def test_truncated_and_absent_files_are_refused(folder):
    file = folder / "model.safetensors"
    content = file.read_bytes()
    file.write_bytes(content[: len(content) // 2])
    assert str(folder) in refusal(folder)
    file.unlink()
    assert str(folder) in refusal(folder)
    (folder / "config.json").unlink()
    assert "holds no config.json" in refusal(folder)


def test_pickled_weights_are_not_read(folder):
    state = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    torch.save(state, folder / "pytorch_model.bin")
    refusal(folder)


def test_code_of_a_checkpoint_is_not_run(folder, tmp_path):
    config = json.loads((folder / "config.json").read_text())
    config |= {"model_type": "evil", "auto_map": {"AutoConfig": "evil.EvilConfig", "AutoModelForCausalLM": "evil.EvilModel"}}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n")
    refusal(folder)
    assert not (tmp_path / "ran").exists()


def test_what_is_no_model_says_what_a_model_looks_like(tmp_path):
    assert "aliases" in refusal(tmp_path / "nothing")
    assert "aliases" in refusal("tiny")
    assert ".gguf" in refusal(tmp_path / "absent.gguf")


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("family", ["bert", "roberta", "electra", "xlm"])
def test_an_encoder_is_no_causal_model(family, tokenizer, tmp_path):
    config = tiny_config(family)
    if hasattr(config, "is_decoder"):
        config.is_decoder = False
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    assert "is an encoder" in refusal(tmp_path)
    with pytest.raises(ModelError, match="is an encoder"):
        model_of_config(tmp_path)


def test_a_device_that_is_not_there_is_refused(model_folder):
    assert "unknown device" in refusal(model_folder, device="abacus")
    if not torch.cuda.is_available():
        assert "not available" in refusal(model_folder, device="cuda")


def test_a_precision_that_does_not_exist_is_refused():
    with pytest.raises(UsageError, match="`dtype`"):
        parse(ModelConfig, {"dtype": "int3"}, "source")


def test_the_fingerprint_is_of_the_weights(model):
    first = model_fingerprint(model)
    assert model_fingerprint(tiny_model()) == first
    with torch.no_grad():
        model.model.norm.weight[0] += 1e-3
    assert model_fingerprint(model) != first


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_a_model_loads_onto_the_gpu_that_is_there(model_folder, tokens):
    loaded = load_model(model_folder).model
    assert {parameter.device.type for parameter in loaded.parameters()} == {"cuda"}
    torch.testing.assert_close(logits(loaded, tokens.cuda()).cpu(), logits(tiny_model(), tokens), rtol=0, atol=1e-2)
