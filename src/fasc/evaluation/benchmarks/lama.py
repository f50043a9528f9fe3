"""LAMA: factual recall by cloze, of T-REx in one or in several wordings, and of Google-RE."""

from collections.abc import Sequence
from pathlib import Path

from fasc.evaluation.cloze import ClozeItem, score_items
from fasc.evaluation.files import benchmark_file, benchmark_rows
from fasc.evaluation.options import EvaluationConfig
from fasc.evaluation.registry import Subject, benchmark
from fasc.evaluation.score import Score
from fasc.text.named import data_folder
from fasc.text.statements import LAMA_FILE, lama_file, lama_rows

PATTERNS, GOOGLE_RE = "lama/pararel_patterns.jsonl.gz", "lama/google_re.jsonl.gz"


def asked(template: str, subject: str) -> str:
    """The template up to the object, about a subject; empty if it begins with the object."""
    before, _, _ = template.partition("[Y]")
    return before.replace("[X]", subject).strip() if "[X]" in before else ""


def read_trex(file: Path) -> list[ClozeItem]:
    """Facts as cloze items: the template up to the object; candidates are all objects of the relation in the file.

    Raises:
        CorpusError: unreadable, or a line without one of the fields; names the line.
    """
    rows = list(lama_rows(file))
    objects: dict[str, dict[str, None]] = {}
    for row in rows:
        objects.setdefault(row["relation"], {})[row["object"]] = None
    candidates = {relation: tuple(distinct) for relation, distinct in objects.items()}
    items = []
    for row in rows:
        prompt = asked(row["template"], row["subject"])
        if prompt:  # a template that begins with the object cannot be asked of a causal model
            options = candidates[row["relation"]]
            kind = str(row.get("type", "other"))
            answer = options.index(row["object"])
            items.append(ClozeItem(prompt, options, answer, row["relation"], kind, subject=row["subject"]))
    return items


@benchmark(
    "lama",
    reference="arXiv:1909.01066 (LAMA), T-REx facts in the PARAREL version",
    files=(LAMA_FILE,),
    about_names=True,
)
def lama(subject: Subject, config: EvaluationConfig) -> Sequence[Score]:
    """LAMA T-REx: top-1 accuracy among the relation's candidates, by relation and type; needs --data-dir."""
    return score_items("lama", subject, read_trex(lama_file(data_folder(config.data_dir))), config)


def read_google_re(config: EvaluationConfig) -> list[ClozeItem]:
    """Facts of Google-RE about people: years and places of birth, places of death."""
    fields = {"relation": str, "type": str, "template": str, "subject": str, "object": str}
    rows = list(benchmark_rows("google_re", GOOGLE_RE, config, fields))
    candidates = {
        name: tuple(dict.fromkeys(r["object"] for r in rows if r["relation"] == name)) for name in {r["relation"] for r in rows}
    }
    return [
        ClozeItem(prompt, options, options.index(row["object"]), row["relation"], row["type"], subject=row["subject"])
        for row in rows
        if (prompt := asked(row["template"], row["subject"])) and (options := candidates[row["relation"]])
    ]


@benchmark("google_re", reference="arXiv:1909.01066 (LAMA), Google-RE facts", files=(GOOGLE_RE,), about_names=True)
def google_re(subject: Subject, config: EvaluationConfig) -> Sequence[Score]:
    """LAMA Google-RE: years of birth (temporal) and places of birth and death, by type and relation; needs --data-dir."""
    return score_items("google_re", subject, read_google_re(config), config)


def read_pararel(config: EvaluationConfig) -> list[ClozeItem]:
    """Each fact of T-REx in every wording that asks for the object last enough."""
    patterns: dict[str, list[str]] = {}
    for row in benchmark_rows("pararel", PATTERNS, config, {"relation": str, "pattern": str}):
        if "[X]" in row["pattern"].partition("[Y]")[0]:
            patterns.setdefault(row["relation"], []).append(row["pattern"])
    facts = read_trex(benchmark_file("pararel", LAMA_FILE, config))
    return [
        ClozeItem(asked(pattern, fact.subject), fact.candidates, fact.answer, fact.relation, fact.type, subject=fact.subject)
        for fact in facts
        for pattern in patterns.get(fact.relation, ())
    ]


@benchmark(
    "pararel",
    reference="arXiv:2102.01017 (PARAREL): paraphrases of LAMA's templates",
    files=(LAMA_FILE, PATTERNS),
    about_names=True,
)
def pararel(subject: Subject, config: EvaluationConfig) -> Sequence[Score]:
    """T-REx facts in several wordings: a limit draws pairs of fact and wording; by type and relation; needs --data-dir."""
    return score_items("pararel", subject, read_pararel(config), config)
