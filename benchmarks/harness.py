"""Our benchmarks beside lm-evaluation-harness: the same items of a real model, answer by answer.

Both read the same file: the first items of each in a folder of its own, because a limit draws items there and takes the first here.
Needs the data folder (docs/howto-benchmarks.md) and `pip install "fasc[eval]"`.

    FASC_DATA=DATA python benchmarks/harness.py smollm2-135m --items 100
"""

import argparse
import gzip
import tempfile
import time
from itertools import islice
from pathlib import Path
from typing import Any

from fasc.evaluation.evaluate import Record, evaluate
from fasc.evaluation.options import EvaluationConfig
from fasc.model.load import LoadedModel, load_model
from fasc.provenance import provenance
from fasc.storage import write_json
from fasc.text.named import data_folder

FILES = {
    "arc_easy": ("arc/easy_test.jsonl.gz",),
    "arc_challenge": ("arc/challenge_test.jsonl.gz",),
    "piqa": ("piqa/valid.jsonl.gz",),
    "hellaswag": ("hellaswag/valid_subset.jsonl.gz",),
    "winogrande": ("winogrande/valid.jsonl.gz",),
    "lambada_openai": ("lambada/test.jsonl.gz",),
    "blimp": ("blimp/blimp.jsonl.gz",),
    "mmlu": ("mmlu/test.jsonl.gz", "mmlu/dev.jsonl.gz"),
}
"""Tasks that both have without worked examples, and their files, the items' first."""


def first_items(source: Path, folder: Path, files: tuple[str, ...], items: int) -> None:
    """Items spread evenly over the first file, and the others whole."""
    for place, name in enumerate(files):
        target = folder / name
        target.parent.mkdir(parents=True, exist_ok=True)
        with gzip.open(source / name, "rt", encoding="utf-8") as lines:
            rows = list(lines)
        step = max(1, len(rows) // items) if place == 0 else 1
        chosen = islice(rows[::step], items if place == 0 else None)
        with gzip.open(target, "wt", encoding="utf-8") as file:
            file.writelines(chosen)


def beside(loaded: LoadedModel, task: str, items: int, source: Path) -> dict[str, Any]:
    """Both scores of a task, and how many items they answer alike."""
    with tempfile.TemporaryDirectory() as folder:
        first_items(source, Path(folder), FILES[task], items)
        record = Record(keep=False)
        found: dict[str, Any] = {"task": task}
        for name in (task, f"harness/{task}"):
            started = time.perf_counter()
            config = EvaluationConfig(benchmarks=(name,), data_dir=Path(folder), shots=0 if task == "mmlu" else None)
            scores = evaluate(loaded.model, loaded.tokenizer, config, record=record)
            key = "ours" if name == task else "harness"
            found[key] = {one.metric: one.value for one in scores if "/" not in one.metric}
            found[f"{key}_seconds"] = time.perf_counter() - started
    ours, theirs = ([one.right for one in record.outcomes[name]] for name in (task, f"harness/{task}"))
    return found | {"items": len(ours), "same": sum(a == b for a, b in zip(ours, theirs, strict=True))}


def main() -> None:
    """Task after task, written after each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", default="smollm2-135m")
    parser.add_argument("--items", type=int, default=100)
    parser.add_argument("--tasks", default=",".join(FILES))
    parser.add_argument("--device", default="auto")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "harness.json")
    asked = parser.parse_args()
    source = data_folder(None)
    if source is None:
        parser.error("set FASC_DATA to a data folder")
    loaded = load_model(asked.model, dtype="float32", device=asked.device)
    rows = []
    for task in asked.tasks.split(","):
        rows.append(beside(loaded, task, asked.items, source))
        write_json(asked.out, {"rows": rows, "provenance": provenance(model=asked.model)})
        print(rows[-1], flush=True)


if __name__ == "__main__":
    main()
