"""LAMA T-REx: factual recall by cloze."""

from collections.abc import Sequence
from pathlib import Path

from fasc.evaluation.cloze import ClozeItem, score_items
from fasc.evaluation.options import EvaluationConfig
from fasc.evaluation.registry import Subject, benchmark
from fasc.evaluation.score import Score
from fasc.text.named import data_folder
from fasc.text.statements import lama_file, lama_rows


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
        before, _, _ = row["template"].partition("[Y]")
        prompt = before.replace("[X]", row["subject"]).strip()
        if prompt:  # a template that begins with the object cannot be asked of a causal model
            options = candidates[row["relation"]]
            kind = str(row.get("type", "other"))
            items.append(ClozeItem(prompt, options, options.index(row["object"]), row["relation"], kind))
    return items


@benchmark("lama", reference="arXiv:1909.01066 (LAMA), T-REx facts in the PARAREL version")
def lama(subject: Subject, config: EvaluationConfig) -> Sequence[Score]:
    """LAMA T-REx: top-1 accuracy among the relation's candidates, by relation and type; needs --data-dir."""
    return score_items("lama", subject, read_trex(lama_file(data_folder(config.data_dir))), config)
