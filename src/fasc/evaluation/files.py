"""The files that benchmarks are read from."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from fasc.errors import CorpusError
from fasc.evaluation.options import EvaluationConfig
from fasc.text.named import data_folder
from fasc.text.records import json_lines


def benchmark_file(benchmark: str, path: str, config: EvaluationConfig) -> Path:
    """A file in the data folder.

    Raises:
        CorpusError: there is no data folder, or no such file in it.
    """
    folder = data_folder(config.data_dir)
    file = None if folder is None else folder / path
    if file is None or not file.is_file():
        where = "no data folder is set" if file is None else f"`{file}` does not exist"
        hint = f"pass --data-dir with a folder that holds it, or `--benchmarks harness/{benchmark}`, which asks the hub"
        raise CorpusError(f"`{benchmark}` needs {path}: {where}", hint if benchmark in ON_THE_HUB else _NOT_THERE)
    return file


ON_THE_HUB = ("blimp", "mmlu", "arc_easy", "arc_challenge", "hellaswag", "piqa", "winogrande", "lambada_openai", "nq_open", "bbh")
"""Benchmarks that lm-evaluation-harness has under the same name."""

_NOT_THERE = "pass --data-dir with a folder that holds it, or use the shipped `facts`"


def benchmark_rows(
    benchmark: str, path: str, config: EvaluationConfig, fields: Mapping[str, type | tuple[type, ...]]
) -> Iterator[dict[str, Any]]:
    """Rows of a file in the data folder, each with these fields.

    Args:
        benchmark: its name, for errors.
        path: in the data folder; one JSON object a line.
        config: says where the folder is.
        fields: name ↦ type that the value must have.

    Raises:
        CorpusError: no such file, not JSON, or a line without one of the fields; names the line.
    """
    file = benchmark_file(benchmark, path, config)
    for number, row in json_lines(file):
        if not isinstance(row, dict):
            raise CorpusError(f"`{file}` line {number}: no object", f"each line needs {', '.join(fields)}")
        wrong = next((name for name, kind in fields.items() if not _is(row.get(name), kind)), None)
        if wrong is not None:
            what = "no" if wrong not in row else "an unusable"
            raise CorpusError(f"`{file}` line {number}: {what} {wrong}", f"each line needs {', '.join(fields)}")
        yield row


def _is(value: Any, kind: type | tuple[type, ...]) -> bool:
    """Whether a field holds what it should: text that can be written, whole numbers, lists of some text each."""
    if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
        return False
    if isinstance(value, str):
        return _is_text(value)
    return not isinstance(value, list) or (bool(value) and all(isinstance(one, str) and one and _is_text(one) for one in value))


def _is_text(value: str) -> bool:
    """JSON may hold half a character, which no tokenizer takes."""
    return not any("\ud800" <= character <= "\udfff" for character in value)


def checked_answer(file: str, number: int, answer: int, choices: list[str]) -> int:
    """The index of the right choice.

    Raises:
        CorpusError: it is none of the choices.
    """
    if not 0 <= answer < len(choices):
        raise CorpusError(f"`{file}` row {number}: answer {answer} of {len(choices)} choices", "answers count from 0")
    return answer
