"""BLiMP: minimal pairs of English grammar."""

from collections.abc import Sequence

from fasc.evaluation.choices import ChoiceItem, score_choices
from fasc.evaluation.files import benchmark_rows
from fasc.evaluation.options import EvaluationConfig
from fasc.evaluation.registry import Subject, benchmark
from fasc.evaluation.score import Score

FILE = "blimp/blimp.jsonl.gz"


def read_blimp(config: EvaluationConfig) -> list[ChoiceItem]:
    """Pairs of sentences, the good one first; behind a space, as lm-evaluation-harness has them."""
    fields = {"phenomenon": str, "field": str, "good": str, "bad": str}
    return [
        ChoiceItem((("", f" {row['good']}"), ("", f" {row['bad']}")), 0, row["phenomenon"], row["field"])
        for row in benchmark_rows("blimp", FILE, config, fields)
    ]


@benchmark("blimp", reference="arXiv:1912.00582 (BLiMP)", files=(FILE,))
def blimp(subject: Subject, config: EvaluationConfig) -> Sequence[Score]:
    """BLiMP: how often the grammatical sentence of a pair is more probable, by field and phenomenon; needs --data-dir."""
    protocol = "log-probability of the whole sentence, good against bad, behind the tokenizer's first token"
    return score_choices("blimp", subject, read_blimp(config), config, protocol, kinds=("type", "task"))
