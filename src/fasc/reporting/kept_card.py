"""What was kept, written into the model cards of checkpoints of ours."""

from collections.abc import Sequence
from contextlib import suppress
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
        _write(model, certificate(result, model), _KEPT)


def write_scores_into_card(checkpoint: str, scores: Sequence[Score]) -> None:
    """Write the scores of an evaluation into the card of a checkpoint of ours."""
    lines = [_SCORES[0], "## Scores", "", "| benchmark | | value [95 % interval] | n | how |", "|---|---|--:|--:|---|"]
    for one in scores:
        if "=" not in one.metric or one.n >= FEW:
            cells = [
                one.benchmark,
                one.metric,
                format_score(one.to_dict()),
                f"{one.n:,}",
                "" if "=" in one.metric else one.protocol,
            ]
            lines.append(f"| {' | '.join(cells)} |")
    _write(checkpoint, "\n".join([*lines, _SCORES[1]]), _SCORES)


def _write(checkpoint: str, section: str, marks: tuple[str, str]) -> None:
    """Put a section into a card; a folder that is not ours, or that cannot be written, is left as it is."""
    folder = Path(checkpoint).expanduser()
    card = folder / "README.md"
    with suppress(FascError, OSError):
        if not folder.is_dir() or read_provenance(folder) is None or not card.is_file():
            return
        text = with_section(card.read_text(encoding="utf-8"), section, marks)
        with new_file(card) as scratch:
            scratch.write_text(text, encoding="utf-8")
        say(f"{card} says so now")


def with_section(card: str, section: str, marks: tuple[str, str]) -> str:
    """The card with a section in the place of the earlier one between the marks, or at its end."""
    before, _, rest = card.partition(marks[0])
    old, end, behind = rest.partition(marks[1])
    after = (behind if end else old).strip()  # without an end mark nobody knows what is ours: all of it stays
    return "\n\n".join(part for part in (before.strip(), section, after) if part) + "\n"
