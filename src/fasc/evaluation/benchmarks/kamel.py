"""KAMEL: questions on Wikidata, and with them the relation types of the paper's Table 6."""

import random
from collections.abc import Sequence
from typing import Any

from fasc.errors import CorpusError
from fasc.evaluation.benchmarks.lama import GOOGLE_RE, read_google_re, read_trex
from fasc.evaluation.cloze import ClozeItem, score_items
from fasc.evaluation.files import benchmark_file, benchmark_rows
from fasc.evaluation.options import EvaluationConfig
from fasc.evaluation.registry import Subject, benchmark
from fasc.evaluation.score import Score
from fasc.text.statements import LAMA_FILE

FILE = "kamel/test.jsonl.gz"
TYPES = ("taxonomic", "geographic", "temporal", "numerical")
"""The paper's Table 6."""


def read_kamel(config: EvaluationConfig) -> list[ClozeItem]:
    """Questions; the candidates are all objects of the relation, and any of a question's own is right."""
    fields = {"relation": str, "question": str, "subject": str, "objects": list, "type": str}
    rows = [row for row in benchmark_rows("kamel", FILE, config, fields) if any(map(_usable, row["objects"]))]
    objects: dict[str, dict[str, None]] = {}
    for row in rows:
        objects.setdefault(row["relation"], {}).update(dict.fromkeys(filter(_usable, row["objects"])))
    candidates = {relation: tuple(distinct) for relation, distinct in objects.items()}
    items = []
    for row in rows:
        options = candidates[row["relation"]]
        right = [options.index(one) for one in filter(_usable, row["objects"])]
        prompt = f"Question: {row['question'].replace('[S]', row['subject'])}\nAnswer:"
        items.append(ClozeItem(prompt, options, right[0], row["relation"], row["type"], tuple(right[1:]), row["subject"]))
    return items


def _usable(answer: Any) -> bool:
    return isinstance(answer, str) and bool(answer.strip())


@benchmark("kamel", reference="Kalo & Fichtel 2022 (KAMEL)", files=(FILE,), about_names=True)
def kamel(subject: Subject, config: EvaluationConfig) -> Sequence[Score]:
    """KAMEL: 234 relations of Wikidata as questions, by type (numerical, temporal, …) and relation; needs --data-dir."""
    return score_items("kamel", subject, read_kamel(config), config)


@benchmark(
    "relation_types",
    reference="arXiv:2601.07197, Table 6: LAMA T-REx, Google-RE and KAMEL, drawn evenly over four types",
    files=(LAMA_FILE, GOOGLE_RE, FILE),
    about_names=True,
)
def relation_types(subject: Subject, config: EvaluationConfig) -> Sequence[Score]:
    """Taxonomic, geographic, temporal and numerical facts in equal numbers: a limit is shared by the four; needs --data-dir."""
    pool = [
        *(item for item in read_trex(benchmark_file("relation_types", LAMA_FILE, config)) if item.type in TYPES[:2]),
        *(item for item in read_google_re(config) if item.type == "temporal"),
        *(item for item in read_kamel(config) if item.type in TYPES[2:]),
    ]
    drawn = random.Random(config.seed)
    items: list[ClozeItem] = []
    for kind in TYPES:
        some = [item for item in pool if item.type == kind]
        if not some:
            raise CorpusError(f"`relation_types` has no {kind} facts to ask", "check lama/trex, lama/google_re and kamel/test")
        most = len(some) if config.limit is None else min(len(some), -(-config.limit // len(TYPES)))
        items += drawn.sample(some, most)
    return score_items("relation_types", subject, items, config.model_copy(update={"limit": None}))
