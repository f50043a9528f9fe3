"""Items that stand in the calibration text are found, whatever their case and punctuation; others are not."""

import pytest

from fasc.evaluation.contamination import contamination
from fasc.evaluation.outcome import Outcome


def outcome(item, right=True):
    return Outcome(item, "r", "", "t", right, -1.0)


@pytest.mark.parametrize(
    ("item", "found"),
    [
        ("r: The capital of France is → Paris", 1),
        ("r: The capital of Spain is → Madrid", 0),
        ("r: of France", 0),
        ("r: who said that THE old house by the river, has nine rooms and a garden", 1),
        ("r: the old house by the sea has nine rooms and a garden", 0),
    ],
)
def test_a_run_of_words_is_what_counts(item, found):
    text = "It is known: the capital of France is Paris! The old house by the river has nine rooms."
    assert contamination(text, {"b": [outcome(item)]}) == {"b": {"items": 1, "found": found}}


def test_windows_of_text_are_no_items():
    assert contamination("any text", {"kl": [outcome("wikitext2, window 0", right=None)]}) == {}
