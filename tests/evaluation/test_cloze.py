"""The best candidate is found exactly, without scoring every candidate."""

import pytest
import torch

from fasc.evaluation import Subject, cloze
from fasc.evaluation.cloze import ClozeItem, best_candidates, candidate_tokens
from tests.conftest import tiny_model


def slow_choice(model, tokenizer, item):
    """Score every candidate in full, one at a time."""
    prompt = tokenizer(item.prompt)["input_ids"]
    scores = []
    for tokens in candidate_tokens(tokenizer, item.candidates):
        ids = torch.tensor([[*prompt, *tokens]])
        with torch.no_grad():
            logp = model(input_ids=ids).logits.log_softmax(-1)[0]
        scores.append(sum(float(logp[len(prompt) - 1 + i, token]) for i, token in enumerate(tokens)))
    return max(range(len(scores)), key=scores.__getitem__)


@pytest.mark.parametrize("together", [1, 7, 1_000])
def test_the_best_candidate_is_found_exactly_with_shared_prefixes_and_prefix_candidates(tokenizer, monkeypatch, together):
    monkeypatch.setattr(cloze, "_TOGETHER", together)
    model = tiny_model()
    words = ("New", "New York", "Newark", "Nice", "Rome", "Romeo", "Paris", "Parma", "Pa")
    items = [ClozeItem(f"prompt {i} {chr(97 + i) * (i % 5)}", words, 0, "r", "t") for i in range(25)]
    choices = best_candidates(Subject(model, tokenizer, None), items, "test", batch_tokens=64)
    assert choices == [slow_choice(model, tokenizer, item) for item in items]
    assert len(set(choices)) > 1
