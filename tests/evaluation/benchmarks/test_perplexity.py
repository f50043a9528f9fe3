"""Perplexity is the exponential of the mean loss, whatever the batch."""

import math

import pytest
import torch

from fasc.errors import NonFiniteError
from fasc.evaluation.evaluate import evaluate
from fasc.evaluation.text import evaluation_texts
from tests.conftest import tiny_model


def nll_by_hand(model, tokens):
    with torch.no_grad():
        logits = model(input_ids=tokens).logits.double()
    return torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten()).item()


def test_perplexity_is_exp_of_the_mean_loss_whatever_the_batch(tokenizer, config):
    model = tiny_model()
    scores = [evaluate(model, tokenizer, config("perplexity", batch_tokens=b))[0] for b in (16, 64, 4096)]
    block = evaluation_texts(model, tokenizer, config("perplexity"))[0]
    assert scores[0].value == pytest.approx(math.exp(nll_by_hand(model, block.tokens)), rel=1e-5)
    assert scores[0].value == pytest.approx(scores[2].value, rel=1e-6)
    assert scores[0].n == 12 * 15
    assert scores[0].low < scores[0].value < scores[0].high
    assert "context 16, stride 16" in scores[0].protocol


def test_one_window_has_a_perplexity_but_no_interval_and_that_is_said(tokenizer, config, capsys):
    score = evaluate(tiny_model(), tokenizer, config("perplexity", limit=1))[0]
    assert score.value > 1
    assert (score.low, score.high) == (None, None)
    assert "one window of text" in capsys.readouterr().err


@pytest.mark.parametrize(("scale", "high"), [(20, "a number"), (150, None)])
def test_a_perplexity_that_no_number_can_hold_is_no_bound_and_no_score(tokenizer, config, scale, high):
    """Logits are finite, and a few hundred apart."""
    model = tiny_model()
    model.lm_head.register_forward_hook(lambda *call: call[-1] * scale)
    if high is None:
        with pytest.raises(NonFiniteError, match=r"the perplexity on `.*text.txt`"):
            evaluate(model, tokenizer, config("perplexity"))
    else:
        assert 1e6 < evaluate(model, tokenizer, config("perplexity"))[0].high < math.inf
