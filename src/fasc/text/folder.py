"""Files and folders of files as a corpus."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from fasc.errors import CorpusError
from fasc.progress import say
from fasc.provenance import digest, file_digest
from fasc.text.documents import Document, Piece, document_of
from fasc.text.files import text_chunks
from fasc.text.records import Records, json_lines, json_values, parquet_rows, table_rows

READERS: Mapping[str, Callable[[Path], Records]] = {
    ".jsonl": json_lines,
    ".json": json_values,
    ".csv": partial(table_rows, delimiter=","),
    ".tsv": partial(table_rows, delimiter="\t"),
    ".parquet": parquet_rows,
}
"""By suffix, how the records of a file are read; all of them but Parquet may also be compressed as ``.gz``."""

SUFFIXES = (".txt", *READERS)

_PLAIN = (".txt", ".text", ".md", ".rst", ".log", "")
"""Suffixes of single files that are read as text, one document each."""


@dataclass(frozen=True, slots=True)
class TextFile:
    """One file."""

    path: Path

    def documents(self) -> Iterator[Document]:
        """The whole of a text file, in pieces; each record of another.

        Raises:
            CorpusError: it cannot be read, or a record has no text; names the line.
        """
        suffix = _suffix(self.path)
        if suffix in READERS:
            unit = "row" if suffix == ".parquet" else "line"
            for number, row in READERS[suffix](self.path):
                yield document_of(row, f"`{self.path}` {unit} {number}")
        elif suffix in _PLAIN:
            yield from _pieces(self.path)
        else:
            raise CorpusError(
                f"`{self.path}`: `{suffix}` is no kind of file that fasc reads",
                f"it reads {', '.join(SUFFIXES)}, also as .gz; rename a file of plain text to .txt",
            )

    def key(self) -> str:
        """Digest of the content."""
        try:
            return file_digest(self.path)
        except OSError as problem:
            raise CorpusError(f"cannot read `{self.path}`: {problem}", "check the path and its permissions") from problem


@dataclass(frozen=True, slots=True)
class TextFolder:
    """Every file below a folder that fasc reads, by name."""

    path: Path

    def documents(self) -> Iterator[Document]:
        """Of the files in order; those that are left out are said.

        Raises:
            CorpusError: there is none, or one cannot be read.
        """
        for file in self._files(aloud=True):
            yield from TextFile(file).documents()

    def key(self) -> str:
        """Digest of the contents in order."""
        return digest(TextFile(file).key().encode() for file in self._files(aloud=False))

    def _files(self, *, aloud: bool) -> list[Path]:
        every = [file for file in sorted(self.path.rglob("*")) if file.is_file()]
        files = [file for file in every if _suffix(file) in SUFFIXES]
        others = [file.name for file in every if file not in set(files)]
        if not files:
            raise CorpusError(f"folder `{self.path}` holds no text", f"fasc reads {', '.join(SUFFIXES)}, also as .gz")
        if others and aloud:
            more = f" and {len(others) - 3} more" if len(others) > 3 else ""
            say(f"`{self.path}`: skipped {', '.join(others[:3])}{more}; read {len(files)} of {len(every)} files")
        return files


def _suffix(file: Path) -> str:
    """The suffix without ``.gz``, in small letters."""
    name = file.name.lower().removesuffix(".gz")
    return Path(name).suffix


def _pieces(file: Path) -> Iterator[Piece]:
    """The text of a file as one document."""
    before = ""
    for text in text_chunks(file):
        if before:
            yield Piece(before, f"`{file}`", last=False)
        before = text
    yield Piece(before, f"`{file}`")
