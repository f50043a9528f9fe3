"""A dozen families from end to end; ``make zoo`` walks all of them, each in a process of its own."""

import pytest

from tests.zoo.walk import compress, load

FAMILIES = (
    "llama", "qwen3", "gemma3_text", "phi3", "gpt2", "gpt_neox", "bloom", "mixtral", "qwen2_moe", "deepseek_v3", "falcon_mamba", "bamba",
    "recurrent_gemma", "xlstm", "zaya", "prophetnet", "qwen3_moe", "gpt_oss", "llama4_text", "dbrx",
)  # fmt: skip


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("family", FAMILIES)
def test_a_family_is_compressed_saved_loaded_and_writes_the_same(family, tmp_path):
    made = compress(family, tmp_path)
    assert "outcome" not in made, made.get("trace", made)
    assert 0 < made["reached"] <= 1
    assert load(tmp_path) == {"outcome": "works"}


@pytest.mark.filterwarnings("ignore")
def test_a_model_without_gradients_in_evaluation_is_refused_in_one_line(tmp_path):
    made = compress("reformer", tmp_path)
    assert made["outcome"] == "refused", made
    assert "makes no gradients" in made["line"]
