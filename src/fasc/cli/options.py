"""The options that several verbs share, with help and defaults taken from the recipe's own fields."""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

import typer
from pydantic import BaseModel, ValidationError

from fasc.errors import UsageError
from fasc.evaluation.options import EvaluationConfig
from fasc.model.options import LayersConfig, ModelConfig
from fasc.options import explain
from fasc.planning.options import BudgetConfig, MethodConfig
from fasc.statistics.options import CalibrationConfig

if TYPE_CHECKING:
    from fasc.reporting.page.sources import Source

Part = TypeVar("Part", bound=BaseModel)


def option(part: type[BaseModel], field: str, *flags: str) -> Any:
    """A typer option whose help and default are those of a recipe field. Unset means the recipe's default."""
    info = part.model_fields[field]
    default = info.default
    shown = ",".join(map(str, default)) if isinstance(default, tuple) else default
    if isinstance(shown, bool):
        shown = "on" if shown else "off"
    words = (info.description or "").replace("\n", " ")
    return typer.Option(*flags, help=f"{words} [default: {shown}]" if shown not in (None, "") else words, show_default=False)


def build(part: type[Part], **values: Any) -> Part:
    """The recipe part from the options that were given.

    Raises:
        UsageError: a value is out of range; names the option.
    """
    try:
        return part(**{key: value for key, value in values.items() if value is not None})
    except ValidationError as problem:
        first = problem.errors()[0]
        reason, place = first["msg"].removeprefix("Value error, "), first["loc"]
        if place:
            reason = f"--{str(place[0]).replace('_', '-')}: {reason}"
        else:  # a check of the whole part names its fields as the recipe does
            for field in part.model_fields:
                reason = re.sub(rf"\b{field}\b", "--" + field.replace("_", "-"), reason)
        raise UsageError(reason, explain(problem, "").hint) from problem


def take(part: type[Part], given: Mapping[str, Any], **others: Any) -> Part:
    """:func:`build` from a verb's own arguments, by name.

    Args:
        part: of the recipe.
        given: the verb's ``locals()``; arguments that are no fields of the part are passed over.
        others: fields that the verb calls by another name, or has changed.
    """
    return build(part, **{key: given[key] for key in part.model_fields if key in given and key not in others}, **others)


def names(text: str | None) -> tuple[str, ...] | None:
    """``a,b`` → ``("a", "b")``."""
    if text is None:
        return None
    found = tuple(part.strip() for part in text.split(",") if part.strip())
    if not found:
        raise UsageError("an empty list of names was given", "separate names by commas: a,b")
    return found


def own_options(given: list[str] | None, damping: float | None = None) -> dict[str, Any]:
    """``["reading=oblique"]`` → ``{"reading": "oblique"}``: the options that a method declares itself."""
    options: dict[str, Any] = {} if damping is None else {"damping": damping}
    for text in given or ():
        name, equals, value = text.partition("=")
        if not equals or not name.strip():
            raise UsageError(f"--method-option is `{text}`", "give name=value, such as reading=oblique")
        options[name.strip().replace("-", "_")] = value.strip()
    return options


def method(given: Mapping[str, Any], name: str | None = None, **others: Any) -> MethodConfig:
    """The method from a verb's own arguments, with its own options."""
    own = own_options(given.get("method_option"), given.get("damping"))
    lists = {field: names(given.get(field)) for field in ("layouts", "bits")}
    return take(MethodConfig, given, name=name or given.get("method"), **lists, **own, **others)


def method_for(given: Mapping[str, Any]) -> MethodConfig:
    """:func:`method`, restricted to what the engine of ``--for`` can run."""
    from fasc.serving.presets import for_engine

    return for_engine(given.get("engine"), method(given))


def budget_for(given: Mapping[str, Any]) -> BudgetConfig:
    """The budget from a verb's own arguments, with what the engine of ``--for`` wants."""
    from fasc.serving.presets import budget_for_engine

    return budget_for_engine(given.get("engine"), take(BudgetConfig, given))


def seeds(text: str) -> list[int]:
    """``0,1`` → ``[0, 1]``, each once.

    Raises:
        UsageError: a part is no whole number from 0 to 2⁶³ − 1, or there is none.
    """
    parts = names(text) or ()
    wrong = next((part for part in parts if not (part.isascii() and part.isdigit()) or int(part) >= 2**63), None)
    if wrong is not None or not parts:
        raise UsageError(f"--seeds: `{text if wrong is None else wrong}` is no seed", "give whole numbers from 0 on, such as 0,1")
    return list(dict.fromkeys(int(part) for part in parts))


def fractions(text: str, field: str) -> list[BudgetConfig]:
    """Budgets from numbers separated by commas; ``none`` gives none.

    Args:
        text: as typed.
        field: of the budget, `rank_fraction` or `param_fraction`.
    """
    return [] if text.strip() == "none" else [build(BudgetConfig, **{field: part}) for part in names(text) or ()]


def unused(given: Mapping[str, Any], options: Sequence[str], why: str, *, when: bool) -> None:
    """Refuse options that would be passed over.

    Args:
        given: the verb's ``locals()``; an option that was not typed is ``None`` there.
        options: which ones, by the names of the arguments; those that the verb has not are not looked at.
        why: `without --benchmarks`, `beside --checkpoints`.
        when: whether that is so.

    Raises:
        UsageError: one was typed.
    """
    typed = next((name for name in options if when and given.get(name) is not None), None)
    if typed is not None:
        option = f"--{typed.replace('_', '-')}"
        raise UsageError(f"{option} means nothing {why}", f"leave {option} out")


def check_files(*files: Path | None, inputs: Sequence[str | Path | None], kind: str = "") -> None:
    """Refuse a file that cannot be written, that the command reads, writes twice, or that is not ours, before the work.

    Args:
        *files: the one for JSON first.
        inputs: what the command reads.
        kind: of the JSON; a result of another kind is not replaced.
    """
    from fasc.outputs import require_own_file, require_same_kind

    if kind and files[0] is not None:
        require_same_kind(files[0].expanduser(), kind)
    places = [require_own_file(file, inputs=inputs) for file in files if file is not None]
    twice = next((place for place in places if places.count(place) > 1), None)
    if twice is not None:
        raise UsageError(f"two results would go to `{twice}`", "give each a name of its own")


def check_report(
    file: Path | None,
    *,
    inputs: Sequence[str | Path | None],
    out: Path | None = None,
    beside: Sequence[Path | None] = (),
) -> None:
    """Refuse a page that could not be written, before the work.

    Args:
        file: the page, if one is asked for.
        inputs: what the command reads.
        out: the folder that the command writes, in which nothing else may lie.
        beside: other files that the command writes.
    """
    if file is None:
        return
    from fasc.reporting.page.vega import library

    library()
    check_files(file, *beside, inputs=inputs)
    if out is not None and out.resolve() in file.resolve().parents:
        raise UsageError(f"--report is `{file}`, inside --out", "a checkpoint's folder holds nothing else: choose another place")


def write_report(file: Path, source: "Source") -> None:
    """Write the page of a verb's own result, and say where it is."""
    from fasc.reporting.console import print_line
    from fasc.reporting.page.write import write_page

    print_line(write_page(file, [source]))


Model = Annotated[str, typer.Argument(metavar="MODEL", help="Hub id, Hugging Face folder, .gguf file or `smollm2-135m`.")]
Out = Annotated[Path, typer.Option("--out", help="Where the result goes.", show_default=False)]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace an existing result, after the new one is complete.")]
Json = Annotated[Path | None, typer.Option("--json", help="Also write the result as JSON to this file.", show_default=False)]
Nproc = Annotated[
    int | None,
    typer.Option(
        "--nproc",
        min=1,
        help="Share the work among so many processes of this machine, as torchrun does. [default: 1]",
        show_default=False,
    ),
]
Report = Annotated[
    Path | None, typer.Option("--report", help="Also write the result as a page (HTML) to this file.", show_default=False)
]
Device = Annotated[str | None, option(ModelConfig, "device", "--device")]
DeviceMapName = Annotated[str | None, option(ModelConfig, "device_map", "--device-map")]
DTypeName = Annotated[str | None, option(ModelConfig, "dtype", "--dtype")]

Corpus = Annotated[str | None, option(CalibrationConfig, "corpus", "--corpus")]
Skip = Annotated[int | None, option(CalibrationConfig, "skip", "--skip")]
HeldOutFile = Annotated[
    Path | None,
    typer.Option(
        "--held-out",
        help="Forecast by these moments of other text (from `fasc collect --skip`), and allocate by that.",
        show_default=False,
    ),
]
Sequences = Annotated[int | None, option(CalibrationConfig, "sequences", "--sequences")]
SequenceLength = Annotated[int | None, option(CalibrationConfig, "sequence_length", "--sequence-length")]
Seed = Annotated[int | None, option(CalibrationConfig, "seed", "--seed")]
LabelsName = Annotated[str | None, option(CalibrationConfig, "labels", "--labels")]
DataDir = Annotated[Path | None, option(CalibrationConfig, "data_dir", "--data-dir")]
BatchTokens = Annotated[int | None, option(CalibrationConfig, "batch_tokens", "--batch-tokens")]
Checkpointing = Annotated[
    bool | None,
    option(CalibrationConfig, "gradient_checkpointing", "--gradient-checkpointing/--no-gradient-checkpointing"),
]
MixedCalibration = Annotated[
    bool | None,
    option(CalibrationConfig, "mixed_precision", "--mixed-precision/--no-mixed-precision"),
]
ExpertFloor = Annotated[int | None, option(CalibrationConfig, "expert_floor", "--expert-floor")]
RouteAll = Annotated[bool | None, option(CalibrationConfig, "route_all", "--route-all/--no-route-all")]
ChatTemplate = Annotated[
    bool | None,
    option(CalibrationConfig, "chat_template", "--chat-template/--no-chat-template"),
]
Include = Annotated[list[str] | None, option(LayersConfig, "include", "--include")]
Exclude = Annotated[list[str] | None, option(LayersConfig, "exclude", "--exclude")]

MethodName = Annotated[str | None, option(MethodConfig, "name", "--method")]
Methods = Annotated[
    str | None, typer.Option("--methods", help="Methods, separated by commas. [default: fasc,svd]", show_default=False)
]
Damping = Annotated[
    float | None,
    typer.Option(
        "--damping",
        min=0,
        help="Added to a covariance before it is inverted, as a multiple of its mean eigenvalue. [default: 0.0001]",
        show_default=False,
    ),
]
MethodOption = Annotated[
    list[str] | None,
    typer.Option(
        "--method-option",
        metavar="NAME=VALUE",
        help="An option that the method declares itself, such as reading=oblique; may be repeated.",
        show_default=False,
    ),
]
Allocation = Annotated[str | None, option(MethodConfig, "allocation", "--allocation")]
Layouts = Annotated[str | None, option(MethodConfig, "layouts", "--layouts")]
Bits = Annotated[str | None, option(MethodConfig, "bits", "--bits")]
BitsVocabulary = Annotated[bool | None, option(MethodConfig, "bits_vocabulary", "--bits-vocabulary")]
BitsGroup = Annotated[int | None, option(MethodConfig, "bits_group", "--bits-group")]
Engine = Annotated[
    str | None,
    typer.Option(
        "--for",
        metavar="ENGINE",
        help="Plan what an engine can run: transformers, vllm, llama.cpp, block-configs, or plain: an ordinary checkpoint of one "
        "MLP width.",
        show_default=False,
    ),
]
Propagate = Annotated[bool | None, option(MethodConfig, "propagate", "--propagate/--no-propagate")]
Selection = Annotated[str | None, option(MethodConfig, "selection", "--selection")]
SelectionThreshold = Annotated[float | None, option(MethodConfig, "selection_threshold", "--selection-threshold")]
SelectionShare = Annotated[float | None, option(MethodConfig, "selection_share", "--selection-share")]
SelectionElse = Annotated[str | None, option(MethodConfig, "selection_else", "--selection-else")]

RankFraction = Annotated[float | None, option(BudgetConfig, "rank_fraction", "--rank-fraction")]
ParamFraction = Annotated[float | None, option(BudgetConfig, "param_fraction", "--param-fraction")]
ModelFraction = Annotated[float | None, option(BudgetConfig, "model_fraction", "--model-fraction")]
MaxBytes = Annotated[str | None, option(BudgetConfig, "max_bytes", "--max-bytes")]
MaxPerplexityIncrease = Annotated[str | None, option(BudgetConfig, "max_perplexity_increase", "--max-perplexity-increase")]
MaxKl = Annotated[float | None, option(BudgetConfig, "max_kl", "--max-kl")]
FlopFraction = Annotated[float | None, option(BudgetConfig, "flop_fraction", "--flop-fraction")]
RankMultiple = Annotated[int | None, option(BudgetConfig, "rank_multiple", "--rank-multiple")]
ChannelMultiple = Annotated[int | None, option(BudgetConfig, "channel_multiple", "--channel-multiple")]
EqualExperts = Annotated[bool | None, option(BudgetConfig, "equal_experts", "--equal-experts/--no-equal-experts")]
Overhead = Annotated[int | None, option(BudgetConfig, "overhead", "--overhead")]
Floor = Annotated[float | None, option(BudgetConfig, "floor", "--floor")]

Benchmarks = Annotated[str | None, option(EvaluationConfig, "benchmarks", "--benchmarks")]
StatisticsFile = Annotated[
    Path | None,
    typer.Option("--statistics", help="Use these moments (from `fasc collect`) and do no calibration.", show_default=False),
]
