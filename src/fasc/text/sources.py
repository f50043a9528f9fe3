"""A corpus by what it is called: a path, a name, or a data set of the hub."""

from collections.abc import Iterator
from pathlib import Path
from typing import Protocol

from fasc.errors import CorpusError, UnknownNameError
from fasc.provenance import digest
from fasc.text.documents import Document
from fasc.text.folder import SUFFIXES, TextFile, TextFolder
from fasc.text.hub import HubSet, is_hub_id
from fasc.text.named import NAMED, NamedText, data_folder
from fasc.text.roles import Role
from fasc.text.statements import STATEMENTS, Statements

SELF = "self"
"""The corpus that is sampled from the model."""


class Source(Protocol):
    """Where documents come from."""

    def documents(self) -> Iterator[Document]:
        """In a fixed order, one after the other."""

    def key(self) -> str:
        """Digest of the content, or of what stands for it."""


def names_of(corpus: str) -> list[str]:
    """The corpora that a value of ``--corpus`` names: one path, or names and paths separated by commas."""
    return [corpus] if _exists(Path(corpus)) else [name.strip() for name in corpus.split(",") if name.strip()]


def find_source(corpus: str, role: Role, data_dir: Path | None) -> Source:
    """The source of one corpus: a path that exists, else a name, else a path in the data folder, else an id of the hub.

    Raises:
        UnknownNameError: none of these.
        CorpusError: a path or a data folder that does not exist.
    """
    path = Path(corpus).expanduser()
    folder = data_folder(data_dir)
    if not _exists(path):
        if corpus in NAMED:
            return NamedText(corpus, role, folder)
        if corpus in STATEMENTS:
            return Statements(corpus, role, folder)
        path = path if folder is None else folder / path
    if _exists(path):
        return TextFolder(path) if path.is_dir() else TextFile(path)
    if is_hub_id(corpus) and not corpus.lower().removesuffix(".gz").endswith(SUFFIXES):
        return HubSet(corpus, role)
    if corpus.lower().removesuffix(".gz").endswith(SUFFIXES):
        raise CorpusError(f"`{corpus}` does not exist", "check the path; a relative one starts here or in --data-dir")
    known = [SELF, *NAMED, *STATEMENTS]
    raise UnknownNameError("corpus", corpus, known, or_else=", the path of a text file or folder, or an `owner/name` of the hub")


def text_key(corpus: str, role: Role, data_dir: Path | None = None, *, sampled_by: str = "") -> str:
    """What a corpus holds, as a digest: of the content of files, never of their paths.

    Two calls that read the same text have the same key. A file that has changed has another. Of a data set on the hub it is the
    revision that counts, where the hub can be asked.

    Args:
        corpus: as in ``--corpus``; several are separated by commas.
        role: which part of a named corpus.
        data_dir: folder of the named corpora.
        sampled_by: what stands for text that is sampled from the model: its fingerprint and the seed.

    Raises:
        UnknownNameError: not a corpus, a path, or an id of the hub.
        CorpusError: a file that cannot be read.
    """
    names = names_of(corpus)
    return digest(
        f"{SELF} {sampled_by}\n".encode() if name == SELF else f"{find_source(name, role, data_dir).key()}\n".encode()
        for name in names
    )


def _exists(path: Path) -> bool:
    try:
        return path != Path() and path.exists()
    except OSError:  # a name that no file can have
        return False
