"""MMLU: questions with four answers, over 57 subjects."""

from collections import defaultdict
from collections.abc import Iterator, Sequence
from typing import Any

from fasc.errors import CorpusError
from fasc.evaluation.choices import ChoiceItem, score_choices
from fasc.evaluation.files import benchmark_rows, checked_answer
from fasc.evaluation.options import EvaluationConfig
from fasc.evaluation.registry import Subject, benchmark
from fasc.evaluation.score import Score

TEST, DEV = "mmlu/test.jsonl.gz", "mmlu/dev.jsonl.gz"
_FIELDS = {"subject": str, "question": str, "choices": list, "answer": int}
_LETTERS = "ABCDEFGH"


def _asked(row: dict[str, Any]) -> str:
    options = "".join(f"\n{letter}. {choice}" for letter, choice in zip(_LETTERS, row["choices"], strict=False))
    return f"{row['question'].strip()}{options}\nAnswer:"


def read_mmlu(config: EvaluationConfig) -> list[ChoiceItem]:
    """Questions in the harness's words, behind as many worked ones of the same subject as ``config.shots`` says.

    Raises:
        CorpusError: a subject has fewer worked ones, or an answer is none of the choices.
    """
    worked: dict[str, list[str]] = defaultdict(list)
    shots = config.shots or 0
    for row in _rows(DEV, config):
        worked[row["subject"]].append(f"{_asked(row)} {_LETTERS[row['answer']]}\n\n")
    items = []
    for row in _rows(TEST, config):
        name = row["subject"]
        if len(worked[name]) < shots:
            raise CorpusError(
                f"`{DEV}`: {len(worked[name])} worked questions of {name}, and --shots is {shots}",
                f"pass --shots {len(worked[name])}",
            )
        intro = f"The following are multiple choice questions (with answers) about {name.replace('_', ' ')}.\n\n"
        context = intro + "".join(worked[name][:shots]) + _asked(row)
        letters = [f" {letter}" for letter in _LETTERS[: len(row["choices"])]]
        items.append(ChoiceItem.of(context, letters, row["answer"], name))
    return items


def _rows(file: str, config: EvaluationConfig) -> Iterator[dict[str, Any]]:
    """With an answer among at most so many choices as there are letters."""
    for number, row in enumerate(benchmark_rows("mmlu", file, config, _FIELDS), start=1):
        checked_answer(file, number, row["answer"], row["choices"])
        if len(row["choices"]) > len(_LETTERS):
            raise CorpusError(f"`{file}` row {number}: {len(row['choices'])} choices", f"give at most {len(_LETTERS)}")
        yield row


@benchmark("mmlu", reference="arXiv:2009.03300 (MMLU)", files=(TEST, DEV))
def mmlu(subject: Subject, config: EvaluationConfig) -> Sequence[Score]:
    """MMLU: letter of the right answer, by subject; --shots worked questions come first (default 0); needs --data-dir."""
    protocol = f"log-probability of the letter, {config.shots or 0} worked questions of the subject first"
    return score_choices("mmlu", subject, read_mmlu(config), config, protocol)
