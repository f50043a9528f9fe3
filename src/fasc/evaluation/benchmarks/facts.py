"""Plain world facts, written for this project and shipped with it."""

from collections.abc import Sequence

from fasc.evaluation.cloze import ClozeItem, score_items
from fasc.evaluation.options import EvaluationConfig
from fasc.evaluation.registry import Subject, benchmark
from fasc.evaluation.score import Score
from fasc.text.statements import shipped_relations


def read_facts() -> list[ClozeItem]:
    """The shipped facts as cloze items; the candidates of a relation are its distinct objects."""
    items = []
    for name, relation in shipped_relations().items():
        candidates = tuple(dict.fromkeys(relation["facts"].values()))
        for subject, answer in relation["facts"].items():
            prompt = relation["template"].replace("[X]", subject)
            items.append(ClozeItem(prompt, candidates, candidates.index(answer), name, relation["type"], subject=subject))
    return items


@benchmark("facts", reference="written for this project (src/fasc/data/facts.toml)", about_names=True)
def facts(subject: Subject, config: EvaluationConfig) -> Sequence[Score]:
    """World facts shipped with fasc: top-1 accuracy among the relation's candidates; needs no data."""
    return score_items("facts", subject, read_facts(), config)
