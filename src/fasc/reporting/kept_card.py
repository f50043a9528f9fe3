"""What was kept, written into the model cards of checkpoints of ours."""

import re
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path

from fasc.errors import FascError
from fasc.evaluation.compared import Compared
from fasc.evaluation.score import FEW, Score
from fasc.progress import say
from fasc.reporting.compared import NOTE, certificate
from fasc.reporting.table import format_score
from fasc.serving.checkpoint import read_provenance
from fasc.storage import new_file

_KEPT = ("<!-- fasc: what was kept -->", "<!-- fasc: end -->")
_SCORES = ("<!-- fasc: scores -->", "<!-- fasc: end of scores -->")


def write_certificates(result: Compared) -> None:
    """Write each compared model's part of the comparison into its card.

    The card stays as it is where nothing was paired, and where the reference is not what the checkpoint was made from.
    """
    for model in (name for name in result.names[1:] if any(one.model == name for one in result.pairs)):
        source = (read_provenance(Path(model).expanduser()) or {}).get("model")
        if source is None or _same(str(source), result.names[0]):
            _write(model, partial(_certificate, result, model), _KEPT)
        else:
            say(f"the card of {model} stays as it is: it was made from {source}, not from {result.names[0]}")


def _same(one: str, other: str) -> bool:
    """Whether two names are of one model."""
    return one == other or Path(one).expanduser().resolve() == Path(other).expanduser().resolve()


def _certificate(result: Compared, model: str, card: str) -> str:
    """With the rows of benchmarks that an earlier comparison with the same model asked and this one does not."""
    made, old = certificate(result, model), section_of(card, _KEPT)
    title = next(line for line in made.splitlines() if line.startswith("## "))
    if title not in old.splitlines():
        return made
    rows = [line for line in made.splitlines() if line.startswith("| ")]
    asked = {_COLUMN.split(line)[1] for line in rows}
    kept = [line for line in old.splitlines() if line.startswith("| ") and _COLUMN.split(line)[1] not in asked]
    return made.replace(rows[-1], "\n".join([rows[-1], *kept]), 1)


def write_scores_into_card(checkpoint: str, scores: Sequence[Score]) -> None:
    """Write the scores of an evaluation into the card of a checkpoint of ours, beside those that it does not measure again.

    What was measured on another text, in another way or on another number of items is not the same and stays.
    """
    rows = [_row(one) for one in scores if "=" not in one.metric or one.n >= FEW]
    now, asked = {_identity(row) for row in rows}, {_cell(one.benchmark) for one in scores}

    def section(card: str) -> str:
        kept = [row for row in _rows_in(section_of(card, _SCORES)) if _identity(row) not in now]
        kept = [row for row in kept if row[_HOW] or row[0] not in asked]  # parts go with the last measurement of the whole
        names = dict.fromkeys(row[0] for row in (*kept, *rows))
        lines = [_SCORES[0], "## Scores", "", "| benchmark | | value [95 % interval] | n | how |", "|---|---|--:|--:|---|"]
        lines += [f"| {' | '.join(row)} |" for name in names for row in (*kept, *rows) if row[0] == name]
        return "\n".join([*lines, _SCORES[1]])

    _write(checkpoint, section, _SCORES)


_VALUE, _HOW = 2, 4


def _row(one: Score) -> tuple[str, ...]:
    how = "" if "=" in one.metric else one.protocol
    return tuple(map(_cell, (one.benchmark, one.metric, format_score(one.to_dict()), f"{one.n:,}", how)))


def _identity(row: tuple[str, ...]) -> tuple[str, ...]:
    """What was measured."""
    return row[:_VALUE] + row[_VALUE + 1 :]


def _cell(words: str) -> str:
    return " ".join(words.split()).replace("|", "\\|")


_COLUMN = re.compile(r"(?<!\\) ?\| ?")


def _rows_in(section: str) -> list[tuple[str, ...]]:
    """The rows of an earlier table of scores."""
    rows = [tuple(_COLUMN.split(line.strip())[1:-1]) for line in section.splitlines() if line.startswith("| ")]
    return [row for row in rows if len(row) == _HOW + 1 and row[0] != "benchmark"]


def _write(checkpoint: str, section: Callable[[str], str], marks: tuple[str, str]) -> None:
    """Put a section, made for the card as it is, into it; what is not ours, or cannot be written, is left as it is."""
    folder = Path(checkpoint).expanduser()
    card = folder / "README.md"
    with suppress(FascError, OSError):
        if not folder.is_dir() or read_provenance(folder) is None or not card.is_file():
            return
        raw, mode = card.read_bytes(), card.stat().st_mode
        try:
            found = raw.decode("utf-8").replace("\r\n", "\n")
        except UnicodeDecodeError:
            say(f"warning: {card} is not UTF-8 and stays as it is")
            return
        text = with_section(found, section(found), marks)
        text = text.replace("\n", "\r\n") if b"\r\n" in raw else text
        with new_file(card) as scratch:
            scratch.write_bytes(text.encode("utf-8"))
        card.chmod(mode)
        say(f"{card} says so now")


def section_of(card: str, marks: tuple[str, str]) -> str:
    """What stands between the marks; nothing where one of them lacks."""
    return _parted(card, marks)[1]


def with_section(card: str, section: str, marks: tuple[str, str]) -> str:
    """The card with a section in the place of the earlier one between the marks, or at its end.

    What somebody else has written between the marks stands behind them afterwards.
    """
    before, old, after = _parted(card, marks)
    kept = "\n".join(line for line in old.splitlines() if not _is_ours(line)).strip("\n")
    return "\n\n".join(part for part in (before.rstrip(), section, kept, after.strip("\n").rstrip()) if part) + "\n"


def _parted(card: str, marks: tuple[str, str]) -> tuple[str, str, str]:
    """What stands before, between and behind two marks that have lines of their own: a sentence about them is none.

    Without an end mark nobody knows what is ours: all of it stands behind.
    """
    begin, end = (re.compile(rf"^{re.escape(mark)}[ \t]*$", re.MULTILINE) for mark in marks)
    first = begin.search(card)
    if first is None:
        return card, "", ""
    last = end.search(card, first.end())
    if last is None:
        return card[: first.start()], "", card[first.end() :]
    return card[: first.start()], card[first.end() : last.start()], card[last.end() :]


_TITLES = ("## Scores", "## What was kept of ")


def _is_ours(line: str) -> bool:
    """Whether a line between the marks is one that is written anew."""
    line = line.strip()
    return not line or line.startswith(("| ", "|---", *_TITLES, NOTE[:20]))
