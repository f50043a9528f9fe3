"""Our entry in transformers' quantizer registry: rebuilds the compressed structure before the weights are loaded.

Imports nothing of transformers but the registry, because it is imported while transformers is (see ``fasc/__init__.py``).
"""

from collections.abc import Sequence
from typing import Any

import torch
from safetensors import safe_open
from torch import nn
from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING, register_quantization_config, register_quantizer
from transformers.quantizers.base import HfQuantizer

from fasc.errors import ModelError, NonFiniteError
from fasc.model.structure import FascConfig


class FascHfQuantizer(HfQuantizer):
    """Builds the compressed structure on the empty skeleton; transformers then loads tensors by name."""

    requires_calibration = True
    quantization_config: FascConfig

    def _process_model_before_weight_loading(
        self, model: nn.Module, checkpoint_files: Sequence[str] | None = None, **_kwargs: Any
    ) -> None:
        from fasc.edits.structure import build_structure, edited_layers, parsed  # noqa: PLC0415 - not while transformers is imported

        build_structure(model, parsed(self.quantization_config))
        _require_shapes(model, edited_layers(model), checkpoint_files or ())

    def _process_model_after_weight_loading(self, model: nn.Module, **_kwargs: Any) -> nn.Module:
        """Refuse a layer that the files did not hold: transformers fills it with random numbers and a warning."""
        from fasc.edits.structure import edited_layers  # noqa: PLC0415

        for name in edited_layers(model):
            for key, tensor in model.get_submodule(name).state_dict(keep_vars=True).items():
                if tensor.device.type == "meta":
                    continue  # offloaded
                if not getattr(tensor, "_is_hf_initialized", False):
                    raise ModelError(f"the checkpoint lacks `{name}.{key}`", "it is incomplete: copy the whole folder again")
                if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
                    raise NonFiniteError(f"weight `{name}.{key}`", "the checkpoint is damaged; load another copy")
        return model

    def is_serializable(self, *_args: Any, **_kwargs: Any) -> bool:
        """``save_pretrained`` works."""
        return True

    @property
    def is_trainable(self) -> bool:
        """The factors are ordinary parameters."""
        return True

    @property
    def is_qat_trainable(self) -> bool:
        """The weights themselves can be trained, without adapters: transformers' Trainer asks this."""
        return True

    @property
    def is_compileable(self) -> bool:
        """``torch.compile`` works."""
        return True


def _require_shapes(model: nn.Module, layers: Sequence[str], files: Sequence[str]) -> None:
    """See that the weights of edited layers have the shapes of the structure: transformers would say so without numbers.

    Weights that transformers renames while it loads them are left to its own check.
    """
    modules = {name: model.get_submodule(name).state_dict() for name in layers}
    expected = {f"{name}.{key}": tuple(tensor.shape) for name, state in modules.items() for key, tensor in state.items()}
    for file in files:
        with safe_open(file, framework="pt") as tensors:
            for key in sorted(expected.keys() & set(tensors.keys())):
                shape = tuple(tensors.get_slice(key).get_shape())
                if shape != expected[key]:
                    raise ModelError(
                        f"`{key}` is {'×'.join(map(str, shape))} in the weights and {'×'.join(map(str, expected[key]))} by the "
                        "edits in config.json",
                        "the checkpoint is damaged, or its config.json belongs to another one",
                    )


def attach(model: nn.Module) -> None:
    """Let ``model.save_pretrained`` and ``Trainer`` know what the model is, after its edits were made."""
    from fasc.edits.structure import structure_of  # noqa: PLC0415

    structure = structure_of(model)
    if structure is not None:
        model.hf_quantizer = FascHfQuantizer(structure, pre_quantized=True)


def register() -> None:
    """Make ``AutoModelForCausalLM.from_pretrained`` understand ``quant_method: fasc``; harmless when repeated."""
    if "fasc" not in AUTO_QUANTIZER_MAPPING:
        register_quantization_config("fasc")(FascConfig)
        register_quantizer("fasc")(FascHfQuantizer)


register()
