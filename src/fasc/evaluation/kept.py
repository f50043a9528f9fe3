"""Scores kept in the cache: the same weights are not asked the same questions twice."""

import json
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import PreTrainedModel

from fasc.errors import FascError
from fasc.evaluation.options import EvaluationConfig
from fasc.evaluation.outcome import Outcome, outcomes_from
from fasc.evaluation.registry import Benchmark
from fasc.evaluation.score import Score
from fasc.model.load import model_fingerprint
from fasc.provenance import digest, file_digest
from fasc.storage import cache_root, read_json, write_json
from fasc.text.corpus import TokenBlock
from fasc.text.named import data_folder

_FILES = 400
"""So many results are kept, the last used."""

_NO_EFFECT = {"benchmarks", "corpus", "data_dir", "batch_tokens", "prompts", "continuation", "speed"}
"""Options that change no score, or whose content is in the key by itself."""


@dataclass(frozen=True, slots=True)
class Identity:
    """What a model is, as far as its scores go."""

    digest: str

    @classmethod
    def of(cls, model: PreTrainedModel) -> "Identity":
        """Its weights, its config, and where and how it runs."""
        config = {key: value for key, value in model.config.to_dict().items() if key not in _NOT_THE_MODEL}
        words = json.dumps(config, sort_keys=True, default=str)
        return cls(digest([model_fingerprint(model).encode(), words.encode(), f"{model.device.type} {model.dtype}".encode()]))


_NOT_THE_MODEL = ("_name_or_path", "transformers_version", "name_or_path")


class KeptScores:
    """Results of benchmarks by what they are of: weights, questions, protocol and the code that asks.

    Args:
        model: that is scored.
        dense: that it is compared with, or none.
        folder: of the files; by default in the cache. What cannot be read or written is as good as none.
    """

    def __init__(self, model: PreTrainedModel, dense: PreTrainedModel | None, folder: Path | None = None) -> None:
        self._model = Identity.of(model)
        self._dense = None if dense is None else Identity.of(dense)
        self._folder = folder or cache_root() / "scores"
        self._code = _code()

    def key(self, benchmark: Benchmark, config: EvaluationConfig, text: TokenBlock | None) -> str:
        """Digest of all that a result depends on."""
        options = {name: value for name, value in config.model_dump(mode="json").items() if name not in _NO_EFFECT}
        folder = data_folder(config.data_dir) if benchmark.files else None
        parts: dict[str, Any] = {
            "model": self._model.digest,
            "dense": self._dense.digest if benchmark.needs_dense and self._dense is not None else None,
            "benchmark": benchmark.name,
            "options": options,
            "files": [file_digest(folder / name) for name in benchmark.files] if folder is not None else [],
            "contents": None if benchmark.contents is None else benchmark.contents(config),
            "text": None if text is None else digest([text.tokens.numpy().tobytes(), text.corpus.encode()]),
            "versions": [torch.__version__, transformers.__version__, self._code],
        }
        return digest([json.dumps(parts, sort_keys=True).encode()])

    def read(self, key: str) -> tuple[list[Score], list[Outcome]] | None:
        """An earlier result, if there is one that can be read."""
        file = self._folder / f"{key}.json"
        with suppress(FascError, OSError, TypeError, KeyError, AttributeError):
            found = read_json(file)
            result = [Score(**row) for row in found["scores"]], outcomes_from(found["outcomes"])
            file.touch()
            return result
        return None

    def write(self, key: str, scores: list[Score], outcomes: list[Outcome]) -> None:
        """Keep a result."""
        value: Mapping[str, Any] = {
            "scores": [one.to_dict() for one in scores],
            "outcomes": [one.to_dict() for one in outcomes],
        }
        with suppress(FascError, OSError):
            self._folder.mkdir(parents=True, exist_ok=True)
            write_json(self._folder / f"{key}.json", value)
            for old in sorted(self._folder.glob("*.json"), key=lambda path: path.stat().st_mtime)[:-_FILES]:
                old.unlink(missing_ok=True)


def _code() -> str:
    def parts() -> Iterator[bytes]:
        for path in sorted(Path(__file__).parent.rglob("*.py")):
            yield path.read_bytes()

    return digest(parts())
