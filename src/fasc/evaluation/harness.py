"""Tasks of lm-evaluation-harness on a loaded model (extra ``fasc[eval]``).

``harness/NAME`` is the harness's own task, from the hub. Where a data folder is set and we ship a task of that name over a file
in its layout (``fasc/data/harness``), the questions come from there, and the hub is not asked.
"""

import logging
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from difflib import get_close_matches
from importlib.metadata import version
from importlib.resources import files
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from fasc.errors import FascError, UsageError
from fasc.evaluation.options import EvaluationConfig
from fasc.evaluation.outcome import Outcome
from fasc.evaluation.registry import Benchmark, Subject
from fasc.evaluation.score import Score, proportion_interval
from fasc.provenance import digest, file_digest
from fasc.text.named import data_folder

PREFIX = "harness/"
_NORMAL = 1.959963984540054
"""Standard errors to the ends of a 95 % interval."""

_WORDS = {"acc": "accuracy", "acc_norm": "accuracy per character", "exact_match": "exact match"}


def harness_benchmark(name: str) -> Benchmark:
    """A task of the harness as a benchmark.

    Args:
        name: with the prefix ``harness/``.

    Raises:
        UsageError: the harness is not installed.
    """
    if find_spec("lm_eval") is None:
        raise UsageError(f"`{name}` needs lm-evaluation-harness, which is not installed", 'pip install "fasc[eval]"')

    def measure(subject: Subject, config: EvaluationConfig) -> Sequence[Score]:
        """A task of lm-evaluation-harness."""
        return _run(name, subject, config)

    reference = f"lm-evaluation-harness, task {name.removeprefix(PREFIX)}"
    return Benchmark(
        name,
        reference,
        needs_dense=False,
        needs_text=False,
        files=(),
        measure=measure,
        contents=lambda config: _contents(name.removeprefix(PREFIX), config),
    )


def _contents(task: str, config: EvaluationConfig) -> str | None:
    """Digest of the files that a task is read from, and the harness's version; what the hub would give is not known."""
    local = local_task(task, config)
    if local is None:
        return None
    digests = [file_digest(Path(file)) for file in local["dataset_kwargs"]["data_files"].values()]
    return digest([version("lm_eval").encode(), *(one.encode() for one in digests)])


def _run(name: str, subject: Subject, config: EvaluationConfig) -> list[Score]:
    task = name.removeprefix(PREFIX)
    with _quiet():
        from lm_eval import simple_evaluate  # noqa: PLC0415 - heavy, and an extra
        from lm_eval.models.huggingface import HFLM  # noqa: PLC0415
        from lm_eval.tasks import TaskManager  # noqa: PLC0415

        local = local_task(task, config)
        manager = TaskManager()
        if local is None and task not in manager.all_tasks:
            near = get_close_matches(task, manager.all_tasks, 1)
            raise UsageError(
                f"lm-evaluation-harness has no task `{task}`" + (f": did you mean `{near[0]}`?" if near else ""),
                "`lm_eval ls tasks` lists them",
            )
        rows = max(1, config.batch_tokens // 256)
        model = HFLM(pretrained=subject.model, tokenizer=subject.tokenizer, batch_size=rows, backend="causal")
        try:
            found = simple_evaluate(
                model,
                tasks=[local or task],
                num_fewshot=config.shots,
                limit=config.limit,
                bootstrap_iters=0,
                task_manager=manager,
                random_seed=config.seed,
            )
        except FascError:
            raise
        except Exception as problem:
            first = next((line.strip() for line in str(problem).splitlines() if line.strip()), type(problem).__name__)
            where = f"its data is asked of the hub; {_local_hint(task)}" if local is None else "check the benchmark's file"
            raise UsageError(f"lm-evaluation-harness could not run `{task}`: {first[:200]}", where) from problem
    if found is None:
        raise UsageError(f"lm-evaluation-harness gave no result of `{task}`", "run it on one process")
    subject.keep(name, _outcomes(task, found))
    return list(_scores(name, found, "local file" if local is not None else "hub"))


def _local_hint(task: str) -> str:
    file = files("fasc") / "data" / "harness" / f"{task}.yaml"
    return "pass --data-dir to read it from a folder" if file.is_file() else "connect to the hub, or put it into its cache"


def local_task(task: str, config: EvaluationConfig) -> dict[str, Any] | None:
    """The task over a file in the data folder, or ``None`` where there is no folder, task or file."""
    import yaml  # noqa: PLC0415

    shipped, folder = files("fasc") / "data" / "harness" / f"{task}.yaml", data_folder(config.data_dir)
    if folder is None or not shipped.is_file():
        return None
    found: dict[str, Any] = yaml.safe_load(shipped.read_text(encoding="utf-8"))
    places = {split: folder / file for split, file in found["dataset_kwargs"]["data_files"].items()}
    if not all(place.is_file() for place in places.values()):
        return None
    return found | {"dataset_kwargs": {"data_files": {split: str(place.resolve()) for split, place in places.items()}}}


def _scores(name: str, found: Mapping[str, Any], source: str) -> Iterator[Score]:
    """Every metric of the task, and of its parts, with an interval."""
    task, configs = name.removeprefix(PREFIX), found.get("configs", {})
    for part, values in found["results"].items():
        n = int((found.get("n-samples", {}).get(part) or {}).get("effective", 0)) or int(values.get("sample_len", 0))
        for key, value in values.items():
            metric, comma, kept = key.partition(",")
            if not comma or metric.endswith("_stderr") or not isinstance(value, (int, float)):
                continue
            word = _WORDS.get(metric, metric) + ("" if kept == "none" else f" ({kept})")
            own = part.removeprefix("fasc_") == task
            error = values.get(f"{metric}_stderr,{kept}")
            low, high = _interval(metric, float(value), error, n)
            shots = configs.get(part, {}).get("num_fewshot")
            protocol = f"lm-evaluation-harness, {shots or 0} examples, {source}"
            yield Score(name, word if own else f"{word}/task={part}", float(value), low, high, n, protocol)


def _interval(metric: str, value: float, error: Any, n: int) -> tuple[float | None, float | None]:
    if metric in _WORDS and n:
        return proportion_interval(round(value * n), n)
    if isinstance(error, (int, float)):
        return value - _NORMAL * error, value + _NORMAL * error
    return None, None


def _outcomes(task: str, found: Mapping[str, Any]) -> list[Outcome]:
    """What the model made of each item, where the task says right or wrong of it."""
    outcomes = []
    for part, samples in (found.get("samples") or {}).items():
        for sample in samples:
            right = next((sample[key] for key in ("acc", "exact_match") if key in sample), None)
            if isinstance(right, (int, float)):
                item = f"{part}: {sample['doc_id']}"
                outcomes.append(Outcome(item, part.removeprefix("fasc_") or task, "", "", bool(right), None))
    return outcomes


@contextmanager
def _quiet() -> Iterator[None]:
    """The harness says only what goes wrong."""
    logger = logging.getLogger("lm_eval")
    before, level = os.environ.get("LMEVAL_LOG_LEVEL"), logger.level
    os.environ["LMEVAL_LOG_LEVEL"] = "ERROR"
    os.environ.setdefault("TQDM_MININTERVAL", "5")  # a line of progress now and then
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)
        if before is None:
            del os.environ["LMEVAL_LOG_LEVEL"]
        else:
            os.environ["LMEVAL_LOG_LEVEL"] = before
