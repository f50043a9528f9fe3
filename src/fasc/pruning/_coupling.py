"""Which rows and columns of a block's layers stand and fall together: attention heads, MLP channels.

Found by shape and by the order of the calls, not by name: the rows of the layers that read one tensor, and the columns of the
layer that reads what they make.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel

from fasc.errors import ModelError
from fasc.model.groups import InputGroup
from fasc.model.layers import Layer

Part = Literal["heads", "channels"]


@dataclass(frozen=True, slots=True)
class Coupling:
    """One attention or one MLP: parts that can be removed, each some rows of the producers and some columns of the consumer."""

    part: Part
    parts: int
    """Key-value heads with the query heads they serve, or channels."""

    producers: tuple[Layer, ...]
    consumer: Layer
    consumer_group: str
    """The consumer's input group."""

    def parameters(self, kept: int) -> int:
        """Weights and biases of its layers with so many parts left."""
        rows = sum(kept * (layer.d_out // self.parts) * (layer.d_in + layer.bias) for layer in self.producers)
        return rows + kept * (self.consumer.d_in // self.parts) * self.consumer.d_out + self.consumer.bias * self.consumer.d_out


def head_sizes(config: PretrainedConfig) -> tuple[int, int, int]:
    """Query heads, key-value heads, and features of each."""
    heads = config.num_attention_heads
    keys = getattr(config, "num_key_value_heads", None) or heads
    return heads, keys, getattr(config, "head_dim", None) or config.hidden_size // heads


def couplings(model: PreTrainedModel, groups: Sequence[InputGroup]) -> list[Coupling]:
    """Attention and MLP of every block.

    Separate query, key and value projections are recognised by their widths in the model's config; a key-value head goes together
    with the query heads that it serves, which lie in consecutive rows.

    Raises:
        ModelError: a block is built in another way, or not all of its layers were chosen.
    """
    config = model.config.get_text_config()
    heads, keys, width = head_sizes(config)
    attention = sorted([heads * width, keys * width, keys * width])
    channels = getattr(config, "intermediate_size", None)
    found, used = [], set()
    for index, group in enumerate(groups):
        outs = sorted(layer.d_out for layer in group.layers)
        part: Part | None = "heads" if outs == attention else "channels" if set(outs) == {channels} else None
        if part is None:
            continue
        size = heads * width if part == "heads" else channels
        consumer = next((one for one in groups[index + 1 :] if one.block == group.block), None)
        if consumer is None or len(consumer.layers) > 1 or consumer.d_in != size:
            continue
        parts = keys if part == "heads" else size
        found.append(Coupling(part, parts, group.layers, consumer.layers[0], consumer.name))
        used |= {group.name, consumer.name}
    strange = [group.name for group in groups if group.name not in used]
    blocks = sorted({group.block for group in groups}, key=lambda block: -1 if block is None else block)
    if strange or blocks != list(range(config.num_hidden_layers)):
        what = f"`{strange[0]}` belongs to no attention or MLP it knows" if strange else "not all blocks were chosen"
        raise ModelError(
            f"llm-pruner removes the same heads and channels from every layer of a block, and in {type(model).__name__} {what}",
            "it needs blocks of separate q, k, v projections and one MLP, and no --include or --exclude",
        )
    if not all(type(model.get_submodule(layer.name)) is nn.Linear for group in groups for layer in group.layers):
        raise ModelError(f"llm-pruner cuts nn.Linear layers, and {type(model).__name__} has others", "use another method")
    return found


def narrow(model: PreTrainedModel, coupling: Coupling, kept: Tensor) -> None:
    """Remove all parts but ``kept`` (ascending indices) from the coupled layers, in place."""
    for layer in coupling.producers:
        module = model.get_submodule(layer.name)
        rows = _positions(kept, layer.d_out // coupling.parts)
        module.weight, module.out_features = _cut(module.weight, rows, 0), len(rows)
        if layer.bias:
            module.bias = _cut(module.bias, rows, 0)
    module = model.get_submodule(coupling.consumer.name)
    columns = _positions(kept, coupling.consumer.d_in // coupling.parts)
    module.weight, module.in_features = _cut(module.weight, columns, 1), len(columns)


def _cut(parameter: nn.Parameter, kept: Tensor, axis: int) -> nn.Parameter:
    return nn.Parameter(parameter.detach().index_select(axis, kept), requires_grad=parameter.requires_grad)


def _positions(kept: Tensor, size: int) -> Tensor:
    return (kept[:, None] * size + torch.arange(size, device=kept.device)).flatten()
