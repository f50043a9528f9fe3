"""The registry of benchmarks, and what a benchmark is given."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

from fasc.evaluation.options import EvaluationConfig
from fasc.registry import Registry

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from fasc.evaluation.outcome import Outcome, Outcomes
    from fasc.evaluation.score import Score
    from fasc.text.corpus import TokenBlock


class WindowScores(NamedTuple):
    """What one pass over windows of text gives; on the CPU."""

    nll: "Tensor"
    """Mean over the predicted tokens of each window, nats per token; float64 [windows]."""

    kl: "Tensor | None"
    """KL(dense ‖ compressed) of each token, nats; float32 [windows, length]. ``None`` where no dense model is known."""

    agreement: "Tensor | None"
    """Whether both models hold the same next token for the most probable one; bool [windows, length]."""


class Subject(NamedTuple):
    """What a benchmark is given."""

    model: "PreTrainedModel"
    tokenizer: "PreTrainedTokenizerBase"
    dense: "PreTrainedModel | None"
    """The model it was compressed from, for ``kl``."""

    text: "TokenBlock | None" = None
    """The windows of held-out text, for the benchmarks that need text."""

    passes: dict[str, WindowScores] | None = None
    """What was measured on these windows already: two benchmarks of one text share a forward pass."""

    outcomes: "Outcomes | None" = None
    """Filled with what the model made of each item, where somebody wants it."""

    def keep(self, benchmark: str, outcomes: "list[Outcome]") -> None:
        """Hand over what the model made of each item."""
        if self.outcomes is not None:
            self.outcomes[benchmark] = outcomes


Measure = Callable[[Subject, EvaluationConfig], "Sequence[Score]"]


@dataclass(frozen=True, slots=True)
class Benchmark:
    """A registered benchmark."""

    name: str
    reference: str
    needs_dense: bool
    needs_text: bool
    files: tuple[str, ...]
    """What it is read from, in the data folder."""

    measure: Measure
    about_names: bool = False
    """Whether the subjects of its items are names in the model's language, whose commonness can be asked."""

    contents: Callable[[EvaluationConfig], str | None] | None = None
    """Identity of what is asked under a configuration, where ``files`` do not say it; ``None`` where nobody knows it."""

    @property
    def summary(self) -> str:
        """First line of the benchmark's docstring."""
        return (self.measure.__doc__ or "").strip().splitlines()[0]


BENCHMARKS: Registry[Benchmark] = Registry("benchmark", "fasc.evaluation.benchmarks")
"""Every registered benchmark by name."""


def benchmark(
    name: str,
    *,
    reference: str,
    needs_dense: bool = False,
    needs_text: bool = False,
    files: tuple[str, ...] = (),
    about_names: bool = False,
) -> Callable[[Measure], Measure]:
    """Register ``measure(subject, config) → scores`` as a benchmark; the first score is its headline.

    Args:
        name: as given to ``--benchmarks``.
        reference: paper or data set.
        needs_dense: whether the dense model is needed beside the one being scored.
        needs_text: whether it is measured on the evaluation corpus.
        files: what it is read from, as paths in the data folder; looked for before anything is run.
        about_names: whether the subjects of its items are names in the model's language.
    """

    def register(measure: Measure) -> Measure:
        BENCHMARKS.add(name, Benchmark(name, reference, needs_dense, needs_text, files, measure, about_names))
        return measure

    return register


def get_benchmark(name: str) -> Benchmark:
    """The benchmark of that name: ours, or, as ``harness/NAME`` or where we have none of the name, lm-evaluation-harness's.

    Raises:
        UnknownNameError: there is none; suggests the nearest.
        UsageError: it is the harness's, and that is not installed.
    """
    if name.startswith("harness/") or (name not in BENCHMARKS and name in THEIRS):
        from fasc.evaluation.harness import harness_benchmark  # noqa: PLC0415 - an extra

        return harness_benchmark(f"harness/{name.removeprefix('harness/')}")
    return BENCHMARKS.find(name)


THEIRS = frozenset(
    ("gsm8k", "triviaqa", "truthfulqa_mc1", "truthfulqa_mc2", "boolq", "openbookqa", "social_iqa", "mmlu_pro", "ifeval")
)
"""Tasks that only the harness has, known without its prefix."""
