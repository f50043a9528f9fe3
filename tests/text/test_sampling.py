"""Text sampled from the model is the model's own."""

import torch
from transformers import GenerationConfig

from fasc.text.corpus import TextRequest, load_corpus
from tests.conftest import tiny_model
from tests.text.load import load


def test_text_sampled_from_the_model_follows_the_seed_and_leaves_the_random_state(tokenizer):
    model = tiny_model()
    torch.manual_seed(5)
    state = torch.get_rng_state()
    block = load_corpus(model, tokenizer, TextRequest(corpus="self", sequences=5, sequence_length=12, seed=0, role="calibration"))
    assert torch.equal(torch.get_rng_state(), state)
    assert block.tokens.shape == (5, 12)
    assert (block.tokens[:, 0] == tokenizer.bos_token_id).all()
    assert torch.equal(block.tokens, load(tokenizer, "self", sequences=5, sequence_length=12).tokens)
    assert not torch.equal(block.tokens, load(tokenizer, "self", sequences=5, sequence_length=12, seed=1).tokens)


def test_sampled_text_has_the_models_own_distribution(tokenizer):
    """One step from the first token: frequencies are the softmax of its logits, special tokens included."""
    model = tiny_model()
    tokens = load_corpus(
        model, tokenizer, TextRequest(corpus="self", sequences=4000, sequence_length=2, seed=0, role="calibration")
    ).tokens
    with torch.no_grad():
        expected = model(input_ids=torch.tensor([[0]])).logits[0, -1].softmax(-1)
    frequencies = torch.bincount(tokens[:, 1], minlength=expected.shape[0]) / 4000
    assert (frequencies - expected).abs().max() < 0.03


def test_sampled_text_is_at_temperature_one_whatever_the_models_own_settings_are(tokenizer):
    model = tiny_model()
    request = TextRequest(corpus="self", sequences=5, sequence_length=12, seed=0, role="calibration")
    plain = load_corpus(model, tokenizer, request)
    model.generation_config = GenerationConfig(
        do_sample=True,
        temperature=0.1,
        top_k=2,
        top_p=0.5,
        min_p=0.5,
        repetition_penalty=2.0,
        num_beams=2,
        eos_token_id=[1, 2, 3],
    )
    assert torch.equal(load_corpus(model, tokenizer, request).tokens, plain.tokens)
