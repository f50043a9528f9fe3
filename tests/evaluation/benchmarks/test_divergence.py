"""KL, its tail and the agreement are those of the two models."""

import numpy as np
import pytest
import torch

from fasc.errors import UsageError
from fasc.evaluation import Subject, get_benchmark
from fasc.evaluation.evaluate import evaluate
from fasc.evaluation.text import evaluation_texts
from tests.conftest import tiny_model


def by_metric(scores):
    return {score.metric: score for score in scores}


def test_a_model_is_not_apart_from_itself(tokenizer, config):
    scores = by_metric(evaluate(tiny_model(seed=0), tokenizer, config("kl"), dense=tiny_model(seed=0)))
    for metric in ("kl", "kl/p95", "kl/p99"):
        assert scores[metric].value == pytest.approx(0, abs=1e-6)
    assert scores["top-1 agreement"].value == scores["top-1 agreement"].high == 1
    assert 0.9 < scores["top-1 agreement"].low < 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_mean_tail_and_agreement_are_right_whatever_the_batch(tokenizer, config, dtype):
    model, dense = tiny_model(seed=0, dtype=dtype), tiny_model(seed=1, dtype=dtype)
    with torch.no_grad():
        model.model.embed_tokens.weight.copy_(dense.model.embed_tokens.weight)  # some tokens agree
    tokens = evaluation_texts(dense, tokenizer, config("kl"))[0].tokens
    with torch.no_grad():
        p, q = (one(input_ids=tokens).logits.double().log_softmax(-1) for one in (dense, model))
    divergence = (p.exp() * (p - q)).sum(-1).numpy()
    expected = {
        "kl": divergence.mean(),
        "kl/p95": np.quantile(divergence, 0.95),
        "kl/p99": np.quantile(divergence, 0.99),
        "top-1 agreement": p.argmax(-1).eq(q.argmax(-1)).double().mean().item(),
    }
    for batch_tokens in (16, 4096) if dtype == torch.float32 else (4096,):
        scores = evaluate(model, tokenizer, config("kl", batch_tokens=batch_tokens), dense=dense)
        assert [score.metric for score in scores] == list(expected), "the mean is the headline"
        for score in scores:
            assert score.benchmark == "kl"
            assert score.value == pytest.approx(expected[score.metric], rel=1e-4)
            assert score.low is None or score.low <= score.value
            assert score.high is None or score.value <= score.high
            assert score.n == tokens.numel()
            assert "context 16, stride 16" in score.protocol
    assert 0 < expected["top-1 agreement"] < 1


def test_without_a_dense_model_it_is_refused(tokenizer, config):
    model = tiny_model()
    block = evaluation_texts(model, tokenizer, config("kl"))[0]
    with pytest.raises(UsageError, match="dense model"):
        get_benchmark("kl").measure(Subject(model, tokenizer, None, block), config("kl"))
