"""What a plan may do so that an engine can run the result: what ``--for`` stands for."""

from collections.abc import Mapping
from dataclasses import dataclass

from fasc.errors import UnknownNameError, UsageError
from fasc.planning.options import BudgetConfig, MethodConfig


@dataclass(frozen=True, slots=True)
class Preset:
    """Options of a plan."""

    layouts: tuple[str, ...] | None
    """As in ``--layouts``; ``None`` leaves it open."""

    allocation: str | None = None
    merged: bool = False
    """Whether the checkpoint is an ordinary one, which loads without fasc."""

    channel_multiple: int | None = None
    """What every width is a multiple of."""

    then: str = ""
    """What a user does with the checkpoint."""


PRESETS: Mapping[str, Preset] = {
    "transformers": Preset(None, then="AutoModelForCausalLM.from_pretrained, where fasc is installed"),
    "vllm": Preset(("dense", "channels"), then="`vllm serve`, where fasc is installed"),
    "llama.cpp": Preset(("dense", "channels"), then="`fasc export --format gguf`"),
    "block-configs": Preset(("dense", "channels"), channel_multiple=256, then="`fasc export --format block-configs`"),
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


def budget_for_engine(name: str | None, budget: BudgetConfig) -> BudgetConfig:
    """A budget with the multiple of channels that an engine wants; unchanged where it wants none.

    Raises:
        UsageError: the budget says another one.
    """
    multiple = PRESETS[name].channel_multiple if name is not None and name in PRESETS else None
    if multiple is None:
        return budget
    if budget.channel_multiple is not None and budget.channel_multiple % multiple:
        raise UsageError(f"--for {name} wants widths that are multiples of {multiple}", "leave --channel-multiple out")
    return budget if budget.channel_multiple is not None else budget.model_copy(update={"channel_multiple": multiple})


def is_merged(name: str | None) -> bool:
    """Whether an engine wants an ordinary checkpoint."""
    return name is not None and name in PRESETS and PRESETS[name].merged
