"""A checkpoint → files of another engine."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from fasc.errors import UnknownNameError
from fasc.model.load import LoadedModel
from fasc.model.options import ModelConfig
from fasc.stages.compress import load


@dataclass(frozen=True, slots=True)
class Format:
    """What can be written."""

    suffix: str
    folder: bool
    write: Callable[[PreTrainedModel, PreTrainedTokenizerBase, Path, str], str]
    """Model, tokenizer, place, name ↦ a sentence on what was written."""


def _gguf(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, out: Path, name: str) -> str:
    from fasc.serving.llama_cpp import export_gguf  # noqa: PLC0415 - the gguf package is read when it is needed

    graph = export_gguf(model, tokenizer, out, name)
    return f"graph `{graph.name}`, {out.stat().st_size / 1e6:,.0f} MB; run it with `llama-cli -m {out}`"


FORMATS: Mapping[str, Format] = {
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


def export_model(source: ModelConfig | LoadedModel, form: str, out: Path) -> str:
    """Write a model in the form of another engine.

    Args:
        source: a checkpoint of ours, any dense model, or a loaded one.
        form: of :data:`FORMATS`.
        out: file or folder.

    Returns:
        A sentence on what was written.

    Raises:
        UnknownNameError: there is no such format.
        UsageError: the engine cannot hold the model; the hint names the option that makes a plan which fits.
    """
    usual_name(form, "")
    loaded = source if isinstance(source, LoadedModel) else load(source)
    name = source.model if isinstance(source, ModelConfig) else ""
    return FORMATS[form].write(loaded.model, loaded.tokenizer, out, Path(name).name)
