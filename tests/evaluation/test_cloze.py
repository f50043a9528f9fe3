"""The best candidate is found exactly, without scoring every candidate."""

import pytest
import torch

from fasc.errors import CorpusError
from fasc.evaluation import Subject
from fasc.evaluation.cloze import ClozeItem, best_candidates, candidate_tokens, searched
from tests.conftest import tiny_model


def slow_choice(model, tokenizer, item):
    scores = slow_scores(model, tokenizer, item)
    return max(range(len(scores)), key=scores.__getitem__)


def slow_scores(model, tokenizer, item):
    """Score every candidate in full, one at a time."""
    prompt = tokenizer(item.prompt)["input_ids"]
    scores = []
    for tokens in candidate_tokens(tokenizer, item.candidates):
        ids = torch.tensor([[*prompt, *tokens]])
        with torch.no_grad():
            logp = model(input_ids=ids).logits.log_softmax(-1)[0]
        scores.append(sum(float(logp[len(prompt) - 1 + i, token]) for i, token in enumerate(tokens)))
    return scores


@pytest.mark.parametrize("batch_tokens", [1, 64, 10_000])
def test_the_best_candidate_is_found_exactly_with_shared_prefixes_and_prefix_candidates(tokenizer, architecture, batch_tokens):
    model = tiny_model(architecture)
    words = ("New", "New York", "Newark", "Nice", "Rome", "Romeo", "Paris", "Parma", "Pa")
    items = [ClozeItem(f"prompt {i} {chr(97 + i) * (i % 5)}", words, 0, "r", "t") for i in range(25)]
    choices = best_candidates(Subject(model, tokenizer, None), items, "test", batch_tokens=batch_tokens)
    assert choices == [slow_choice(model, tokenizer, item) for item in items]
    assert len(set(choices)) > 1 or architecture != "llama"  # elsewhere one word wins everywhere


def test_the_right_answers_probability_is_exact_whether_or_not_it_wins(tokenizer):
    model = tiny_model(seed=3)
    words = ("New York City", "Newark", "Paris", "Parma")
    items = [ClozeItem(f"prompt {i}", words, i % 4, "r", "t") for i in range(12)]
    found = searched(Subject(model, tokenizer, None), items, "test", batch_tokens=64)
    for item, (choice, score) in zip(items, found, strict=True):
        scores = slow_scores(model, tokenizer, item)
        assert score == pytest.approx(scores[item.answer], abs=1e-4)
        assert (choice == item.answer) == (scores[item.answer] == max(scores))


def test_an_item_with_several_right_answers_takes_the_most_probable_of_them(tokenizer):
    model = tiny_model()
    item = ClozeItem("prompt", ("one", "two", "three"), 0, "r", "t", others=(1, 2))
    ((choice, score),) = searched(Subject(model, tokenizer, None), [item], "test", batch_tokens=64)
    assert choice in item.right
    assert score == pytest.approx(max(slow_scores(model, tokenizer, item)), abs=1e-4)


def test_an_answer_that_is_a_whole_text_is_refused_before_the_model_is_run(tokenizer):
    item = ClozeItem("prompt", ("one", "word " * 1000), 0, "r", "t")
    with pytest.raises(CorpusError, match=r"`test`: the answer `word word .*…` has [45],\d+ tokens") as refused:
        searched(Subject(None, tokenizer, None), [item], "test", batch_tokens=64)
    assert "256 at most" in refused.value.hint
