"""What a run was told: the recipe. The only place where a default is written."""

import tomllib
from math import log1p
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, Field, NonNegativeInt, PositiveInt, ValidationError, model_validator

from fasc.errors import UsageError

Labels = Literal["corpus", "sampled"]
LayoutName = Literal["dense", "factors", "shared", "pivoted", "pivoted-columns", "channels", "merged"]
AllocationName = Literal["uniform", "fisher"]
GateName = Literal["none", "rho", "predicted", "kl"]
DType = Literal["auto", "float32", "bfloat16", "float16"]


class _Part(BaseModel, frozen=True, extra="forbid", use_attribute_docstrings=True):
    pass


class CalibrationConfig(_Part):
    """Which text the statistics are measured on, and how."""

    corpus: str = "self"
    """`self` (text sampled from the model), `wikitext2`, `c4`, `alpaca`, a .txt/.jsonl/.jsonl.gz file or folder, or
    facts as sentences: `facts`, `negated-facts`, `lama`, `negated-lama`. Several, separated by commas, take turns;
    one that is named twice has two."""

    sequences: PositiveInt = 128
    """How many calibration sequences."""

    sequence_length: Annotated[int, Field(ge=2)] = 128
    """Tokens per sequence."""

    skip: Annotated[int, Field(ge=0)] = 0
    """Sequences of the draw that are passed over: moments of held-out text are those after the sequences that calibrate."""

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

    mixed_precision: bool = False
    """The model multiplies in bfloat16, where the processor has that; moments are still summed in float32."""


class MethodConfig(_Part):
    """Which subspaces are kept."""

    name: str = "fasc"
    """A registered method. Subspaces: `fasc`, `two-sided`, `whitened`, `svd`, `fasc-eq6`, `grad-weighted`, `fisher-diag`,
    `fwsvd`, `asvd`, `weight-svd`. Pruning, without a rank: `magnitude` and `wanda` write zeros, `llm-pruner` removes heads and
    channels."""

    damping: Annotated[float, Field(ge=0)] = 1e-4
    """Added to a covariance before it is inverted, as a multiple of its mean eigenvalue."""

    reading: Literal["orthonormal", "oblique"] = "orthonormal"
    """How `fasc-eq6` makes a projector of the paper's eigenvectors."""

    allocation: AllocationName | None = None
    """`uniform`: the same share of every layer. `fisher`: the least forecast loss over all layers and layouts. Left out: `fisher`
    where the method's energies are a loss in nats and the budget is no rank fraction, `uniform` elsewhere."""

    layouts: Annotated[tuple[LayoutName, ...], Field(min_length=1)] = (
        "dense",
        "factors",
        "shared",
        "pivoted",
        "pivoted-columns",
        "channels",
    )
    """How layers may be stored; the cheapest allowed one is taken at each rank. `factors` allows separate layers and `shared` one
    projector per group, where the method leaves that open; `pivoted` keeps rows of the product as they are and `pivoted-columns`
    columns; `channels` allows an MLP fewer channels, under `fisher`; `merged` stores a rank that saves nothing as one
    dense matrix."""

    propagate: bool = False
    """Compress block by block, each from the inputs it will really get, against the dense model's outputs."""

    gate: GateName = "none"
    """Which method each unit gets: `none`: this one everywhere. `rho`: this one where ρ is above the threshold, else the other
    (the paper's). `predicted`: the one with the lower forecast loss. `kl`: the one with the lower measured KL divergence on
    held-out text, compressing one unit at a time."""

    gate_threshold: Annotated[float, Field(ge=0)] = 0.3
    """Of ρ, for the gate `rho`."""

    gate_else: str = "svd"
    """The other method of a gate."""

    sketch: bool = False
    """Solve `fasc`, `two-sided` and `fasc-eq6` from a randomised sketch where it can be shown to be good enough."""

    sketch_tolerance: Annotated[float, Field(ge=0)] = 0.02
    """Largest share of the dropped energy that a sketch may have lost; beyond it the unit is solved exactly."""

    label: str | None = None
    """Name of the row in a run's tables, where the method's own would not tell two rows apart."""


class BudgetConfig(_Part):
    """How much is kept: exactly one of the fields down to `max_kl`."""

    rank_fraction: float | None = None
    """Rank ÷ min(d_in, d_out) of each layer; for a group of several layers with one projector, rank ÷ d_in. 0.5 if no budget is
    given."""

    param_fraction: float | None = None
    """Parameters of the compressed layers ÷ their dense parameters."""

    model_fraction: float | None = None
    """Parameters of the whole model ÷ those of the dense model."""

    max_bytes: Annotated[int | str, Field(union_mode="left_to_right")] | None = None
    """Bytes of the weights file, at most: a number, or one with kB, MB, GB, KiB, MiB, GiB."""

    max_perplexity_increase: Annotated[float | str, Field(union_mode="left_to_right")] | None = None
    """The smallest model whose forecast perplexity is at most so much above the dense one's: `5%` or 0.05."""

    max_kl: Annotated[float, Field(gt=0)] | None = None
    """The smallest model whose forecast KL divergence to the dense one is at most so many nats per token."""

    rank_multiple: PositiveInt = 8
    """Ranks are multiples of this, in layers at least sixteen times as wide."""

    channel_multiple: PositiveInt | None = None
    """Numbers of channels that MLPs keep are multiples of this; left out: of the rank multiple, at most 24 of them to choose
    from. Products whose sizes are multiples of 256 are a third faster on some processors (docs/log.md)."""

    floor: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Share of its dense parameters that each layer keeps at least."""

    overhead: NonNegativeInt = 0
    """Under `fisher`, how many parameters the time of one product is worth: factoring a layer, which makes one more, must beat
    other savings by as much. The budget stays what it is. 32768 to 65536 make small models faster, for some quality
    (docs/results.md)."""

    @model_validator(mode="before")
    @classmethod
    def _one_budget(cls, given: Any) -> Any:
        if isinstance(given, dict):
            asked = [name for name in _BUDGETS if given.get(name) is not None]
            if len(asked) > 1:
                raise ValueError(f"{' and '.join(asked)} are both budgets: give one")
            if not asked:
                return {**given, "rank_fraction": 0.5}
        return given

    @model_validator(mode="after")
    def _in_range(self) -> Self:
        for name in ("rank_fraction", "param_fraction", "model_fraction"):
            value = getattr(self, name)
            if value is not None and not 0 < value <= 1:
                raise ValueError(f"{name} is {value:g}, outside (0, 1]")
        if self.max_bytes is not None and self.bytes_limit <= 0:
            raise ValueError(f"max_bytes is {self.max_bytes}, not above 0")
        if self.max_perplexity_increase is not None and not self.loss_limit > 0:
            raise ValueError(f"max_perplexity_increase is {self.max_perplexity_increase}, not above 0")
        return self

    @property
    def kind(self) -> str:
        """Name of the field that was given."""
        return next(name for name in _BUDGETS if getattr(self, name) is not None)

    @property
    def limits_loss(self) -> bool:
        """Whether the budget says how much may be lost, and not how much is kept."""
        return self.kind in ("max_kl", "max_perplexity_increase")

    @property
    def label(self) -> str:
        """Short name, for folders and rows: `0.5`, `params0.8`, `model0.8`, `400MB`, `ppl+5%`, `kl0.05`.

        What else is not as usual follows: `params0.8-floor0.25`.
        """
        short = {"rank_fraction": "", "param_fraction": "params", "model_fraction": "model", "max_bytes": ""}
        value = getattr(self, self.kind)
        number = f"{value:g}" if isinstance(value, float) else str(value).replace(" ", "")
        fields = {"floor": "floor", "multiple": "rank_multiple", "channels": "channel_multiple", "overhead": "overhead"}
        unusual = {name: getattr(self, field) for name, field in fields.items()}
        usual = {name: type(self).model_fields[field].default for name, field in fields.items()}
        rest = "".join(f"-{name}{value:g}" for name, value in unusual.items() if value != usual[name])
        return {**short, "max_perplexity_increase": "ppl+", "max_kl": "kl"}[self.kind] + number + rest

    @property
    def bytes_limit(self) -> int:
        """``max_bytes`` as a number."""
        text = str(self.max_bytes).strip()
        for unit, factor in _UNITS.items():
            if text.lower().endswith(unit.lower()):
                return int(_number(text[: -len(unit)], "max_bytes") * factor)
        return int(_number(text, "max_bytes"))

    @property
    def loss_limit(self) -> float:
        """The forecast loss that is allowed, in nats per token."""
        if self.max_kl is not None:
            return self.max_kl
        text = str(self.max_perplexity_increase).strip()
        percent = text.endswith("%")
        return log1p(_number(text.rstrip("%"), "max_perplexity_increase") / (100 if percent else 1))


_BUDGETS = ("rank_fraction", "param_fraction", "model_fraction", "max_bytes", "max_perplexity_increase", "max_kl")
_UNITS = {"KiB": 2**10, "MiB": 2**20, "GiB": 2**30, "kB": 1e3, "MB": 1e6, "GB": 1e9}


def _number(text: str, field: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise ValueError(f"{field}: `{text.strip()}` is no number") from None


class LayersConfig(_Part):
    """Which layers are compressed, by shell patterns on their qualified names."""

    include: tuple[str, ...] = ("*",)
    """Layers to compress; the output head and layers outside the blocks are never compressed."""

    exclude: tuple[str, ...] = ()
    """Layers to leave as they are."""


class RecoveryConfig(_Part):
    """How the replaced layers of a checkpoint are trained towards the dense model."""

    corpus: str | None = None
    """The text, as for calibration; several corpora, separated by commas, take turns. Left out: that of the calibration."""

    sequences: Annotated[int, Field(ge=2)] = 512
    """How many sequences; each is used once, and one in sixteen is held out to say how far to go."""

    sequence_length: Annotated[int, Field(ge=2)] = 128
    """Tokens per sequence."""

    batch_tokens: PositiveInt = 1024
    """Tokens per step."""

    learning_rate: Annotated[float, Field(gt=0)] = 3e-5
    """Of AdamW at its highest. At too high a rate nothing is gained: docs/results.md."""

    mixed_precision: bool = False
    """Multiply in bfloat16, where the processor has that; weights, steps and the divergence stay in float32."""

    seed: Annotated[int, Field(ge=0)] = 0
    """Seed of the choice of sequences and of their order."""

    data_dir: Path | None = None
    """Folder that holds the named corpora; the hub is asked otherwise. Also read from FASC_DATA."""


class EvaluationConfig(_Part):
    """How a checkpoint is scored."""

    benchmarks: tuple[str, ...] = ("facts", "kl", "perplexity")
    """Registered benchmarks."""

    corpus: str = "wikitext2"
    """The text of `perplexity` and `kl`: a named corpus, `self` or a file, or several separated by commas."""

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

    @property
    def corpora(self) -> tuple[str, ...]:
        """The texts, one by one."""
        return tuple(part.strip() for part in self.corpus.split(",") if part.strip())


class SpeedConfig(_Part):
    """How two models are timed."""

    prefill: Annotated[int, Field(ge=2)] = 512
    """Tokens of the prompt whose forward pass is timed."""

    prompt: PositiveInt = 32
    """Tokens before the decoding that is timed."""

    decode: PositiveInt = 32
    """Tokens decoded, greedily."""

    batches: Annotated[tuple[PositiveInt, ...], Field(min_length=1)] = (1, 8)
    """Sequences decoded at once; each is timed."""

    repeats: PositiveInt = 5
    """Rounds: in each both models are timed, one after the other."""


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

    recovery: RecoveryConfig | None = None
    """If given, a run also trains each compressed checkpoint towards the dense model and scores it as one more row."""

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
        hint = "0.5 keeps half; 1 keeps all of it"
    if "is no number" in reason:
        hint = "sizes look like 400MB or 380MiB, increases like 5% or 0.05"
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
