"""mLAMA: the same facts in eight languages."""

import random
from collections.abc import Sequence
from typing import Any, NamedTuple

from fasc.evaluation.cloze import ClozeItem, score_items
from fasc.evaluation.files import benchmark_rows
from fasc.evaluation.options import EvaluationConfig
from fasc.evaluation.registry import Subject, benchmark
from fasc.evaluation.score import Score

FACTS, PATTERNS = "mpararel/facts.jsonl.gz", "mpararel/patterns.jsonl.gz"
_END = " .。؟?।"


class _Pattern(NamedTuple):
    before: str
    suffix: str
    space: bool


def _pattern(rows: Sequence[dict[str, Any]]) -> _Pattern | None:
    """The wording that is asked: checked by people first, then with least behind the object; ``None`` if all begin with it."""
    usable = [row for row in rows if "[X]" in row["pattern"].partition("[Y]")[0]]
    if not usable:
        return None
    best = min(usable, key=lambda row: (not row["reviewed"], len(row["pattern"].partition("[Y]")[2])))
    before, _, after = best["pattern"].partition("[Y]")
    return _Pattern(before.rstrip(), after.rstrip(_END), before.endswith(" "))


def read_mlama(config: EvaluationConfig) -> list[ClozeItem]:
    """Facts that all languages have, asked in each; a limit counts questions, and is shared by the languages.

    Relations that some language cannot ask with the object behind the subject are left out.
    """
    patterns: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for row in benchmark_rows("mlama", PATTERNS, config, {"lang": str, "relation": str, "pattern": str, "reviewed": bool}):
        patterns.setdefault((row["relation"], row["lang"]), []).append(row)
    wordings = {key: found for key, rows in patterns.items() if (found := _pattern(rows)) is not None}
    languages = sorted({language for _, language in patterns})
    facts: dict[tuple[str, str, str], dict[str, dict[str, Any]]] = {}
    objects: dict[tuple[str, str], dict[str, None]] = {}
    for row in benchmark_rows("mlama", FACTS, config, dict.fromkeys(_FIELDS, str)):
        facts.setdefault((row["relation"], row["sub_uri"], row["obj_uri"]), {})[row["lang"]] = row
        objects.setdefault((row["relation"], row["lang"]), {})[row["object"]] = None
    asked = [
        fact
        for (relation, *_), fact in facts.items()
        if all(language in fact and (relation, language) in wordings for language in languages)
    ]
    most = len(asked) if config.limit is None else -(-config.limit // len(languages))
    if most < len(asked):
        asked = random.Random(config.seed).sample(asked, most)
    candidates = {key: tuple(distinct) for key, distinct in objects.items()}
    return [_item(fact[language], wordings, candidates) for language in languages for fact in asked]


_FIELDS = ("lang", "relation", "subject", "object", "sub_uri", "obj_uri")


def _item(
    row: dict[str, Any], wordings: dict[tuple[str, str], _Pattern], candidates: dict[tuple[str, str], tuple[str, ...]]
) -> ClozeItem:
    key = (row["relation"], row["lang"])
    wording, options = wordings[key], candidates[key]
    prompt = wording.before.replace("[X]", row["subject"])
    return ClozeItem(
        prompt,
        options,
        options.index(row["object"]),
        row["relation"],
        row["lang"],
        (),
        row["sub_uri"],
        wording.space,
        wording.suffix,
    )


@benchmark("mlama", reference="arXiv:2102.00894 (mLAMA) in the wordings of mPARAREL", files=(FACTS, PATTERNS))
def mlama(subject: Subject, config: EvaluationConfig) -> Sequence[Score]:
    """mLAMA: the same facts in eight languages, by language; needs --data-dir."""
    protocol = "top-1 among the relation's objects in that language, log-probability of the answer and what follows it"
    items = read_mlama(config)
    unlimited = config.model_copy(update={"limit": None})
    return score_items("mlama", subject, items, unlimited, protocol=protocol, group=lambda item: {"language": item.type})
