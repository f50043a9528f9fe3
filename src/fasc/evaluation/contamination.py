"""Whether a benchmark's items stand in the text that a model was calibrated on."""

import re
from collections.abc import Mapping, Sequence

from fasc.evaluation.outcome import Outcome

LENGTH = 8
"""Words in a row that both must hold; of a shorter item all its words, if they are at least :data:`LEAST`."""

LEAST = 5
_WORD = re.compile(r"\w+")


def _words(text: str) -> list[str]:
    return [word.lower() for word in _WORD.findall(text)]


def _runs(words: Sequence[str], length: int) -> set[tuple[str, ...]]:
    return {tuple(words[start : start + length]) for start in range(len(words) - length + 1)}


def contamination(text: str, outcomes: Mapping[str, Sequence[Outcome]]) -> dict[str, dict[str, int]]:
    """How many items of each benchmark share a run of words with a text.

    Args:
        text: of the calibration.
        outcomes: items by benchmark; windows of text are left out, whose digests are compared instead.

    Returns:
        Benchmark ↦ ``items`` and ``found``.
    """
    words = _words(text)
    known: dict[int, set[tuple[str, ...]]] = {}
    counts: dict[str, dict[str, int]] = {}
    for benchmark, some in outcomes.items():
        if all(one.right is None for one in some):
            continue
        found = 0
        for one in some:
            asked = _words(one.item.partition(": ")[2] or one.item)
            length = min(LENGTH, len(asked))
            if length >= LEAST:
                if length not in known:
                    known[length] = _runs(words, length)
                found += not known[length].isdisjoint(_runs(asked, length))
        counts[benchmark] = {"items": len(some), "found": found}
    return counts
