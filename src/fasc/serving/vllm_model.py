"""A compressed model in vLLM's Transformers backend: the structure is built before vLLM takes over the layers."""

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from vllm.config import VllmConfig
from vllm.model_executor.layers.linear import LinearBase, UnquantizedLinearMethod
from vllm.model_executor.layers.quantization.base_config import QuantizationConfig
from vllm.model_executor.models.transformers import TransformersForCausalLM

from fasc.edits.structure import build_structure, parsed
from fasc.errors import UsageError
from fasc.layouts._replacement import MARK, Replacement
from fasc.model.structure import FascConfig
from fasc.serving.presets import NOT_IN_VLLM


class FascVllmConfig(QuantizationConfig):
    """``quant_method: fasc``: nothing is quantised, the layers are fewer numbers."""

    def __init__(self, raw: dict[str, Any]) -> None:
        super().__init__()
        self.structure = FascConfig(**{key: value for key, value in raw.items() if key != "quant_method"})

    def get_name(self) -> str:
        """As in config.json."""
        return "fasc"

    def get_supported_act_dtypes(self) -> list[torch.dtype]:
        """All."""
        return [torch.float32, torch.bfloat16, torch.float16]

    @classmethod
    def get_min_capability(cls) -> int:
        """Any device."""
        return -1

    @staticmethod
    def get_config_filenames() -> list[str]:
        """It lies in config.json."""
        return []

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> "FascVllmConfig":
        """From ``quantization_config``."""
        return cls(config)

    def get_quant_method(self, layer: nn.Module, prefix: str) -> Any:
        """Every factor is an ordinary matrix."""
        del prefix
        return UnquantizedLinearMethod() if isinstance(layer, LinearBase) else None


class FascForCausalLM(TransformersForCausalLM):  # type: ignore[misc]
    """Any causal language model of transformers, compressed."""

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        if vllm_config.parallel_config.tensor_parallel_size > 1:
            raise UsageError("compressed models do not run tensor-parallel in vLLM", "use --tensor-parallel-size 1")
        edits = parsed(vllm_config.quant_config.structure)
        lacking = next((edit for edit in edits if edit.edit in NOT_IN_VLLM), None)
        if lacking is not None:
            raise UsageError(
                f"vLLM has one shape of cache and a vocabulary of its own, and `{lacking.places[0]}` differs ({lacking.edit})",
                "serve it with transformers, or compress with `--for vllm`",
            )
        super().__init__(vllm_config=vllm_config, prefix=prefix)

    def recursive_replace(self) -> None:
        """Build what the edits say on the empty skeleton; then vLLM replaces what is an ordinary layer."""
        build_structure(_Named(self.model), parsed(self.quant_config.structure))
        for module in self.model.modules():
            for name, buffer in module.named_buffers(recurse=False):
                if buffer.device.type == "meta":
                    module.register_buffer(name, torch.zeros(buffer.shape, dtype=buffer.dtype))
        replaced = [module for module in self.model.modules() if isinstance(module, Replacement)]
        sizes = [module.in_features for module in replaced]
        for module in replaced:  # no two are alike, so vLLM fuses none of them with its neighbours
            module.in_features = float("nan")
        try:
            super().recursive_replace()
        finally:
            for module, size in zip(replaced, sizes, strict=True):
                module.in_features = size

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> set[str]:
        """Orders are buffers, which vLLM's loader does not know; marks hold nothing."""
        replaced = {name for name, module in self.named_modules() if isinstance(module, Replacement)}
        every = dict(self.named_buffers())  # a mark in the place of fused experts is one number
        buffers = {name: buffer for name, buffer in every.items() if name.endswith(".order") or buffer.numel() == 1}
        loaded: set[str] = set()

        def others() -> Iterator[tuple[str, Tensor]]:
            for name, tensor in weights:
                if name in buffers:
                    buffers[name].copy_(tensor)
                    loaded.add(name)
                elif name.removesuffix(f".{MARK}") not in replaced:
                    yield name, tensor

        return super().load_weights(others()) | loaded


class _Named(nn.Module):
    """The base model under the name that it has in the checkpoint."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self.config = model.config
