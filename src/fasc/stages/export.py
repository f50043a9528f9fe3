"""A checkpoint → files of another engine."""

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from fasc.edits.structure import structure_of
from fasc.errors import UnknownNameError, UsageError
from fasc.model.load import LoadedModel
from fasc.model.options import LayersConfig, ModelConfig
from fasc.planning.needs import OUTPUT_SCALE
from fasc.planning.options import BudgetConfig
from fasc.stages.calibrate import calibrate
from fasc.stages.compress import load
from fasc.stages.plan import fitted_statistics, stored_statistics
from fasc.statistics.moments import Need, Statistics
from fasc.statistics.options import CalibrationConfig
from fasc.storage import new_folder

if TYPE_CHECKING:
    from fasc.serving.tensor_types import TensorTypes

_NEEDS = frozenset({Need("input", "group"), OUTPUT_SCALE})
"""Moments by which types are chosen."""


@dataclass(frozen=True, slots=True)
class FewerBits:
    """How the matrices of a file are rounded: all to one type, or each to the type that a budget buys."""

    kind: str | None = None
    """One type for all."""

    budget: BudgetConfig | None = None
    """``max_bytes`` of the file, or ``max_kl``."""

    statistics: Path | Statistics | None = None
    """Moments, with the scale of the outputs."""

    calibration: CalibrationConfig | None = None
    """Text to measure them on, where there are none."""


@dataclass(frozen=True, slots=True)
class Format:
    """What can be written."""

    suffix: str
    folder: bool
    write: Callable[[LoadedModel, Path, str, FewerBits | None], str]
    """Model and tokenizer, place, name, rounding ↦ a sentence on what was written."""


def _gguf(loaded: LoadedModel, out: Path, name: str, bits: FewerBits | None) -> str:
    from fasc.serving.llama_cpp import export_gguf  # noqa: PLC0415 - the gguf package is read when it is needed

    types = None if bits is None else _types(loaded, bits)
    graph = export_gguf(loaded.model, loaded.tokenizer, out, name, types)
    said = "" if types is None else f"; {_in_words(types)}"
    return f"graph `{graph.name}`, {out.stat().st_size / 1e6:,.1f} MB{said}; run it with `llama-cli -m {out}`"


def _in_words(types: "TensorTypes") -> str:
    counts = Counter(kind.name for kind in types.kinds.values())
    loss = "" if types.predicted_loss is None else f", forecast KL {types.predicted_loss:.3g} nats per token"
    return ", ".join(f"{count} {name}" for name, count in counts.most_common()) + loss


def _types(loaded: LoadedModel, bits: FewerBits) -> "TensorTypes":
    from fasc.serving.ggml import type_named  # noqa: PLC0415 - as above
    from fasc.serving.llama_cpp import room_for_the_rest  # noqa: PLC0415 - as above
    from fasc.serving.tensor_types import TypeLosses, every_tensor_as  # noqa: PLC0415 - as above

    if bits.kind is not None and bits.budget is not None:
        raise UsageError("--type and a budget were both given", "give --type for one type, or a budget to have them chosen")
    statistics = _moments(loaded, bits)
    if bits.kind is not None:
        return every_tensor_as(loaded.model, type_named(bits.kind), statistics)
    if statistics is None:
        raise UsageError(
            "types are chosen by what they lose, and there are no moments to forecast it", "give --corpus or --statistics"
        )
    if bits.budget is None:
        raise UsageError("there is no budget to choose types by", "give --max-bytes, --max-kl or --type")
    if bits.budget.kind == "max_bytes":
        room = bits.budget.bytes_limit - room_for_the_rest(loaded.model, loaded.tokenizer)
        return TypeLosses.of(loaded.model, statistics).choose(max_bytes=room)
    return TypeLosses.of(loaded.model, statistics).choose(max_kl=bits.budget.loss_limit)


def _moments(loaded: LoadedModel, bits: FewerBits) -> Statistics | None:
    if bits.statistics is None and bits.calibration is None:
        return None
    if structure_of(loaded.model) is not None:
        raise UsageError(
            "moments are of dense models, and this one has layers of ours",
            "compress with `--for plain`: the result is an ordinary model, whose types can be chosen",
        )
    if isinstance(bits.statistics, Statistics):
        return fitted_statistics(bits.statistics, loaded.model)
    if bits.statistics is not None:
        return stored_statistics(bits.statistics, loaded.model)
    assert bits.calibration is not None  # noqa: S101 - one of the two was given
    return calibrate(loaded, _NEEDS, bits.calibration, LayersConfig())


def _block_configs(loaded: LoadedModel, out: Path, name: str, bits: FewerBits | None) -> str:
    from fasc.serving.block_configs import export_block_configs  # noqa: PLC0415 - as above

    if bits is not None:
        raise UsageError("block configs keep the model's precision", "leave --type, --max-bytes and --max-kl out")
    with new_folder(out) as scratch:
        blocks = export_block_configs(loaded.model, loaded.tokenizer, scratch)
    widths = sorted({block.width for block in blocks})
    return f"`DeciLMForCausalLM` of {len(blocks)} blocks, MLPs {widths[0]} to {widths[-1]} wide"


FORMATS: Mapping[str, Format] = {
    "block-configs": Format("-block-configs", folder=True, write=_block_configs),
    "gguf": Format(".gguf", folder=False, write=_gguf),
}


def usual_name(form: str, model: str) -> Path:
    """Where a result goes that is given no place.

    Raises:
        UnknownNameError: there is no such format.
    """
    if form not in FORMATS:
        raise UnknownNameError("format", form, FORMATS)
    return Path(Path(model).name.removesuffix(".gguf") + FORMATS[form].suffix)


def export_model(source: ModelConfig | LoadedModel, form: str, out: Path, bits: FewerBits | None = None) -> str:
    """Write a model in the form of another engine.

    Args:
        source: a checkpoint of ours, any dense model, or a loaded one.
        form: of :data:`FORMATS`.
        out: file or folder.
        bits: how matrices are rounded; without it they keep the model's precision.

    Returns:
        A sentence on what was written.

    Raises:
        UnknownNameError: there is no such format.
        UsageError: the engine cannot hold the model; the hint names the option that makes a plan which fits.
    """
    usual_name(form, "")
    loaded = source if isinstance(source, LoadedModel) else load(source)
    name = source.model if isinstance(source, ModelConfig) else ""
    return FORMATS[form].write(loaded, out, Path(name).name, bits)
