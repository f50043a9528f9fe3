"""What was kept, written into the model cards of checkpoints of ours."""

from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path

from fasc.errors import FascError
from fasc.evaluation.compared import Compared
from fasc.evaluation.score import FEW, Score
from fasc.progress import say
from fasc.reporting.compared import certificate
from fasc.reporting.table import format_score
from fasc.serving.checkpoint import read_provenance
from fasc.storage import new_file

_KEPT = ("<!-- fasc: what was kept -->", "<!-- fasc: end -->")
_SCORES = ("<!-- fasc: scores -->", "<!-- fasc: end of scores -->")


def write_certificates(result: Compared) -> None:
    """Write each compared model's part of the comparison into its card; where nothing was paired the card stays as it is."""
    for model in (name for name in result.names[1:] if any(one.model == name for one in result.pairs)):
        _write(model, partial(_certificate, result, model), _KEPT)


def _certificate(result: Compared, model: str, _card: str) -> str:
    return certificate(result, model)


def write_scores_into_card(checkpoint: str, scores: Sequence[Score]) -> None:
    """Write the scores of an evaluation into the card of a checkpoint of ours, beside those that it does not measure again."""
    shown = [one for one in scores if "=" not in one.metric or one.n >= FEW]
    rows = {_cell(one.benchmark): [_row(own) for own in shown if own.benchmark == one.benchmark] for one in shown}

    def section(card: str) -> str:
        kept = {**_rows_in(section_of(card, _SCORES)), **rows}
        lines = [_SCORES[0], "## Scores", "", "| benchmark | | value [95 % interval] | n | how |", "|---|---|--:|--:|---|"]
        return "\n".join([*lines, *(row for own in kept.values() for row in own), _SCORES[1]])

    _write(checkpoint, section, _SCORES)


def _row(one: Score) -> str:
    how = "" if "=" in one.metric else one.protocol
    return f"| {' | '.join(map(_cell, (one.benchmark, one.metric, format_score(one.to_dict()), f'{one.n:,}', how)))} |"


def _cell(words: str) -> str:
    return " ".join(words.split()).replace("|", "\\|")


def _rows_in(section: str) -> dict[str, list[str]]:
    """The rows of an earlier table of scores, by benchmark."""
    found: dict[str, list[str]] = {}
    for line in section.splitlines():
        if line.startswith("| ") and not line.startswith("| benchmark |"):
            found.setdefault(line[2:].partition(" | ")[0], []).append(line)
    return found


def _write(checkpoint: str, section: Callable[[str], str], marks: tuple[str, str]) -> None:
    """Put a section, made for the card as it is, into it; what is not ours, or cannot be written, is left as it is."""
    folder = Path(checkpoint).expanduser()
    card = folder / "README.md"
    with suppress(FascError, OSError):
        if not folder.is_dir() or read_provenance(folder) is None or not card.is_file():
            return
        found = card.read_text(encoding="utf-8")
        text = with_section(found, section(found), marks)
        with new_file(card) as scratch:
            scratch.write_text(text, encoding="utf-8")
        say(f"{card} says so now")


def section_of(card: str, marks: tuple[str, str]) -> str:
    """What stands between the marks; nothing where one of them lacks."""
    inside, end, _ = card.partition(marks[0])[2].partition(marks[1])
    return inside if end else ""


def with_section(card: str, section: str, marks: tuple[str, str]) -> str:
    """The card with a section in the place of the earlier one between the marks, or at its end."""
    before, _, rest = card.partition(marks[0])
    old, end, behind = rest.partition(marks[1])
    after = (behind if end else old).strip()  # without an end mark nobody knows what is ours: all of it stays
    return "\n\n".join(part for part in (before.strip(), section, after) if part) + "\n"
