"""A narrower Llama → a ``DeciLMForCausalLM`` checkpoint with ``block_configs``: a width and key-value heads for each block.

It is the form of DeciLM and Nemotron-NAS (arXiv:2411.19146), which vLLM, SGLang, TensorRT-LLM and MLX have a graph for. Widths
are told as multiples of the embedding's (``ffn_mult``), which those graphs round up to multiples of 256. transformers cannot read
the config: where fasc is installed, vLLM takes that from our plugin (:func:`register_config`); elsewhere the engine brings it.
"""

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import AutoConfig, LlamaConfig, PreTrainedModel, PreTrainedTokenizerBase
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from fasc.edits.structure import parsed, structure_of
from fasc.errors import UsageError
from fasc.serving.blocks import Block, blocks_of, require_whole_values, whole_blocks
from fasc.serving.ordinary import ordinary_tensors
from fasc.storage import write_json

MODEL_TYPE, ARCHITECTURE = "nemotron-nas", "DeciLMForCausalLM"
MULTIPLE = 256
"""Of every width."""

_SHAPED = ("llama", "mistral")
_NAMES = {"gate_proj": "gate", "up_proj": "up", "down_proj": "down"}


def export_block_configs(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, folder: Path) -> list[Block]:
    """Write the checkpoint: ``config.json``, weights, tokenizer and chat template.

    Args:
        model: dense, or with fewer channels, key-value heads or attentions; Llama or Mistral.
        tokenizer: its own.
        folder: exists and is empty.

    Returns:
        Sizes of the blocks.

    Raises:
        UsageError: the form cannot hold the model; the hint names the option that makes a plan which fits.
    """
    config = model.config.get_text_config()
    if config.model_type not in _SHAPED or getattr(config, "attention_bias", False):
        raise UsageError(
            f"block configs describe Llama's graph, and this is `{config.model_type}`", "`--format gguf`, or serve it with vLLM"
        )
    if getattr(config, "sliding_window", None):
        raise UsageError("block configs have no sliding window", "`--format gguf`, or serve it with vLLM")
    require_whole_values(parsed(structure_of(model)))
    tensors = whole_blocks(dict(ordinary_tensors(model, "block-configs")), least=MULTIPLE)
    blocks = blocks_of(tensors, config)
    _check(blocks, config)
    if any(name.endswith(".bias") for name in tensors):
        tensors |= _missing_biases(tensors, blocks)
    tokenizer.save_pretrained(folder)
    write_json(folder / "config.json", _config(config, blocks, biases=any(name.endswith(".bias") for name in tensors)))
    if model.can_generate() and getattr(model, "generation_config", None) is not None:
        model.generation_config.save_pretrained(folder)
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / "model.safetensors", {"format": "pt"})
    return blocks


def _check(blocks: list[Block], config: Any) -> None:
    for number, block in enumerate(blocks):
        if block.width % MULTIPLE or block.width == 0:
            raise UsageError(
                f"the MLP of block {number} is {block.width} wide, and block configs hold multiples of {MULTIPLE}",
                "compress with `--for block-configs`",
            )
        if block.heads and (block.heads != config.num_attention_heads or block.heads % block.keys):
            raise UsageError(
                f"block {number} has {block.heads} query heads, and block configs hold {config.num_attention_heads} everywhere",
                "leave `heads` out of --layouts",
            )


def _missing_biases(tensors: dict[str, Tensor], blocks: list[Block]) -> dict[str, Tensor]:
    """Zeros for every bias of an MLP that is not there: the graph has all of them or none."""
    found: dict[str, Tensor] = {}
    for number in range(len(blocks)):
        for leaf in _NAMES:
            weight = tensors[f"model.layers.{number}.mlp.{leaf}.weight"]
            name = f"model.layers.{number}.mlp.{leaf}.bias"
            if name not in tensors:
                found[name] = torch.zeros(weight.shape[0], dtype=weight.dtype)
    return found


def _config(config: Any, blocks: list[Block], *, biases: bool) -> dict[str, Any]:
    """The model's own config, with the blocks in the place of one width and one number of key-value heads."""
    own = {key: value for key, value in config.to_dict().items() if key not in _REPLACED}
    return own | {
        "model_type": MODEL_TYPE,
        "architectures": [ARCHITECTURE],
        "mlp_bias": biases,
        "intermediate_size": None,
        "num_key_value_heads": None,
        "block_configs": [
            {
                "attention": {
                    "n_heads_in_group": block.heads // block.keys if block.heads else None,
                    "no_op": block.heads == 0,
                    "replace_with_linear": False,
                },
                "ffn": {"ffn_mult": _multiple(block.width, config.hidden_size), "no_op": False, "replace_with_linear": False},
            }
            for block in blocks
        ],
    }


_REPLACED = ("quantization_config", "model_type", "architectures", "auto_map", "_name_or_path")


def _multiple(width: int, hidden: int) -> float:
    """What the graphs turn into the width, ``⌈int(2/3 · ffn_mult · hidden) / 256⌉ · 256``: in the middle of the last 256."""
    return 3 * (width - MULTIPLE / 2) / (2 * hidden)


def width_of(multiple: float, hidden: int) -> int:
    """The width that the graphs read from a multiple."""
    return -(-int(2 * multiple * hidden / 3) // MULTIPLE) * MULTIPLE


class Part(dict[str, Any]):
    """A part of a block's config, whose keys are attributes."""

    def __getattr__(self, name: str) -> Any:
        if name not in self:
            raise AttributeError(name)
        return self[name]


class BlockConfigs(LlamaConfig):
    """Llama's config with sizes of each block."""

    model_type = MODEL_TYPE

    def __init__(self, block_configs: list[dict[str, Any]] | None = None, **others: Any) -> None:
        parts = [Part({key: Part(value) for key, value in block.items()}) for block in block_configs or ()]
        widths = [width_of(part["ffn"]["ffn_mult"], others.get("hidden_size", 4096)) for part in parts]
        groups = [part["attention"]["n_heads_in_group"] for part in parts if not part["attention"]["no_op"]]
        others["intermediate_size"] = max(widths, default=11008)
        others["num_key_value_heads"] = others.get("num_attention_heads", 32) // min(groups, default=1)
        super().__init__(**others)
        self.block_configs = parts


def register_config() -> None:
    """Teach transformers to read the config, for an engine that has the graph; harmless when repeated."""
    if MODEL_TYPE not in CONFIG_MAPPING:
        AutoConfig.register(MODEL_TYPE, BlockConfigs)
