"""The registry of benchmarks."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from fasc.text.corpus import TokenBlock
from fasc.evaluation.options import EvaluationConfig
from fasc.errors import UnknownNameError
from fasc.evaluation.score import Score


class WindowScores(NamedTuple):
    """Means over the tokens of each window."""

    nll: list[float]
    """Nats per predicted token."""

    kl: list[float] | None
    """KL(dense ‖ compressed), nats per token; ``None`` where no dense model is known."""


class Subject(NamedTuple):
    """What a benchmark is given."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    dense: PreTrainedModel | None
    """The model it was compressed from, for ``kl``."""

    text: TokenBlock | None = None
    """The windows of held-out text, for the benchmarks that need text."""

    passes: dict[str, WindowScores] | None = None
    """What was measured on these windows already: two benchmarks of one text share a forward pass."""


Measure = Callable[[Subject, EvaluationConfig], Sequence[Score]]


@dataclass(frozen=True, slots=True)
class Benchmark:
    """A registered benchmark."""

    name: str
    reference: str
    needs_dense: bool
    needs_text: bool
    measure: Measure

    @property
    def summary(self) -> str:
        """First line of the benchmark's docstring."""
        return (self.measure.__doc__ or "").strip().splitlines()[0]


BENCHMARKS: dict[str, Benchmark] = {}
"""Every registered benchmark by name."""


def benchmark(name: str, *, reference: str, needs_dense: bool = False, needs_text: bool = False) -> Callable[[Measure], Measure]:
    """Register ``measure(subject, config) → scores`` as a benchmark.

    Args:
        name: as given to ``--benchmarks``.
        reference: paper or data set.
        needs_dense: whether the dense model is needed beside the one being scored.
        needs_text: whether it is measured on the evaluation corpus.
    """

    def register(measure: Measure) -> Measure:
        BENCHMARKS[name] = Benchmark(name, reference, needs_dense, needs_text, measure)
        return measure

    return register


def get_benchmark(name: str) -> Benchmark:
    """The benchmark of that name.

    Raises:
        UnknownNameError: there is none; suggests the nearest.
    """
    if name not in BENCHMARKS:
        raise UnknownNameError("benchmark", name, BENCHMARKS)
    return BENCHMARKS[name]
