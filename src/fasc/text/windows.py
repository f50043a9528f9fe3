"""Tokens of a text that is longer than one wants to tokenise at once.

A tokenizer keeps some hundred bytes for every token until it returns. A long text is therefore encoded in windows that overlap,
and two of them are joined where they agree: the tokens are those of one call for the whole text.
"""

from collections.abc import Iterable, Iterator
from itertools import islice

from transformers import PreTrainedTokenizerBase

WINDOW = 8192
"""Characters of a window."""

_TOGETHER = 4
"""Windows that are encoded side by side."""

_OVERLAP = 512
"""Characters that a window shares with the next."""

_AGREEMENT = 4
"""Tokens on each side of a seam that both windows must have."""

Tokens = tuple[list[int], list[int]]
"""Ids, and the characters at which they start."""


def encode_long(tokenizer: PreTrainedTokenizerBase, parts: Iterable[str]) -> Iterator[list[int]]:
    """Tokens of one text, window by window, without special tokens.

    A tokenizer that does not say where its tokens start (one without a ``tokenizer.json``) is given whole lines instead, and may
    begin each window as it begins a text.

    Args:
        tokenizer: the model's own.
        parts: the text, in parts of any size.
    """
    if not tokenizer.is_fast:
        for window in _cut(parts, overlap=0):
            yield tokenizer(window, add_special_tokens=False, verbose=False)["input_ids"]
        return
    pending: Tokens | None = None
    for after in _encoded(tokenizer, _cut(parts, overlap=_OVERLAP)):
        begin = 0
        if pending is not None:
            before = pending[0], [start - (WINDOW - _OVERLAP) for start in pending[1]]
            end, begin = _seam(before, after)
            yield before[0][:end]
        pending = after[0][begin:], after[1][begin:]
    if pending is not None:
        yield pending[0]


def _encoded(tokenizer: PreTrainedTokenizerBase, windows: Iterator[str]) -> Iterator[Tokens]:
    while group := list(islice(windows, _TOGETHER)):
        encoded = tokenizer(group, add_special_tokens=False, verbose=False, return_offsets_mapping=True)
        for ids, offsets in zip(encoded["input_ids"], encoded["offset_mapping"], strict=True):
            yield ids, [start for start, _ in offsets]


def _cut(parts: Iterable[str], overlap: int) -> Iterator[str]:
    """Windows of a text; the last one may be shorter. Without an overlap they end at line breaks or spaces where they can."""
    text = ""
    for part in parts:
        text += part
        while len(text) > WINDOW:
            end = WINDOW if overlap else max(text.rfind("\n", 0, WINDOW) + 1, 0) or text.rfind(" ", 1, WINDOW)
            end = end if end > 0 else WINDOW
            yield text[:end]
            text = text[end - overlap :]
    yield text


def _seam(before: Tokens, after: Tokens) -> tuple[int, int]:
    """Where to leave one window and enter the next: counts of tokens of each that lie before the seam.

    Between tokens that both windows have at the same place, as near to the middle of the overlap as there are such.

    Args:
        before: tokens of the first window, their starts counted from the beginning of the second; negative before that.
        after: tokens of the second window.
    """
    middle = _OVERLAP // 2
    left, right = list(zip(*before, strict=True)), list(zip(*after, strict=True))
    at = {token: index for index, token in enumerate(right) if token[1] < _OVERLAP}
    shared = (index for index, token in enumerate(left) if token in at)
    for end in sorted(shared, key=lambda index: abs(before[1][index] - middle)):
        begin = at[left[end]]
        around = left[max(0, end - _AGREEMENT) : end + _AGREEMENT]
        whole = before[1][end] > before[1][end - 1]  # several tokens may be the bytes of one character
        if whole and len(around) == 2 * _AGREEMENT and around == right[max(0, begin - _AGREEMENT) : begin + _AGREEMENT]:
            return end, begin
    return _reaching(before[1], middle), _reaching(after[1], middle)


def _reaching(starts: list[int], place: int) -> int:
    """Index of the first token that starts at a place or after it."""
    return next((index for index, start in enumerate(starts) if start >= place), len(starts))
