"""Sequences of tokens and where they came from; the end product of this folder."""

from dataclasses import dataclass
from pathlib import Path
from typing import Self

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, int64

from fasc.errors import CorpusError
from fasc.provenance import digest
from fasc.storage import new_file, storage_error


@dataclass(frozen=True, slots=True)
class TokenBlock:
    """Sequences of tokens and where they came from."""

    tokens: Tensor
    """int64 [sequences, sequence_length], without padding."""

    corpus: str
    """Name or path as it was asked for."""

    text_digest: str
    """SHA-256 of the text that was read, the same whichever sequences were drawn from it."""

    characters: int = 0
    """Of text that were read; 0 for text sampled from the model."""

    whole: bool = True
    """Whether that was all of the corpus."""

    @property
    def token_digest(self) -> str:
        """SHA-256 of the very tokens used."""
        return digest([self.tokens.numpy().tobytes()])

    def save(self, file: Path) -> None:
        """Write it to a safetensors file, whole or not at all.

        Raises:
            StorageError: it cannot be written.
        """
        facts = {"corpus": self.corpus, "text_digest": self.text_digest}
        facts |= {"characters": str(self.characters), "whole": str(self.whole)}
        with new_file(file) as scratch:
            try:
                save_file({"tokens": self.tokens.contiguous()}, scratch, facts)
            except SafetensorError as problem:
                raise storage_error(problem, file) from problem

    @classmethod
    def load(cls, file: Path) -> Self:
        """Read what ``save`` wrote.

        Raises:
            CorpusError: missing or damaged.
        """
        try:
            with safe_open(file, framework="pt") as stored:
                facts, tokens = stored.metadata() or {}, stored.get_tensor("tokens")
            read = facts["corpus"], facts["text_digest"], int(facts["characters"])
        except (OSError, SafetensorError, KeyError, ValueError) as problem:
            raise CorpusError(
                f"`{file}` holds no text of ours: {problem}", "remove it and run the same command again"
            ) from problem
        if tokens.dtype != int64 or tokens.dim() != 2 or not tokens.numel():
            raise CorpusError(f"`{file}` is damaged: its tokens are {tokens.dtype} {list(tokens.shape)}", "remove it")
        return cls(tokens, *read, whole=facts.get("whole") == "True")
