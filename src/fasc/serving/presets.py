"""What a plan may do so that an engine can run the result: what ``--for`` stands for."""

from collections.abc import Mapping
from dataclasses import dataclass

from fasc.errors import UnknownNameError, UsageError
from fasc.planning.options import MethodConfig


@dataclass(frozen=True, slots=True)
class Preset:
    """Options of a plan."""

    layouts: tuple[str, ...] | None
    """As in ``--layouts``; ``None`` leaves it open."""

    allocation: str | None = None
    merged: bool = False
    """Whether the checkpoint is an ordinary one, which loads without fasc."""

    then: str = ""
    """What a user does with the checkpoint."""


PRESETS: Mapping[str, Preset] = {
    "transformers": Preset(None, then="AutoModelForCausalLM.from_pretrained, where fasc is installed"),
    "vllm": Preset(("dense", "channels"), then="`vllm serve`, where fasc is installed"),
    "llama.cpp": Preset(("dense", "channels"), then="`fasc export --format gguf`"),
    "plain": Preset(("dense", "channels"), allocation="uniform", merged=True, then="any program that reads the architecture"),
}
"""By engine. Only MLP widths differ from block to block for vLLM and llama.cpp; for `plain` one width holds for all blocks."""


NOT_IN_VLLM = frozenset({"heads", "values", "skip", "vocabulary"})
"""Edits after which a block has a cache of its own shape, or none, or the model another embedding."""


def for_engine(name: str | None, options: MethodConfig) -> MethodConfig:
    """A method's options restricted to what an engine can run; unchanged without an engine.

    Raises:
        UnknownNameError: there is no such engine.
        UsageError: the options say something else than the preset.
    """
    if name is None:
        return options
    if name not in PRESETS:
        raise UnknownNameError("engine", name, PRESETS)
    preset = PRESETS[name]
    asked = {key: getattr(preset, key) for key in ("layouts", "allocation") if getattr(preset, key) is not None}
    for key, value in asked.items():
        if getattr(options, key) not in (None, value):
            raise UsageError(f"--for {name} chooses --{key} itself", f"leave --{key} or --for out")
    return options.but(**asked)


def is_merged(name: str | None) -> bool:
    """Whether an engine wants an ordinary checkpoint."""
    return name is not None and name in PRESETS and PRESETS[name].merged
