"""Questions of everyday knowledge and reasoning with a few answers: ARC, PIQA, HellaSwag, WinoGrande."""

from collections.abc import Sequence

from fasc.errors import CorpusError
from fasc.evaluation.choices import ChoiceItem, score_choices
from fasc.evaluation.files import benchmark_rows, checked_answer
from fasc.evaluation.options import EvaluationConfig
from fasc.evaluation.registry import Subject, benchmark
from fasc.evaluation.score import Score

EASY, CHALLENGE = "arc/easy_test.jsonl.gz", "arc/challenge_test.jsonl.gz"
PIQA, HELLASWAG, WINOGRANDE = "piqa/valid.jsonl.gz", "hellaswag/valid_subset.jsonl.gz", "winogrande/valid.jsonl.gz"
_PROTOCOL = "log-probability of the answer's text behind the question, no examples first"


def _questions(name: str, file: str, config: EvaluationConfig, ask: str, field: str = "question") -> list[ChoiceItem]:
    items = []
    for number, row in enumerate(benchmark_rows(name, file, config, {field: str, "choices": list, "answer": int}), start=1):
        answer = checked_answer(file, number, row["answer"], row["choices"])
        items.append(ChoiceItem.of(ask.format(row[field]), [f" {choice}" for choice in row["choices"]], answer, name))
    return items


@benchmark("arc_easy", reference="arXiv:1803.05457 (ARC), the easy set", files=(EASY,))
def arc_easy(subject: Subject, config: EvaluationConfig) -> Sequence[Score]:
    """ARC, easy: grade-school science; needs --data-dir."""
    items = _questions("arc_easy", EASY, config, "Question: {}\nAnswer:")
    return score_choices("arc_easy", subject, items, config, _PROTOCOL, per_character=True, kinds=())


@benchmark("arc_challenge", reference="arXiv:1803.05457 (ARC), the challenge set", files=(CHALLENGE,))
def arc_challenge(subject: Subject, config: EvaluationConfig) -> Sequence[Score]:
    """ARC, challenge: grade-school science that word counts do not answer; needs --data-dir."""
    items = _questions("arc_challenge", CHALLENGE, config, "Question: {}\nAnswer:")
    return score_choices("arc_challenge", subject, items, config, _PROTOCOL, per_character=True, kinds=())


@benchmark("piqa", reference="arXiv:1911.11641 (PIQA)", files=(PIQA,))
def piqa(subject: Subject, config: EvaluationConfig) -> Sequence[Score]:
    """PIQA: which of two ways to do something works; needs --data-dir."""
    items = _questions("piqa", PIQA, config, "Question: {}\nAnswer:")
    return score_choices("piqa", subject, items, config, _PROTOCOL, per_character=True, kinds=())


@benchmark("hellaswag", reference="arXiv:1905.07830 (HellaSwag)", files=(HELLASWAG,))
def hellaswag(subject: Subject, config: EvaluationConfig) -> Sequence[Score]:
    """HellaSwag: which of four ends a text has; needs --data-dir."""
    items = _questions("hellaswag", HELLASWAG, config, "{}", field="query")
    return score_choices("hellaswag", subject, items, config, _PROTOCOL, per_character=True, kinds=())


@benchmark("winogrande", reference="arXiv:1907.10641 (WinoGrande)", files=(WINOGRANDE,))
def winogrande(subject: Subject, config: EvaluationConfig) -> Sequence[Score]:
    """WinoGrande: whom a pronoun means; needs --data-dir."""
    items = []
    fields = {"sentence": str, "choices": list, "answer": int}
    for number, row in enumerate(benchmark_rows("winogrande", WINOGRANDE, config, fields), start=1):
        before, blank, after = row["sentence"].partition("_")
        if not blank or not after.strip():
            raise CorpusError(f"`{WINOGRANDE}` row {number}: no text behind the blank `_`", "each sentence needs one")
        pairs = tuple((before + choice, f" {after.strip()}") for choice in row["choices"])
        items.append(ChoiceItem(pairs, checked_answer(WINOGRANDE, number, row["answer"], row["choices"]), "winogrande"))
    protocol = "log-probability of what follows the blank, with each name in it (partial scoring)"
    return score_choices("winogrande", subject, items, config, protocol, kinds=())
