"""A model → a GGUF file that llama.cpp, Ollama and LM Studio read without a patch."""

import logging
import math
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from tempfile import NamedTemporaryFile
from typing import Any

import torch
from gguf import GGMLQuantizationType, GGUFWriter, LlamaFileType, RopeScalingType, get_tensor_name_map
from gguf.constants import MODEL_ARCH_NAMES
from gguf.quants import quantize
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from fasc.edits.structure import parsed, structure_of
from fasc.errors import UsageError
from fasc.serving.blocks import Block, blocks_of, require_whole_values, whole_blocks
from fasc.serving.ggml import file_type, fits, rounded
from fasc.serving.graphs import DECI, Graph, graph_for, graph_of
from fasc.serving.ordinary import ordinary_tensors
from fasc.serving.tensor_types import TensorTypes
from fasc.serving.vocabulary import write_vocabulary
from fasc.storage import new_file

logging.getLogger("gguf").setLevel(logging.WARNING)

_BLOCK = re.compile(r"\.layers\.(\d+)\.")
_FILE_TYPES = {
    torch.float32: (LlamaFileType.ALL_F32, GGMLQuantizationType.F32),
    torch.float16: (LlamaFileType.MOSTLY_F16, GGMLQuantizationType.F16),
    torch.bfloat16: (LlamaFileType.MOSTLY_BF16, GGMLQuantizationType.BF16),
}


def export_gguf(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    out: Path,
    name: str = "",
    types: TensorTypes | None = None,
) -> Graph:
    """Write a GGUF file, with tokenizer and chat template.

    Norms and biases are float32, matrices in the model's precision or in ggml's types of few bits. The file is written aside and
    renamed when complete.

    Args:
        model: dense, merged, or with fewer channels, heads or sublayers; Llama, Mistral, Qwen2, Qwen3 or Gemma.
        tokenizer: its own.
        out: the file.
        name: of the model, shown by llama.cpp.
        types: of the matrices.

    Returns:
        The graph of llama.cpp that runs it.

    Raises:
        UsageError: no graph holds the model; the hint names the option that makes a plan which fits.
    """
    config = model.config.get_text_config()
    graph_of(config.model_type)
    require_whole_values(parsed(structure_of(model)))
    tensors = whole_blocks(dict(ordinary_tensors(model, "llama.cpp")))
    shapes = blocks_of(tensors, config)
    biases = {key.split(".")[-2]: key.removesuffix(".bias") for key in tensors if key.endswith(".bias")}
    graph = graph_for(config.model_type, shapes, biases)
    _check(config, graph_of(config.model_type))
    with new_file(out) as scratch:
        writer = GGUFWriter(scratch, graph.name)
        writer.add_name(name or str(model.name_or_path) or out.stem)
        writer.add_file_type(_FILE_TYPES[model.dtype][0] if types is None else file_type(types.most_used))
        _write_sizes(writer, config, graph, shapes)
        _write_rope(writer, config)
        write_vocabulary(writer, tokenizer, config.vocab_size)
        for source, key, tensor in _in_graph(tensors, config, graph):
            _write_tensor(writer, source, key, tensor, types)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
    return graph


def _check(config: Any, graph: Graph) -> None:
    """What a graph takes for granted."""
    activation = getattr(config, "hidden_activation", None) or config.hidden_act
    if activation not in graph.activations:
        raise UsageError(
            f"llama.cpp's graph of `{config.model_type}` has no `{activation}`", "serve it with transformers or vLLM"
        )
    scale = getattr(config, "query_pre_attn_scalar", None)
    usual = (_head_size(config), config.hidden_size // config.num_attention_heads)
    if scale is not None and scale not in usual:
        raise UsageError(
            f"llama.cpp cannot scale attention by {scale} in heads of {usual[0]}", "serve it with transformers or vLLM"
        )


def _head_size(config: Any) -> int:
    return int(getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)


def _write_sizes(writer: GGUFWriter, config: Any, graph: Graph, shapes: list[Block]) -> None:
    head = _head_size(config)
    window = getattr(config, "sliding_window", None)
    gemma = graph.name.startswith("gemma")
    # Only Gemma's graphs slide: elsewhere the model is itself up to the window.
    writer.add_context_length(
        min(config.max_position_embeddings, window) if window and not gemma else config.max_position_embeddings
    )
    writer.add_vocab_size(config.vocab_size)
    writer.add_block_count(len(shapes))
    writer.add_embedding_length(config.hidden_size)
    per_block = graph is DECI
    writer.add_feed_forward_length([one.width for one in shapes] if per_block else shapes[0].width)
    writer.add_head_count([one.heads for one in shapes] if per_block else shapes[0].heads)
    writer.add_head_count_kv([one.keys for one in shapes] if per_block else shapes[0].keys)
    writer.add_key_length(head)
    writer.add_value_length(head)
    writer.add_rope_dimension_count(head)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    if gemma and window:
        writer.add_sliding_window(window)
    if getattr(config, "attn_logit_softcapping", None):
        writer.add_attn_logit_softcapping(config.attn_logit_softcapping)
    if getattr(config, "final_logit_softcapping", None):
        writer.add_final_logit_softcapping(config.final_logit_softcapping)


def _rope(config: Any) -> tuple[Mapping[str, Any], Mapping[str, Any]]:
    """The parameters of full and of sliding attention."""
    given = getattr(config, "rope_parameters", None) or {
        "rope_theta": getattr(config, "rope_theta", 10000.0),
        **(getattr(config, "rope_scaling", None) or {}),
    }
    return given.get("full_attention", given), given.get("sliding_attention", {})


def _write_rope(writer: GGUFWriter, config: Any) -> None:
    full, sliding = _rope(config)
    writer.add_rope_freq_base(full.get("rope_theta", 10000.0))
    if "rope_theta" in sliding:
        writer.add_rope_freq_base_swa(sliding["rope_theta"])
    kind = full.get("rope_type") or full.get("type") or "default"
    if kind == "linear":
        writer.add_rope_scaling_type(RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(full["factor"])
    elif kind == "yarn":
        writer.add_rope_scaling_type(RopeScalingType.YARN)
        writer.add_rope_scaling_factor(full["factor"])
        writer.add_rope_scaling_orig_ctx_len(full["original_max_position_embeddings"])
    elif kind not in ("default", "llama3"):
        raise UsageError(f"fasc writes no GGUF with `{kind}` rotary embeddings", "serve it with transformers or vLLM")


def _in_graph(tensors: Mapping[str, Tensor], config: Any, graph: Graph) -> Iterator[tuple[str, str, Tensor]]:
    """The model's name, llama.cpp's and the tensor, in llama.cpp's order of rotary pairs."""
    kinds = {name: kind for kind, name in MODEL_ARCH_NAMES.items()}
    names = get_tensor_name_map(kinds[graph.name], config.num_hidden_layers)
    head = _head_size(config)
    for name, tensor in tensors.items():
        target = names.get_name(name, try_suffixes=(".weight", ".bias"))
        if target is None:
            raise UsageError(f"llama.cpp's graph `{graph.name}` has no place for `{name}`", "serve it with transformers or vLLM")
        leaf = name.split(".")[-2]
        if graph.interleaved and leaf in ("q_proj", "k_proj"):
            halves = tensor.reshape(tensor.shape[0] // head, 2, head // 2, *tensor.shape[1:])
            tensor = halves.transpose(1, 2).reshape(tensor.shape)
        if graph.norm_shift and name.endswith("norm.weight"):
            tensor = tensor.float() + graph.norm_shift
        yield name, target, tensor
    factors = _llama3_factors(config)
    if factors is not None:
        yield "", "rope_freqs.weight", factors


def _llama3_factors(config: Any) -> Tensor | None:
    """What each frequency is divided by in Llama 3's rotary embedding."""
    rope, _ = _rope(config)
    if (rope.get("rope_type") or rope.get("type")) != "llama3":
        return None
    head = _head_size(config)
    lengths = 2 * math.pi * rope.get("rope_theta", 10000.0) ** (torch.arange(0, head, 2, dtype=torch.float64) / head)
    low, high, factor = rope["low_freq_factor"], rope["high_freq_factor"], rope["factor"]
    smooth = ((rope["original_max_position_embeddings"] / lengths - low) / (high - low)).clamp(0, 1)
    result: Tensor = (1 / ((1 - smooth) / factor + smooth)).float()
    return result


def _write_tensor(writer: GGUFWriter, source: str, name: str, tensor: Tensor, types: TensorTypes | None) -> None:
    if types is not None and tensor.dim() == 2 and fits(types.of(source, tensor.shape[1]), tensor.shape[1]):
        kind = types.of(source, tensor.shape[1])
        writer.add_tensor(name, rounded(tensor, kind, types.importance.get(source)), raw_dtype=kind)
        return
    values = tensor.float().cpu().contiguous().numpy()
    kind = GGMLQuantizationType.F32 if tensor.dim() == 1 else _FILE_TYPES[tensor.dtype][1]
    if kind == GGMLQuantizationType.F32:
        writer.add_tensor(name, values)
    else:
        writer.add_tensor(name, quantize(values, kind), raw_dtype=kind)


def room_for_the_rest(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> int:
    """Bytes of a file beside its matrices, at most: the vocabulary, the names and places of the tensors, norms and biases."""
    tensors = list(model.state_dict().items())
    with NamedTemporaryFile(suffix=".gguf") as scratch:
        writer = GGUFWriter(scratch.name, DECI.name)
        write_vocabulary(writer, tokenizer, model.config.get_text_config().vocab_size)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.close()
        vocabulary = Path(scratch.name).stat().st_size
    vectors: int = sum(4 * tensor.numel() for _, tensor in tensors if tensor.dim() == 1)
    return vocabulary + vectors + sum(len(name) + _PER_TENSOR for name, _ in tensors) + _SIZES


_PER_TENSOR = 128
"""Bytes for a tensor's entry in the file's table, and to align it."""

_SIZES = 8192
"""Bytes for the sizes of the model, a width and numbers of heads for each block among them."""
