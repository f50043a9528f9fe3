"""The blocks of a model as llama.cpp's ``deci`` graph has them: heads and MLP width of each, nothing left out but attention."""

import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fasc.edits import Edit
from fasc.edits.attention import Values
from fasc.errors import UsageError
from fasc.model.coupling import head_sizes

_EMPTY = 32
"""Width of an MLP that adds its bias alone: the graph passes over the attention of a block whose MLP has width 0."""

_SKIPPED = re.compile(r"(.*\.layers\.(\d+)\.)(self_attn|mlp)\.mean$")


class Block(NamedTuple):
    """Sizes of one block."""

    heads: int
    """Of queries; 0 where there is no attention."""

    keys: int
    """Of keys and values."""

    width: int
    """Of the MLP."""


def whole_blocks(tensors: Mapping[str, Tensor], *, least: int = _EMPTY) -> dict[str, Tensor]:
    """The tensors with every sublayer that was left out in the graph's terms, under transformers' names.

    The mean of an MLP is the bias of one that computes nothing. The mean of an attention is added where the block before it ends,
    by the bias of its MLP: nothing reads what passes in between.

    Args:
        tensors: of an ordinary model, the means of sublayers that were left out among them.
        least: width of an MLP that computes nothing.

    Raises:
        UsageError: the first block has no attention, and no block before it could add its mean.
    """
    result = {name: tensor for name, tensor in tensors.items() if not _SKIPPED.match(name)}
    skipped = {match.group(1, 2, 3): tensors[name] for name in tensors if (match := _SKIPPED.match(name))}
    for (prefix, _, kind), mean in skipped.items():
        if kind == "mlp":
            for leaf, shape in (("gate", (least, len(mean))), ("up", (least, len(mean))), ("down", (len(mean), least))):
                result[f"{prefix}mlp.{leaf}_proj.weight"] = torch.zeros(shape, dtype=mean.dtype, device=mean.device)
            result[f"{prefix}mlp.down_proj.bias"] = mean
    for (prefix, number, kind), mean in skipped.items():
        if kind == "self_attn" and number == "0":
            raise UsageError("llama.cpp's first block has an attention, and this model's has none", "serve it with transformers")
        if kind == "self_attn":
            before = prefix.replace(f".{number}.", f".{int(number) - 1}.") + "mlp.down_proj.bias"
            result[before] = result[before] + mean if before in result else mean
            result.pop(f"{prefix}input_layernorm.weight", None)
    return result


def blocks_of(tensors: Mapping[str, Tensor], config: Any) -> list[Block]:
    """Sizes of every block.

    Args:
        tensors: from :func:`whole_blocks`.
        config: of the text model.
    """
    width = head_sizes(config)[2]
    blocks = []
    for block in range(config.num_hidden_layers):
        rows = {
            leaf: tensors[name].shape[0] if (name := f"model.layers.{block}.{leaf}.weight") in tensors else 0
            for leaf in ("self_attn.q_proj", "self_attn.k_proj", "mlp.up_proj")
        }
        blocks.append(Block(rows["self_attn.q_proj"] // width, rows["self_attn.k_proj"] // width, rows["mlp.up_proj"]))
    return blocks


def require_whole_values(edits: Sequence[Edit]) -> None:
    """See that value heads are as wide as keys.

    Raises:
        UsageError: they are not, which no graph holds.
    """
    narrow = next((edit for edit in edits if isinstance(edit, Values)), None)
    if narrow is not None:
        raise UsageError(
            f"llama.cpp has one width for all value heads, and those of `{narrow.places[0]}` are narrower",
            "leave `values` out of --layouts",
        )
