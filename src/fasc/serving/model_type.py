"""The ``model_type`` of a compressed checkpoint: one that only fasc registers.

So transformers without fasc stops and says what is missing.

Imports nothing of transformers but what is imported already, because it is imported while transformers is
(see ``_fasc_transformers.py``).
"""

from collections.abc import Mapping
from typing import Any

from transformers.configuration_utils import PreTrainedConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING, AutoConfig

from fasc.errors import ModelError

MODEL_TYPE = "fasc: pip install fasc"
"""Stands in the message of every loader that does not know it."""

DENSE_MODEL_TYPE = "dense_model_type"
"""Key of config.json under which the model's own type is kept."""


class CompressedConfig(PreTrainedConfig):
    """What config.json says. Reading it gives the config class of the dense model, with ``quantization_config`` in it."""

    model_type = MODEL_TYPE

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        """The config of the dense model's own class.

        Raises:
            ModelError: this transformers does not know the dense model either.
        """
        content = disguised(config_dict, undo=True)
        kind = content["model_type"]
        if kind == MODEL_TYPE or kind not in CONFIG_MAPPING:
            raise ModelError(
                f"config.json: `{DENSE_MODEL_TYPE}` is {kind!r}, which this transformers does not know", "upgrade it"
            )
        if _ARCHITECTURES:
            native = kind in NATIVE and _only_narrower(content.get("quantization_config"))
            content["architectures"] = [_ARCHITECTURES[1] if native else _ARCHITECTURES[0]]
        return CONFIG_MAPPING[kind].from_dict(content, **kwargs)


_ARCHITECTURES: list[str] = []
"""What configs say in vLLM's processes, whose own classes know no compressed layers."""


NATIVE = frozenset({"llama", "mistral"})
"""Models that vLLM's own Llama runs, also narrower."""


def architecture_for_vllm(name: str, native: str) -> None:
    """From now on configs of compressed checkpoints name one of these classes.

    Args:
        name: for every structure.
        native: for models of :data:`NATIVE` whose MLPs are narrower and that have no other edit.
    """
    _ARCHITECTURES[:] = [name, native]


def _only_narrower(structure: Any) -> bool:
    edits = structure.get("edits") if isinstance(structure, Mapping) else None
    return (
        isinstance(edits, list) and bool(edits) and all(isinstance(one, Mapping) and one.get("edit") == "narrow" for one in edits)
    )


def disguised(content: Mapping[str, Any], *, undo: bool = False) -> dict[str, Any]:
    """The content of a config.json with our model type in the place of the model's own, or with its own again."""
    changed = dict(content)
    if undo:
        changed["model_type"] = changed.pop(DENSE_MODEL_TYPE, None)
    else:
        changed[DENSE_MODEL_TYPE], changed["model_type"] = changed["model_type"], MODEL_TYPE
    return changed


def undisguise(config: Any) -> None:
    """Give a config its own model type again, where a program named the model's class itself and so went past ``AutoConfig``."""
    if vars(config).pop(DENSE_MODEL_TYPE, None) is not None:
        config.model_type = type(config).model_type


def register() -> None:
    """Make ``AutoConfig`` understand our model type; harmless when repeated."""
    AutoConfig.register(MODEL_TYPE, CompressedConfig, exist_ok=True)


register()
