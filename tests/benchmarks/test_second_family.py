"""A small Gemma 3 made here (benchmarks/second_family.py), and what is said of its forecasts."""

import argparse

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from fasc.model.load import load_model
from tests.conftest import logits

TEXTS = ["The first of many short texts, about nothing.", "Another: 12 numbers, é and ü, and code() too.\n"] * 8


@pytest.fixture(scope="module")
def family(script):
    return script("second_family")


def test_its_tokenizer_reads_back_any_text(family, tmp_path):
    tokenizer = family.made_tokenizer(300, TEXTS)
    tokenizer.save_pretrained(tmp_path)
    for one in (tokenizer, AutoTokenizer.from_pretrained(tmp_path)):
        for text in (TEXTS[1], "never seen: ß漢🙂\t"):
            assert one.decode(one(text, add_special_tokens=False).input_ids) == text


def test_it_has_what_llamas_have_not(family):
    model = family.small_gemma(300, width=32, blocks=3)
    attention, block = model.model.layers[0].self_attn, model.model.layers[0]
    assert attention.q_proj.weight.shape[0] == 4 * attention.k_proj.weight.shape[0]
    assert attention.q_norm.weight.shape == (8,)
    assert {"pre_feedforward_layernorm", "post_feedforward_layernorm"} <= {name for name, _ in block.named_children()}
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight
    assert model.config.layer_types == ["sliding_attention", "sliding_attention", "full_attention"]


def test_training_is_seeded_and_learns(family):
    ids = (torch.arange(40 * 16) % 7 + 3).view(40, 16)  # one token after the other: easy to learn
    asked = argparse.Namespace(tokens=4096, batch_tokens=128, learning_rate=1e-2, seed=1)
    outcomes = []
    for _ in range(2):
        torch.manual_seed(0)
        model = family.small_gemma(16, width=32, blocks=1)
        steps = family.train(model, ids, ids[:4], asked)
        outcomes.append((steps, logits(model, ids[:2])))
    (steps, first), (again, second) = outcomes
    assert steps == again
    assert torch.equal(first, second)
    assert steps[-1]["held_out_nll"] < 0.3 * steps[0]["nll"]


def test_verdict_compares_with_the_mean_of_both_corpora(family):
    def row(forecast, wikitext, c4):
        return {
            "predicted_loss": forecast,
            "scores": {"wikitext2": {"kl": wikitext}, "c4": {"kl": c4}, "program code": {"kl": 9.0}},
        }

    rows = {"params 0.9": row(0.1, 0.1, 0.14), "params 0.8": row(0.1, 0.2, 0.1), "bits 3.25 alone": row(0.1, 0.06, 0.11)}
    table = family.verdict({"rows": rows, "expected": {"params 0.8": {"kl": 0.16}, "bits 3.25 alone": {"kl": 0.11}}})
    assert table["params 0.9"] == {
        "forecast": 0.1,
        "measured": pytest.approx(0.12),
        "over_measured": {"forecast": pytest.approx(0.1 / 0.12), "corrected": None},
        "within": {"forecast": True, "corrected": False},
    }
    assert table["params 0.8"]["within"] == {"forecast": False, "corrected": True}  # 0.67 and 1.07
    assert table["bits 3.25 alone"]["within"] == {"forecast": True, "corrected": False}  # 1.18 and 1.29


def test_a_trained_one_is_a_checkpoint_that_fasc_loads(family, tmp_path):
    tokenizer, model = family.made_tokenizer(300, TEXTS), family.small_gemma(300, width=32, blocks=1)
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    ids = torch.arange(3, 40)[None]
    loaded = load_model(tmp_path, dtype="float32", device="cpu")
    assert torch.equal(logits(loaded.model, ids), logits(model, ids))
    assert type(AutoModelForCausalLM.from_pretrained(tmp_path)).__name__ == "Gemma3ForCausalLM"
