"""Plain world facts, written for this project and shipped with it."""

import tomllib
from collections.abc import Sequence
from importlib.resources import files

from fasc.config import EvaluationConfig
from fasc.evaluation._cloze import ClozeItem, score_items
from fasc.evaluation._registry import Subject, benchmark
from fasc.evaluation.score import Score


def read_facts() -> list[ClozeItem]:
    """The shipped facts as cloze items; the candidates of a relation are its distinct objects."""
    raw = tomllib.loads((files("fasc.evaluation") / "data" / "facts.toml").read_text(encoding="utf-8"))
    items = []
    for name, relation in raw.items():
        candidates = tuple(dict.fromkeys(relation["facts"].values()))
        for subject, answer in relation["facts"].items():
            prompt = relation["template"].replace("[X]", subject)
            items.append(ClozeItem(prompt, candidates, candidates.index(answer), name, relation["type"]))
    return items


@benchmark("facts", reference="written for this project (src/fasc/evaluation/data/facts.toml)")
def facts(subject: Subject, config: EvaluationConfig) -> Sequence[Score]:
    """World facts shipped with fasc: top-1 accuracy among the relation's candidates; needs no data."""
    return score_items("facts", subject, read_facts(), config)
