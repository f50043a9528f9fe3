"""Data sets of the Hugging Face hub, streamed: nothing is downloaded that is not read, and no code of theirs runs."""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from itertools import islice
from typing import Any

from fasc.errors import CorpusError, FascError, UsageError
from fasc.provenance import digest
from fasc.text.documents import Document, document_of
from fasc.text.roles import Role, half

_ID = re.compile(r"[\w.-]+/[\w.-]+(:[^:/\s]+){0,2}")

_HELD_OUT = ("test", "validation", "valid", "dev")
"""Splits that evaluate, the first one that there is."""


def is_hub_id(corpus: str) -> bool:
    """Whether a name has the form ``owner/name``, perhaps with ``:config``, ``:split`` or both."""
    return _ID.fullmatch(corpus) is not None


@dataclass(frozen=True)
class HubSet:
    """A data set by its id, perhaps with a part: ``owner/name``, ``owner/name:config``, ``…:split``, ``…:config:split``.

    Without a split, ``train`` calibrates, and ``test`` or ``validation`` evaluates; where there is only one split, its documents
    take turns. A split that is named is read as it is.
    """

    corpus: str
    role: Role

    @property
    def id(self) -> str:
        """``owner/name``."""
        return self.corpus.partition(":")[0]

    @cached_property
    def place(self) -> tuple[str | None, str, bool]:
        """Configuration, split, and whether both roles share the split's documents.

        Raises:
            CorpusError: the hub cannot be asked, or there is no such data set.
            UsageError: it has several configurations and none is named.
        """
        from datasets import get_dataset_config_names, get_dataset_split_names  # noqa: PLC0415 - slow to import

        _, *parts = self.corpus.split(":")
        if len(parts) == 2:
            return parts[0], parts[1], False
        with asking(self.id):
            _info(self.id)
            configs = get_dataset_config_names(self.id)
            if parts and parts[0] in configs:
                config, parts = parts[0], []
            elif len(configs) == 1 or "default" in configs:
                config = configs[0] if len(configs) == 1 else "default"
            else:
                raise UsageError(
                    f"`{self.id}` has {len(configs)} configurations: {', '.join(configs[:8])}{', …' if len(configs) > 8 else ''}",
                    f"name one: `{self.id}:{configs[0]}`",
                )
            splits = parts or get_dataset_split_names(self.id, config)
        first = "train" if "train" in splits else splits[0]
        second = next((split for split in _HELD_OUT if split in splits and split != first), first)
        return config, first if self.role == "calibration" else second, not parts and first == second

    def documents(self) -> Iterator[Document]:
        """One for each row.

        Raises:
            CorpusError: the hub cannot be asked, there is no such data set, or a row has no text.
        """
        config, split, shared = self.place
        documents = (
            document_of(row, f"`{self.id}` row {number}") for number, row in enumerate(rows(self.id, config, split), start=1)
        )
        yield from half(documents, self.role) if shared else documents

    def key(self) -> str:
        """Digest of the id and, if the hub can be asked, of its revision."""
        return digest([f"{self.corpus} {self.role} {revision(self.id)}".encode()])


def rows(name: str, config: str | None, split: str, limit: int | None = None) -> Iterator[dict[str, Any]]:
    """Rows of a split, as they are downloaded.

    Raises:
        CorpusError: the hub cannot be asked, or there is no such data set.
    """
    from datasets import load_dataset  # noqa: PLC0415 - slow to import

    with asking(name):
        yield from islice(load_dataset(name, config, split=split, streaming=True), limit)


def revision(name: str) -> str:
    """The data set's commit on the hub, or nothing if the hub does not say."""
    try:
        with asking(name):
            return str(_info(name).sha)
    except CorpusError:
        return ""


def _info(name: str) -> Any:
    """One request without retries: ``datasets`` needs half a minute to say that there is no such data set or no network."""
    from huggingface_hub import HfApi  # noqa: PLC0415 - slow to import

    return HfApi().dataset_info(name, timeout=10)


@contextmanager
def asking(name: str) -> Iterator[None]:
    """Say in one line why the hub does not answer.

    Raises:
        CorpusError: for anything that the libraries of the hub raise.
    """
    try:
        yield
    except FascError:
        raise
    except Exception as problem:  # of whichever HTTP library, file system and parser they use
        first = (str(problem).splitlines() or [type(problem).__name__])[0]
        raise CorpusError(
            f"cannot load `{name}` from the hub: {first[:200]}",
            "check the id and the network; or give --data-dir (or FASC_DATA), a text file, or --corpus self",
        ) from problem
