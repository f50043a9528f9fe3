"""Documents → one stream of tokens, as far as it is asked for."""

import hashlib
import time
from array import array
from collections.abc import Iterator
from contextlib import ExitStack

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from fasc.errors import CorpusError
from fasc.progress import Advance, progress
from fasc.text.documents import Piece
from fasc.text.windows import WINDOW, encode_long

STAGE = 8_000_000
"""Characters of a corpus that a draw reads; as many again where it needs more sequences than those hold."""

_TOGETHER = 32_768
"""Characters of short documents that are encoded side by side."""

_QUIET = 1.0
"""Seconds of reading without a word."""


class TokenStream:
    """Tokens of documents one after the other, each followed by the end-of-text token where there are several.

    Takes four bytes for a token. ``documents`` and ``characters`` were read so far; ``whole`` is true when there are no more.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, documents: Iterator[Piece]) -> None:
        self._tokenizer = tokenizer
        self._pieces = self._heard(documents)
        self._encoded = self._encode()
        self._ids = array("i")
        self._state = hashlib.sha256()
        self._blank = True
        self._first = True
        self._due: list[int] = []
        self.characters = 0
        self.documents = 0
        self.whole = False

    @property
    def digest(self) -> str:
        """SHA-256 of the text that was read."""
        return self._state.hexdigest()

    @property
    def blank(self) -> bool:
        """Whether there was nothing but space so far."""
        return self._blank

    def __len__(self) -> int:
        """Tokens so far."""
        return len(self._ids)

    def tokens(self) -> Tensor:
        """Int32, those so far."""
        return torch.frombuffer(self._ids, dtype=torch.int32) if self._ids else torch.empty(0, dtype=torch.int32)

    def read(self, characters: int | None = None) -> None:
        """Read on until so many characters were read since the beginning, or all.

        Raises:
            CorpusError: a document cannot be read or is no text.
        """
        started, before = time.monotonic(), self.characters
        with ExitStack() as stack:
            advance: Advance | None = None
            while characters is None or self.characters < characters:
                ids = next(self._encoded, None)
                if ids is None:
                    self.whole = True
                    return
                self._ids.extend(ids)
                if characters is not None and advance is None and time.monotonic() - started > _QUIET:
                    advance = stack.enter_context(progress("reading text", characters - before, "characters"))
                    advance(self.characters - before)
                    before = self.characters
                elif advance is not None:
                    advance(self.characters - before)
                    before = self.characters

    def _heard(self, documents: Iterator[Piece]) -> Iterator[Piece]:
        """The documents, counted and digested as they pass."""
        for piece in documents:
            try:
                self._state.update(piece.text.encode())
            except UnicodeEncodeError as problem:
                raise CorpusError(
                    f"{piece.where}: half of a character (\\u{ord(piece.text[problem.start]):04x}) without its other half",
                    "remove the lone surrogate, or write the file again as UTF-8 with errors='replace'",
                ) from problem
            self.characters += len(piece.text)
            self.documents += piece.last
            self._blank = self._blank and not piece.text.strip()
            yield piece

    def _encode(self) -> Iterator[list[int]]:
        """Tokens of the documents, of several short ones at a time."""
        short: list[Piece] = []
        length = 0
        for piece in self._pieces:
            complete = piece.last and len(piece.text) <= WINDOW
            if complete:
                short.append(piece)
                length += len(piece.text)
            if length >= _TOGETHER or not complete:
                yield self._joined(short)
                short, length = [], 0
            if not complete:
                yield self._taken()
                yield from encode_long(self._tokenizer, self._rest(piece))
                yield self._end(piece)
        yield self._joined(short)

    def _joined(self, pieces: list[Piece]) -> list[int]:
        """Tokens of short documents."""
        ids: list[int] = []
        texts = [piece.text for piece in pieces]
        encoded = self._tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"] if texts else []
        for piece, part in zip(pieces, encoded, strict=True):
            ids += self._taken() + part + self._end(piece)
        return ids

    def _taken(self) -> list[int]:
        """The end of the first document, now that there is a second."""
        due, self._due = self._due, []
        return due

    def _end(self, piece: Piece) -> list[int]:
        """The end-of-text token; that of the first document is due only if there is a second."""
        end = [] if piece.marked or self._tokenizer.eos_token_id is None else [self._tokenizer.eos_token_id]
        if self._first:
            self._first, self._due = False, end
            return []
        return end

    def _rest(self, piece: Piece) -> Iterator[str]:
        """The parts of one document."""
        yield piece.text
        while not piece.last:
            piece = next(self._pieces)
            yield piece.text
