"""A training, or the checkpoints of one → what was known and how ρ stood."""

from collections.abc import Sequence
from typing import Any

from fasc.diagnosis import emergence as trained
from fasc.evaluation.evaluate import evaluate as score
from fasc.evaluation.options import EvaluationConfig
from fasc.model.load import require_same_tokenizer
from fasc.model.options import ModelConfig
from fasc.progress import say
from fasc.stages.compress import load
from fasc.statistics.options import CalibrationConfig
from fasc.text.corpus import TextRequest, load_corpus


def of_training(people: int, steps: int, seeds: Sequence[int], *, device: str = "auto") -> dict[str, Any]:
    """Train small models on made biographies, and on shuffled ones; see :func:`fasc.diagnosis.emergence.emergence`."""
    place = "cpu" if device == "auto" else device
    return trained.emergence(people, steps, seeds, device=place)


def of_checkpoints(
    names: Sequence[str], calibration: CalibrationConfig, config: EvaluationConfig, source: ModelConfig
) -> dict[str, Any]:
    """The same of checkpoints of one model: the shipped facts, ρ, and FASC's gain over SVD, on the same text.

    Args:
        names: checkpoints, the earliest first.
        calibration: text and its size.
        config: limit of the facts.
        source: device and precision.

    Raises:
        UsageError: two of them split text differently.
    """
    require_same_tokenizer(names)
    rows: list[dict[str, Any]] = []
    for step, name in enumerate(names):
        say(f"looking at {name}")
        rows.append(
            {"seed": calibration.seed, "arm": "facts", "step": step, "name": name} | _seen(name, calibration, config, source)
        )
    return {"rows": rows, "summary": {}, "steps": list(range(len(names)))}


def _seen(name: str, calibration: CalibrationConfig, config: EvaluationConfig, source: ModelConfig) -> dict[str, Any]:
    """Of one checkpoint, which is loaded here, so that it is gone before the next one is."""
    loaded = load(source.model_copy(update={"model": name}))
    texts = [
        load_corpus(
            *loaded,
            TextRequest(
                corpus=calibration.corpus,
                sequences=count,
                sequence_length=calibration.sequence_length,
                seed=calibration.seed + extra,
                role="calibration" if extra == 0 else "evaluation",
                data_dir=calibration.data_dir,
            ),
        ).tokens
        for extra, count in ((0, calibration.sequences), (1, 8))
    ]
    known = score(*loaded, config)[0].value
    return {"accuracy": known} | trained.look(loaded.model, *texts, batch_tokens=calibration.batch_tokens)
