"""Facts as plain sentences, as they are or negated: the corpora of a counterfactual comparison (paper §3).

Both corpora of a pair hold the same facts in the same order, so what differs between them is the negation.
"""

import random
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

from fasc.errors import CorpusError
from fasc.provenance import digest
from fasc.text.documents import Piece
from fasc.text.records import json_lines
from fasc.text.roles import Role

LAMA_FILE = "lama/trex.jsonl.gz"
"""In the data folder: one fact a line, with relation, type, template, subject, object."""

STATEMENTS = ("facts", "negated-facts", "lama", "negated-lama")
"""Corpora made of facts, to compare subspaces on; a model calibrated on one must not be scored on the facts in it."""

LAMA_FIELDS = ("relation", "template", "subject", "object")

_NEGATIONS = (
    (" is ", " is not "),
    (" was ", " was not "),
    (" used to ", " never used to "),
    (" plays ", " does not play "),
    (" works ", " does not work "),
    (" has ", " does not have "),
    (" consists ", " does not consist "),
    (" maintains ", " does not maintain "),
    (" shares ", " does not share "),
    (" died ", " did not die "),
    (" are ", " are not "),
)
"""What makes a template of LAMA say the opposite: the first that applies."""


def shipped_relations() -> dict[str, dict[str, Any]]:
    """Relations of the facts shipped with fasc: ``type``, ``template``, ``negated`` and ``facts`` (subject ↦ answer)."""
    return tomllib.loads((files("fasc") / "data" / "facts.toml").read_text(encoding="utf-8"))


def shipped_statements(*, negated: bool) -> list[str]:
    """The shipped facts, one sentence each, in a fixed mixed order."""
    template = "negated" if negated else "template"
    statements = [
        f"{relation[template].replace('[X]', subject)} {answer}."
        for relation in shipped_relations().values()
        for subject, answer in relation["facts"].items()
    ]
    return _mixed(statements)


def lama_statements(folder: Path | None, *, negated: bool) -> list[str]:
    """LAMA's T-REx facts, one sentence each, in a fixed mixed order; relations that cannot be negated by a rule are left out.

    Args:
        folder: the data folder.
        negated: whether to say the opposite.

    Raises:
        CorpusError: there is no such file.
    """
    statements = []
    for row in lama_rows(lama_file(folder)):
        template = row["template"]
        opposite = negate(template)
        if opposite is not None:
            sentence = (opposite if negated else template).replace("[X]", row["subject"]).replace("[Y]", row["object"])
            statements.append(sentence.replace(" .", "."))
    return _mixed(statements)


def lama_rows(file: Path) -> Iterator[dict[str, Any]]:
    """Facts of T-REx, each with ``relation``, ``template``, ``subject`` and ``object``.

    Raises:
        CorpusError: unreadable, or a line without one of the fields; names the line.
    """
    for number, row in json_lines(file):
        absent = [field for field in LAMA_FIELDS if not isinstance(row, dict) or not isinstance(row.get(field), str)]
        if absent:
            raise CorpusError(f"`{file}` line {number}: no {absent[0]}", f"each line needs {', '.join(LAMA_FIELDS)}")
        yield row


def lama_file(folder: Path | None) -> Path:
    """LAMA's T-REx facts in a data folder.

    Raises:
        CorpusError: there is no such file.
    """
    file = None if folder is None else folder / LAMA_FILE
    if file is None or not file.is_file():
        where = "no data folder is set" if file is None else f"`{file}` does not exist"
        raise CorpusError(f"LAMA needs {LAMA_FILE}: {where}", "pass --data-dir, or use the shipped `facts`")
    return file


@dataclass(frozen=True, slots=True)
class Statements:
    """Every second fact, joined to one text: one half calibrates, the other evaluates."""

    name: str
    role: Role
    folder: Path | None
    """The data folder."""

    def documents(self) -> Iterator[Piece]:
        """One.

        Raises:
            CorpusError: the data folder lacks the facts.
        """
        negated = self.name.startswith("negated-")
        made = (
            shipped_statements(negated=negated) if self.name.endswith("facts") else lama_statements(self.folder, negated=negated)
        )
        yield Piece(" ".join(made[0 if self.role == "calibration" else 1 :: 2]), f"`{self.name}`")

    def key(self) -> str:
        """Digest of the content."""
        return digest(piece.text.encode() for piece in self.documents())


def negate(template: str) -> str | None:
    """The template's opposite, or ``None`` if no rule applies."""
    for word, opposite in _NEGATIONS:
        if word in template:
            return template.replace(word, opposite, 1)
    return None


def _mixed(statements: list[str]) -> list[str]:
    order = list(range(len(statements)))
    random.Random(0).shuffle(order)
    return [statements[index] for index in order]
