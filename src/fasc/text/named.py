"""The corpora that have a name, in a data folder or on the hub."""

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from fasc.errors import CorpusError
from fasc.provenance import digest
from fasc.text.documents import Chat, Document, Piece, document_of
from fasc.text.folder import TextFile
from fasc.text.hub import revision, rows
from fasc.text.roles import Role, half

_HUB_ROWS = 20_000
"""Rows that are streamed from the hub at most: more than any calibration here needs."""


@dataclass(frozen=True, slots=True)
class NamedCorpus:
    """Where a named corpus lies in a data folder and on the hub."""

    files: dict[Role, str]
    """Path in the data folder; the same path for both roles means alternate documents."""

    hub: tuple[str, str | None]
    """Data set id and configuration."""

    splits: dict[Role, str]
    """Split on the hub; the same for both roles means alternate documents."""

    rows_are_lines: bool = False
    """Whether the hub's rows are the lines of one text, to be joined again, and not documents."""


NAMED = {
    "wikitext2": NamedCorpus(
        files={"calibration": "wikitext2/wiki.valid.raw.txt", "evaluation": "wikitext2/wiki.test.raw.txt"},
        hub=("Salesforce/wikitext", "wikitext-2-raw-v1"),
        splits={"calibration": "train", "evaluation": "test"},
        rows_are_lines=True,
    ),
    "c4": NamedCorpus(
        files=dict.fromkeys(("calibration", "evaluation"), "c4/c4_docs.jsonl.gz"),
        hub=("allenai/c4", "en"),
        splits={"calibration": "train", "evaluation": "validation"},
    ),
    "alpaca": NamedCorpus(
        files=dict.fromkeys(("calibration", "evaluation"), "alpaca/alpaca_subset.jsonl.gz"),
        hub=("tatsu-lab/alpaca", None),
        splits=dict.fromkeys(("calibration", "evaluation"), "train"),
    ),
}


def data_folder(given: Path | None) -> Path | None:
    """The folder of the named corpora: the option, else ``FASC_DATA``, else none (the hub).

    Raises:
        CorpusError: the folder does not exist.
    """
    folder = given or (Path(os.environ["FASC_DATA"]) if os.environ.get("FASC_DATA") else None)
    folder = None if folder is None else folder.expanduser()
    if folder is not None and not folder.is_dir():
        raise CorpusError(f"data folder `{folder}` does not exist", "check --data-dir or FASC_DATA")
    return folder


@dataclass(frozen=True, slots=True)
class NamedText:
    """The part of a named corpus that has one role. Chats in it are plain text, as in the papers that use it."""

    name: str
    role: Role
    folder: Path | None
    """The data folder; the hub is asked without one."""

    def documents(self) -> Iterator[Document]:
        """Documents of plain text.

        Raises:
            CorpusError: the data folder lacks it, or the hub cannot be asked.
        """
        source = NAMED[self.name]
        places = source.splits if self.folder is None else source.files
        documents = self._from_hub(source) if self.folder is None else TextFile(self._file(self.folder)).documents()
        plain = (Piece(one.plain, one.where) if isinstance(one, Chat) else one for one in documents)
        yield from half(plain, self.role) if len(set(places.values())) == 1 else plain

    def key(self) -> str:
        """Digest of the content in a data folder; of the revision on the hub."""
        content = revision(NAMED[self.name].hub[0]) if self.folder is None else TextFile(self._file(self.folder)).key()
        return digest([f"{self.name} {self.role} {content}".encode()])

    def _from_hub(self, source: NamedCorpus) -> Iterator[Document]:
        found = rows(*source.hub, source.splits[self.role], _HUB_ROWS)
        documents = (document_of(row, f"`{source.hub[0]}` row {number}") for number, row in enumerate(found, start=1))
        if not source.rows_are_lines:
            yield from documents
            return
        for document in documents:
            if isinstance(document, Piece):
                yield Piece(document.text, document.where, last=False)
        yield Piece("", f"`{source.hub[0]}`")

    def _file(self, folder: Path) -> Path:
        file = folder / NAMED[self.name].files[self.role]
        if not file.is_file():
            raise CorpusError(
                f"data folder `{folder}` has no {NAMED[self.name].files[self.role]}",
                f"without --data-dir and FASC_DATA, `{self.name}` is taken from the hub",
            )
        return file
