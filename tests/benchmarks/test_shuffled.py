"""A Llama with its features in another order (benchmarks/shuffled.py) computes what it did."""

import sys

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from tests.conftest import _COMMON, byte_tokenizer, logits, tiny_model


@pytest.fixture(scope="module")
def shuffled(script):
    return script("shuffled")


def _order(seed=3):
    return torch.randperm(32, generator=torch.Generator().manual_seed(seed))


def _weights(model):
    return {name: value.clone() for name, value in model.state_dict().items()}


def _other(**options):
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**_COMMON, **options))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.3)
    return model


@pytest.mark.parametrize(
    "made",
    [
        tiny_model,
        lambda: _other(tie_word_embeddings=False),
        lambda: _other(attention_bias=True, mlp_bias=True, tie_word_embeddings=True),
    ],
    ids=["tied", "untied", "biases"],
)
def test_logits_stay_and_weights_do_not(shuffled, made, tokens):
    model = made().eval()
    before, expected = _weights(model), logits(model, tokens)
    shuffled.permute(model, _order())
    torch.testing.assert_close(logits(model, tokens), expected, rtol=1e-4, atol=1e-4)  # norms are in float32
    readers_outputs = [name for name in before if name.endswith(".bias") and "o_proj" not in name and "down_proj" not in name]
    for name, weight in model.state_dict().items():
        assert torch.equal(weight, before[name]) == (name in readers_outputs), name


def test_the_inverse_order_gives_the_same_weights_back(shuffled):
    model = tiny_model()
    before, order = _weights(model), _order()
    shuffled.permute(model, order)
    shuffled.permute(model, order.argsort())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize("architecture", ["qwen3", "gemma3", "gpt2"])
def test_what_is_no_llama_is_refused_and_left_as_it_was(shuffled, architecture):
    model = tiny_model(architecture)
    before = _weights(model)
    with pytest.raises(ValueError, match="no parameter of a Llama"):
        shuffled.permute(model, _order())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_what_is_no_permutation_is_refused(shuffled):
    with pytest.raises(ValueError, match="32 features"):
        shuffled.permute(tiny_model(), torch.zeros(32, dtype=torch.long))


def test_the_script_writes_a_model_that_computes_the_same(shuffled, tokens, tmp_path, monkeypatch, capsys):
    model = tiny_model()
    model.save_pretrained(tmp_path / "dense")
    byte_tokenizer().save_pretrained(tmp_path / "dense")
    monkeypatch.setattr(sys, "argv", ["shuffled.py", str(tmp_path / "dense"), "--out", str(tmp_path / "out")])
    shuffled.main()
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    torch.testing.assert_close(logits(again, tokens), logits(model, tokens), rtol=1e-4, atol=1e-4)
    assert not torch.equal(again.get_input_embeddings().weight, model.get_input_embeddings().weight)
    assert "logits differ by at most" in capsys.readouterr().out
