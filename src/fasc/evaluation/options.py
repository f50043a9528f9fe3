"""How a checkpoint is scored and timed."""

from pathlib import Path
from typing import Annotated

from pydantic import Field, NonNegativeInt, PositiveInt

from fasc.options import Options


class EvaluationConfig(Options):
    """How a checkpoint is scored."""

    benchmarks: tuple[str, ...] = ("facts", "kl", "perplexity")
    """Registered benchmarks."""

    corpus: str = "wikitext2"
    """The text of `perplexity` and `kl`: a named corpus, `self` or a file, or several separated by commas."""

    limit: PositiveInt | None = None
    """At most so many items (or sequences of text) per benchmark."""

    shots: NonNegativeInt | None = None
    """Worked examples before each question, where a benchmark has them; each has its own default."""

    windows: PositiveInt | None = None
    """At most so many windows of text, where that should differ from `limit`."""

    context: Annotated[int, Field(ge=2)] = 512
    """Tokens of context of `perplexity` and `kl`; windows do not overlap."""

    batch_tokens: PositiveInt = 2048
    """Tokens per forward pass: memory against speed, no effect on the scores."""

    seed: Annotated[int, Field(ge=0, lt=2**63)] = 1
    """Seed of the choice of items under a limit, and of evaluation text sampled from the model."""

    data_dir: Path | None = None
    """Folder that holds the named corpora and benchmarks. Also read from FASC_DATA."""

    prompts: tuple[str, ...] = ()
    """In a run: each model continues these, greedily."""

    continuation: PositiveInt = 24
    """Tokens of each continuation."""

    speed: bool = False
    """In a run: each compressed model is timed beside the dense one."""

    @property
    def corpora(self) -> tuple[str, ...]:
        """The texts, one by one."""
        return tuple(part.strip() for part in self.corpus.split(",") if part.strip())


class SpeedConfig(Options):
    """How two models are timed."""

    prefill: Annotated[int, Field(ge=2)] = 512
    """Tokens of the prompt whose forward pass is timed."""

    prompt: PositiveInt = 32
    """Tokens before the decoding that is timed."""

    decode: PositiveInt = 32
    """Tokens decoded, greedily."""

    batches: Annotated[tuple[PositiveInt, ...], Field(min_length=1)] = (1, 4)
    """Sequences decoded at once; each is timed."""

    repeats: PositiveInt = 5
    """Rounds: in each both models are timed, one after the other."""
