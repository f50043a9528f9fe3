"""Choices are scored as one sequence each would be, however they are batched, shared and cached."""

import pytest
import torch

from fasc.errors import CorpusError
from fasc.evaluation import Subject
from fasc.evaluation.choices import ChoiceItem, score_choices, score_continuations, split_tokens
from tests.conftest import tiny_model

SHOTS = "Question: what is one and one? Answer: two. Question: what is two and two? Answer: four. "


def slow(model, tokenizer, context, continuation):
    """One sequence, one forward pass."""
    before, after = split_tokens(tokenizer, context, continuation)
    with torch.no_grad():
        logp = model(input_ids=torch.tensor([[*before, *after]])).logits.log_softmax(-1)[0]
    steps = [logp[len(before) - 1 + i] for i in range(len(after))]
    return sum(float(one[token]) for one, token in zip(steps, after, strict=True)), all(
        int(one.argmax()) == token for one, token in zip(steps, after, strict=True)
    )


@pytest.mark.parametrize("batch_tokens", [1, 100, 10_000])
def test_shared_headers_caches_and_batches_change_no_score(tokenizer, architecture, batch_tokens):
    model = tiny_model(architecture)
    contexts = [(SHOTS + f"Question: {'x' * (i % 4)}? Answer:", "shots") for i in range(9)]
    contexts += [(f"{'y' * (i % 3)} is", "plain") for i in range(6)] + [("", "sentence")]
    pairs = [((context, end), group) for context, group in contexts for end in (" A", " two words", " a longer end", "x")]
    found = score_continuations(
        Subject(model, tokenizer, None), [p for p, _ in pairs], [g for _, g in pairs], "test", batch_tokens
    )
    for (pair, _), one in zip(pairs, found, strict=True):
        expected, greedy = slow(model, tokenizer, *pair)
        assert one.log_probability == pytest.approx(expected, abs=2e-3)
        assert one.greedy == greedy


def test_single_tokens_are_read_off_one_pass_of_padded_contexts(tokenizer):
    model = tiny_model()
    pairs = [(SHOTS + "z" * i, letter) for i in range(1, 8) for letter in "ABCD"]
    found = score_continuations(Subject(model, tokenizer, None), pairs, ["one"] * len(pairs), "test", 10_000)
    for pair, one in zip(pairs, found, strict=True):
        assert one.log_probability == pytest.approx(slow(model, tokenizer, *pair)[0], abs=2e-3)


def test_a_space_belongs_to_the_word_behind_it(tokenizer):
    assert split_tokens(tokenizer, "a ", "b") == split_tokens(tokenizer, "a", " b")


def test_a_continuation_without_tokens_is_refused(tokenizer):
    with pytest.raises(CorpusError, match="has no tokens"):
        score_continuations(Subject(tiny_model(), tokenizer, None), [("a", "")], ["g"], "test", 64)


def test_accuracy_per_character_forgives_length(tokenizer, config):
    items = [ChoiceItem.of("a", [" x", " x" * 9], 1, "g") for _ in range(30)]
    scores = score_choices("test", Subject(tiny_model(), tokenizer, None), items, config("facts"), "p", per_character=True)
    assert [one.metric for one in scores] == ["accuracy", "accuracy per character", "accuracy/task=g"]
    assert scores[0].value == 0.0  # nine words are less probable than one
