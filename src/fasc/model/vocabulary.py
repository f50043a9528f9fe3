"""The vocabulary: the table that turns tokens into vectors, and the head that turns vectors into logits; often one matrix."""

from dataclasses import dataclass

import torch
from torch import nn
from transformers import PreTrainedModel

from fasc.model.offload import numbers_of


@dataclass(frozen=True, slots=True)
class Vocabulary:
    """Embedding and head of a model."""

    embedding: str
    """Qualified name of the table."""

    head: str
    """Qualified name of the output layer."""

    tokens: int
    width: int
    tied: bool
    """Whether both are one matrix."""

    scale: float
    """What the embedding multiplies its rows by."""

    bias: bool
    """Of the head."""

    @property
    def matrices(self) -> int:
        """How many there are."""
        return 1 if self.tied else 2

    @property
    def parameters(self) -> int:
        """Of the matrices."""
        return self.matrices * self.tokens * self.width


def find_vocabulary(model: PreTrainedModel) -> Vocabulary | None:
    """Embedding and head, where each is a plain matrix of a row for every token; ``None`` where one is not."""
    table, head = model.get_input_embeddings(), model.get_output_embeddings()
    if not isinstance(table, nn.Embedding) or type(head) is not nn.Linear or table.max_norm is not None:
        return None
    if table.weight.shape != head.weight.shape or numbers_of(table).is_meta:
        return None
    names = {id(module): name for name, module in model.named_modules()}
    with torch.no_grad():
        weight = numbers_of(table)
        row = weight.float().square().sum(1).argmax()
        given, plain = table(row[None])[0].float(), weight[row].float()
        scale = float((given @ plain) / plain.square().sum().clamp_min(1e-30))
        if not torch.allclose(given, scale * plain, rtol=1e-2, atol=1e-4 * float(given.abs().max())):
            return None
    tokens, width = table.weight.shape
    tied = head.weight is table.weight
    return Vocabulary(names[id(table)], names[id(head)], tokens, width, tied, scale, head.bias is not None)
