"""A dense model's MLPs copied into experts (benchmarks/upcycle.py): the mixture says what the dense model says."""

import importlib.util
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from fasc.model.experts import expert_layers
from tests.conftest import logits, tiny_model

_SCRIPT = Path(__file__).parents[2] / "benchmarks" / "upcycle.py"


@pytest.fixture(scope="module")
def upcycle():
    spec = importlib.util.spec_from_file_location("upcycle", _SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("of_a_token", [1, 2, 4])
def test_equal_experts_whose_gates_sum_to_one_are_the_dense_model(upcycle, model, tokens, tmp_path, of_a_token):
    mixture = upcycle.upcycled(model, 4, of_a_token)
    expected = logits(model, tokens)
    torch.testing.assert_close(logits(mixture, tokens), expected, rtol=1e-4, atol=1e-4)
    with expert_layers(mixture) as holders:
        assert len(holders) == model.config.num_hidden_layers
    mixture.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    assert type(again).__name__ == "MixtralForCausalLM"
    torch.testing.assert_close(logits(again, tokens), expected, rtol=1e-4, atol=1e-4)


def test_a_llama_with_biases_is_refused(upcycle):
    other = tiny_model()
    other.config.mlp_bias = True
    with pytest.raises(ValueError, match="biases"):
        upcycle.upcycled(other, 4, 2)


def test_its_corpora_are_one_for_each_expert(upcycle):
    assert len(upcycle.CORPORA) == len(set(upcycle.CORPORA)) == 4
