"""Facts as plain sentences, as they are or negated: the corpora of a counterfactual comparison (paper §3).

Both corpora of a pair hold the same facts in the same order, so what differs between them is the negation.
"""

import random
import tomllib
from collections.abc import Callable, Iterator
from importlib.resources import files
from pathlib import Path
from typing import Any

from fasc.errors import CorpusError

LAMA_FILE = "lama/trex.jsonl.gz"
"""In the data folder: one fact a line, with relation, type, template, subject, object."""

Rows = Callable[[Path], Iterator[tuple[int, dict[str, object]]]]

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


def lama_statements(folder: Path | None, rows: Rows, *, negated: bool) -> list[str]:
    """LAMA's T-REx facts, one sentence each, in a fixed mixed order; relations that cannot be negated by a rule are left out.

    Args:
        folder: the data folder.
        rows: reads a JSON-lines file.
        negated: whether to say the opposite.

    Raises:
        CorpusError: there is no such file.
    """
    statements = []
    for _, row in rows(lama_file(folder)):
        template = str(row["template"])
        opposite = negate(template)
        if opposite is not None:
            sentence = (opposite if negated else template).replace("[X]", str(row["subject"])).replace("[Y]", str(row["object"]))
            statements.append(sentence.replace(" .", "."))
    return _mixed(statements)


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
