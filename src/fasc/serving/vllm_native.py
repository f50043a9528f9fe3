"""A narrower Llama in vLLM's own Llama: a width for each MLP, everything else as vLLM has it, fused products and all."""

import copy
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor
from vllm.config import VllmConfig
from vllm.model_executor.models.llama import LlamaDecoderLayer, LlamaForCausalLM
from vllm.model_executor.models.utils import extract_layer_index

from fasc.edits.narrow import Narrow
from fasc.edits.structure import parsed
from fasc.errors import UsageError

_WHOLE = ".whole."
"""Where a checkpoint of ours keeps a layer that has gained a bias."""


def _widths(quant_config: Any) -> dict[int, int]:
    """By block, where channels went."""
    edits = [edit for edit in parsed(quant_config.structure) if isinstance(edit, Narrow)]
    return {extract_layer_index(edit.consumer.name): edit.width for edit in edits}


class NarrowLlamaLayer(LlamaDecoderLayer):  # type: ignore[misc]
    """A block with an MLP width of its own, and biases in the MLP."""

    def __init__(self, vllm_config: VllmConfig, prefix: str = "", config: Any = None) -> None:
        own = copy.copy(config or vllm_config.model_config.hf_config)
        own.intermediate_size = _widths(vllm_config.quant_config).get(extract_layer_index(prefix), own.intermediate_size)
        own.mlp_bias = True
        super().__init__(vllm_config=vllm_config, prefix=prefix, config=own)


class FascLlamaForCausalLM(LlamaForCausalLM):  # type: ignore[misc]
    """Llama or Mistral, compressed with ``--for vllm``: MLPs are narrower and nothing is factored."""

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        if vllm_config.parallel_config.tensor_parallel_size > 1:
            raise UsageError("compressed models do not run tensor-parallel in vLLM", "use --tensor-parallel-size 1")
        super().__init__(vllm_config=vllm_config, prefix=prefix, layer_type=NarrowLlamaLayer)

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> set[str]:
        """Names without our layer's own level; biases that the checkpoint does not have are 0."""
        with torch.no_grad():
            for name, parameter in self.named_parameters():
                if ".mlp." in name and name.endswith(".bias"):
                    parameter.zero_()

        def plain() -> Iterator[tuple[str, Tensor]]:
            for name, tensor in weights:
                if tensor.numel():  # the marks of replaced layers are empty
                    yield name.replace(_WHOLE, "."), tensor

        loaded: set[str] = super().load_weights(plain())
        return loaded | {name for name, _ in self.named_parameters() if ".mlp." in name and name.endswith(".bias")}
