"""Our entry in transformers' quantizer registry: rebuilds the compressed structure before the weights are loaded.

Imports nothing of transformers but the registry, because it is imported while transformers is (see ``_fasc_transformers.py``).
"""

from typing import Any

import torch
from torch import nn
from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING, register_quantization_config, register_quantizer
from transformers.quantizers.base import HfQuantizer

from fasc.errors import ModelError, NonFiniteError
from fasc.model.structure import FascConfig


class FascHfQuantizer(HfQuantizer):
    """Builds the compressed structure on the empty skeleton; transformers then loads tensors by name."""

    requires_calibration = True
    quantization_config: FascConfig

    def _process_model_before_weight_loading(self, model: nn.Module, **_kwargs: Any) -> None:
        from fasc.edits.structure import build_structure, parsed  # noqa: PLC0415 - not while transformers is imported
        from fasc.serving.model_type import undisguise  # noqa: PLC0415

        undisguise(model.config)
        build_structure(model, parsed(self.quantization_config))

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
