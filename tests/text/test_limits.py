"""What a model cannot read is refused before it is run."""

import pytest
import torch
from transformers import AutoModelForCausalLM, BloomConfig, CodeGenConfig, CTRLConfig, GPTNeoConfig, OPTConfig

from fasc.errors import CorpusError
from fasc.statistics.collect import collect_moments
from fasc.text.corpus import TextRequest, load_corpus
from fasc.text.limits import require_length, require_tokens, warn_of_length
from tests.conftest import CONFIGS, PARALLEL, VOCABULARY, tiny_model
from tests.statistics.needs import INPUTS

_SIZES = {"vocab_size": VOCABULARY, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2}
TABLES = {
    "opt": OPTConfig(**_SIZES, hidden_size=32, ffn_dim=48, num_hidden_layers=2, num_attention_heads=4, max_position_embeddings=40, word_embed_proj_dim=32),
    "gpt_neo": GPTNeoConfig(**_SIZES, hidden_size=32, num_layers=2, num_heads=4, max_position_embeddings=40, attention_types=[[["global", "local"], 1]]),
    "codegen": CodeGenConfig(**_SIZES, n_embd=32, n_layer=2, n_head=4, n_positions=40, rotary_dim=4),
    "ctrl": CTRLConfig(vocab_size=VOCABULARY, n_embd=32, dff=48, n_layer=2, n_head=4, n_positions=40),
    "bloom": BloomConfig(**_SIZES, hidden_size=32, n_layer=2, n_head=4),
}  # fmt: skip


def built(name):
    return AutoModelForCausalLM.from_config(TABLES[name]).eval() if name in TABLES else tiny_model(name)


@pytest.mark.parametrize("name", [*CONFIGS, *PARALLEL, *TABLES])
def test_a_length_is_refused_exactly_where_the_model_fails(name):
    model = built(name)
    limit = 40 if name in TABLES else 128
    require_length(model, limit)
    with torch.no_grad():
        model(input_ids=torch.zeros(1, limit, dtype=torch.long))
    too_long = torch.zeros(1, limit + 1, dtype=torch.long)
    try:
        with torch.no_grad():
            model(input_ids=too_long)
        runs = True
    except (IndexError, RuntimeError):
        runs = False
    if runs:
        require_length(model, limit + 1)
    else:
        with pytest.raises(CorpusError, match=f"sequences of {limit + 1} tokens are longer than the {limit} positions"):
            require_length(model, limit + 1)


def test_a_length_beyond_what_rotary_positions_were_trained_on_is_a_warning(capsys):
    for name, length in (("llama", 128), ("gpt2", 129)):
        warn_of_length(tiny_model(name), length)
    assert not capsys.readouterr().err
    warn_of_length(tiny_model(), 129)
    assert "sequences of 129 tokens are longer than LlamaForCausalLM was made for (128)" in capsys.readouterr().err


def test_a_token_without_embedding_is_named_before_the_pass(tokenizer, text_file):
    model = tiny_model()
    model.resize_token_embeddings(100)
    request = TextRequest(corpus=str(text_file), sequences=4, sequence_length=16, seed=0, role="calibration")
    load_corpus(model, tokenizer, request)
    text_file.write_text("plain ~ text " * 50)
    identity = tokenizer("~")["input_ids"][0]
    model.resize_token_embeddings(identity)
    with pytest.raises(
        CorpusError, match=f"token `~` has id {identity}, and LlamaForCausalLM has embeddings for ids 0 to {identity - 1}"
    ):
        load_corpus(model, tokenizer, request)


def test_ids_are_checked_without_a_tokenizer_too(model):
    require_tokens(model, torch.tensor([[0, VOCABULARY - 1]]))
    require_tokens(model, torch.empty(0, dtype=torch.long))
    for bad in (VOCABULARY, -1):
        with pytest.raises(CorpusError, match=f"token has id {bad},"):
            require_tokens(model, torch.tensor([[0, bad]]))


def test_the_length_is_checked_before_the_text_is_read(tokenizer):
    request = TextRequest(corpus="no/such/file.txt", sequences=4, sequence_length=129, seed=0, role="calibration")
    with pytest.raises(CorpusError, match="longer than the 128 positions"):
        load_corpus(tiny_model("gpt2"), tokenizer, request)


def test_moments_are_measured_on_what_the_model_can_read():
    model = tiny_model("gpt2")
    with pytest.raises(CorpusError, match=f"token has id {VOCABULARY}"):
        collect_moments(model, torch.full((2, 8), VOCABULARY), INPUTS)
    with pytest.raises(CorpusError, match="longer than the 128 positions"):
        collect_moments(model, torch.full((2, 129), 5), INPUTS)
