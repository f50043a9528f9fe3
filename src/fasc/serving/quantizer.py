"""Our entry in transformers' quantizer registry: rebuilds the compressed structure before the weights are loaded.

Imports nothing of transformers but the registry, because it is imported while transformers is (see ``_fasc_transformers.py``).
"""

import re
from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from safetensors import safe_open
from torch import Tensor, nn
from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING, register_quantization_config, register_quantizer
from transformers.quantizers.base import HfQuantizer

from fasc.errors import ModelError, NonFiniteError
from fasc.model.structure import FascConfig

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class FascHfQuantizer(HfQuantizer):
    """Builds the compressed structure on the empty skeleton; transformers then loads tensors by name."""

    requires_calibration = True
    quantization_config: FascConfig

    def _process_model_before_weight_loading(self, model: nn.Module, **given: Any) -> None:
        """Build the structure, and see that what the files hold of it has its shapes."""
        from fasc.edits.structure import build_structure, made_modules, parsed  # noqa: PLC0415 - not while transformers is imported
        from fasc.serving.model_type import undisguise  # noqa: PLC0415

        undisguise(model.config)
        edits = parsed(self.quantization_config)
        build_structure(model, edits)
        made = made_modules(model, edits)
        self._let_initialise(model, set(made))
        self._in_files = _shapes_in(given.get("checkpoint_files") or ())
        shapes = {
            f"{name}.{key}": tuple(tensor.shape)
            for name in made
            for key, tensor in model.get_submodule(name).state_dict(keep_vars=True).items()
        }
        for name in sorted(shapes.keys() & self._in_files.keys()):
            if self._in_files[name] != shapes[name]:
                raise ModelError(
                    f"`{name}` is {_by(self._in_files[name])} in the weights and {_by(shapes[name])} by config.json",
                    "the checkpoint is damaged or its files belong to two models; copy the whole folder again",
                )
        self._made = shapes.keys() if shapes.keys() & self._in_files.keys() else set()

    @staticmethod
    def _let_initialise(model: nn.Module, replaced: set[str]) -> None:
        """Some initialisers ask a layer, or a child, for a weight or bias that is no longer there; nothing of them is needed.

        What is loaded is not initialised, and what is not loaded is refused.
        """
        parents = {name[:place] for name in replaced for place in range(len(name)) if name[place] == "."}
        touched = {id(model.get_submodule(name)) for name in parents}
        touched |= {id(module) for name in replaced for module in model.get_submodule(name).modules()}

        def tolerant(initialise: Callable[[nn.Module], None], module: nn.Module) -> None:
            try:
                initialise(module)
            except (AttributeError, TypeError):
                if id(module) not in touched:
                    raise

        for part in _initialising(model):
            part._init_weights = partial(tolerant, part._init_weights)  # type: ignore[assignment, arg-type]

    def _process_model_after_weight_loading(self, model: "PreTrainedModel", **_given: Any) -> "PreTrainedModel":
        """Refuse a tensor that the files did not hold: transformers fills it with random numbers and a warning."""
        for part in _initialising(model):
            part.__dict__.pop("_init_weights", None)
        ignored = tuple(model._keys_to_ignore_on_load_missing or ())
        buffers = {name for name, _ in model.named_buffers()}
        for name, tensor in model.state_dict(keep_vars=True).items():
            if name in model.all_tied_weights_keys or any(re.search(pattern, name) for pattern in ignored):
                continue
            if not self._was_loaded(name, tensor):
                raise ModelError(f"the checkpoint lacks `{name}`", "it is incomplete: copy the whole folder again")
            held = tensor.device.type != "meta" and tensor.is_floating_point()
            if held and not _sound(tensor, may_be_infinite=name in buffers):
                raise NonFiniteError(f"weight `{name}`", "the checkpoint is damaged; load another copy")
        return model

    def _was_loaded(self, name: str, tensor: Tensor) -> bool:
        """By its name in the files, or by transformers' mark: files of some architectures bear other names.

        What is offloaded has lost the mark; then only names that the files are known to use count.
        """
        if name in self._in_files or getattr(tensor, "_is_hf_initialized", False):
            return True
        return tensor.device.type == "meta" and name not in self._made

    def update_weight_conversions(self, weight_conversions: list[Any], *model: nn.Module) -> list[Any]:
        """Experts that were unfused are in the files as they are: transformers shall not fuse them."""
        updated: list[Any] = super().update_weight_conversions(weight_conversions, *model)  # older ones have no model
        if not any(isinstance(edit, dict) and edit.get("edit") == "unfuse" for edit in self.quantization_config.edits):
            return updated
        from fasc.model.experts import without_experts  # noqa: PLC0415 - not while fasc is imported

        return without_experts(updated)

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


def _initialising(model: nn.Module) -> list[nn.Module]:
    """The model, and models inside it: each initialises what is below it."""
    return [module for module in model.modules() if hasattr(module, "_init_weights")]


def _sound(tensor: Tensor, *, may_be_infinite: bool) -> bool:
    """Finite; a buffer may be a bound that bounds nothing, as Gemma 4's are."""
    return not bool(torch.isnan(tensor).any()) if may_be_infinite else bool(torch.isfinite(tensor).all())


def _shapes_in(files: Sequence[str]) -> dict[str, tuple[int, ...]]:
    """The shapes of all tensors of safetensors files, by name: their headers alone are read."""
    shapes: dict[str, tuple[int, ...]] = {}
    for path in files:
        if str(path).endswith(".safetensors"):
            with safe_open(path, framework="pt") as file:
                shapes |= {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118 - not a mapping
    return shapes


def _by(shape: Sequence[int]) -> str:
    return "×".join(map(str, shape))


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
