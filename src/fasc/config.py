"""What a run was told: the recipe. The only place where a default is written."""

import tomllib
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, Field, PositiveInt, ValidationError, model_validator

from fasc.errors import UsageError

Labels = Literal["corpus", "sampled"]
DType = Literal["auto", "float32", "bfloat16", "float16"]


class _Part(BaseModel, frozen=True, extra="forbid", use_attribute_docstrings=True):
    pass


class CalibrationConfig(_Part):
    """Which text the statistics are measured on, and how."""

    corpus: str = "self"
    """`self` (text sampled from the model), `wikitext2`, `c4`, `alpaca`, or a .txt/.jsonl/.jsonl.gz file or folder."""

    sequences: PositiveInt = 128
    """How many calibration sequences."""

    sequence_length: Annotated[int, Field(ge=2)] = 128
    """Tokens per sequence."""

    seed: Annotated[int, Field(ge=0)] = 0
    """Seed of the choice of sequences, of the text sampled from the model and of sampled labels."""

    labels: Labels = "corpus"
    """Whose next token the gradients explain: `corpus` (empirical Fisher) or `sampled` from the model (true Fisher)."""

    data_dir: Path | None = None
    """Folder that holds the named corpora; the hub is asked otherwise. Also read from FASC_DATA."""

    batch_tokens: PositiveInt = 256
    """Tokens per forward and backward pass: memory against speed, no effect on the result."""

    gradient_checkpointing: bool = False
    """Recompute each block in the backward pass: less memory, about a third more time."""


class MethodConfig(_Part):
    """Which subspaces are kept."""

    name: str = "fasc"
    """A registered method."""

    damping: Annotated[float, Field(ge=0)] = 1e-4
    """Added to a covariance before it is inverted, as a multiple of its mean eigenvalue."""

    reading: Literal["orthonormal", "oblique"] = "orthonormal"
    """How `fasc-eq6` makes a projector of the paper's eigenvectors."""


class BudgetConfig(_Part):
    """How much is kept."""

    rank_fraction: float = 0.5
    """Rank ÷ min(d_in, d_out) of each layer; for a group of several layers with one projector, rank ÷ d_in."""

    @model_validator(mode="after")
    def _in_range(self) -> Self:
        if not 0 < self.rank_fraction <= 1:
            raise ValueError(f"rank_fraction is {self.rank_fraction:g}, outside (0, 1]")
        return self


class LayersConfig(_Part):
    """Which layers are compressed, by shell patterns on their qualified names."""

    include: tuple[str, ...] = ("*",)
    """Layers to compress; the output head and layers outside the blocks are never compressed."""

    exclude: tuple[str, ...] = ()
    """Layers to leave as they are."""


class EvaluationConfig(_Part):
    """How a checkpoint is scored."""

    benchmarks: tuple[str, ...] = ("facts", "kl", "perplexity")
    """Registered benchmarks."""

    corpus: str = "wikitext2"
    """The text of `perplexity` and `kl`: a named corpus, `self` or a file."""

    limit: PositiveInt | None = None
    """At most so many items (or sequences of text) per benchmark."""

    windows: PositiveInt | None = None
    """At most so many windows of text, where that should differ from `limit`."""

    context: Annotated[int, Field(ge=2)] = 512
    """Tokens of context of `perplexity` and `kl`; windows do not overlap."""

    batch_tokens: PositiveInt = 2048
    """Tokens per forward pass: memory against speed, no effect on the scores."""

    seed: Annotated[int, Field(ge=0)] = 1
    """Seed of the choice of items under a limit, and of evaluation text sampled from the model."""

    data_dir: Path | None = None
    """Folder that holds the named corpora and benchmarks. Also read from FASC_DATA."""


class ModelConfig(_Part):
    """Which model, and how it is loaded."""

    model: str = "smollm2-135m"
    """A hub id, a Hugging Face folder, a .gguf file, or the alias `smollm2-135m`."""

    dtype: DType = "auto"
    """Precision of the weights; `auto` takes the checkpoint's."""

    device: str = "auto"
    """`cpu`, `cuda`, `cuda:1`, …; `auto` takes a GPU where there is one."""


class Recipe(_Part):
    """Everything a run was told."""

    source: ModelConfig = ModelConfig()
    """The model."""

    calibration: CalibrationConfig = CalibrationConfig()
    """The text and how the statistics are measured."""

    layers: LayersConfig = LayersConfig()
    """Which layers."""

    methods: Annotated[tuple[MethodConfig, ...], Field(min_length=1)] = (MethodConfig(),)
    """One checkpoint is made for each method and budget."""

    budgets: Annotated[tuple[BudgetConfig, ...], Field(min_length=1)] = (BudgetConfig(),)
    """How much is kept; each method is run at each budget, from the same statistics."""

    evaluation: EvaluationConfig = EvaluationConfig()
    """How the checkpoints and the dense model are scored."""

    def to_dict(self) -> dict[str, Any]:
        """The recipe as plain JSON/TOML values, unset ones left out."""
        return self.model_dump(mode="json", exclude_none=True)


def explain(problem: ValidationError, where: str) -> UsageError:
    """Turn pydantic's report into one line: where, which field, what is wrong."""
    first = problem.errors()[0]
    field = ".".join(str(part) for part in first["loc"]) or "recipe"
    reason = first["msg"].removeprefix("Value error, ")
    hint = "see `fasc --help` or docs/quickstart.md for the fields and their ranges"
    if "outside (0, 1]" in reason:
        hint = "0.5 keeps half the rank of every layer; 1 keeps all of it"
    if first["type"] == "extra_forbidden":
        reason = "no such field"
    return UsageError(f"{where}: `{field}`: {reason}", hint)


def read_recipe(path: Path) -> Recipe:
    """Read a recipe from TOML.

    Raises:
        UsageError: missing file, invalid TOML (names the line), unknown key or value out of range (names the field).
    """
    try:
        raw = tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as problem:
        raise UsageError(f"recipe `{path}` does not exist", "recipes/ holds examples") from problem
    except IsADirectoryError as problem:
        raise UsageError(f"recipe `{path}` is a folder", "name the .toml file") from problem
    except UnicodeDecodeError as problem:
        raise UsageError(f"recipe `{path}`: not UTF-8 (byte {problem.start})", "save the file as UTF-8") from problem
    except tomllib.TOMLDecodeError as problem:
        raise UsageError(f"recipe `{path}`: not valid TOML: {problem}", "recipes/ holds examples") from problem
    try:
        return Recipe.model_validate(raw)
    except ValidationError as problem:
        raise explain(problem, f"recipe `{path}`") from problem
