"""What stands in the place of a dense layer, and cannot be mistaken for it."""

import torch
from torch import Tensor, nn

MARK = "weight"
"""The dense layer's own name for its matrix."""


class Replacement(nn.Module):
    """A module ``d_in → d_out`` in the place of a dense layer, whose factors are ordinary modules with other names.

    A program that does not know of it builds the dense layer, finds no tensor of that layer in the checkpoint, and fills it with
    random numbers and a warning. So the checkpoint holds a tensor under the dense layer's name that has not its shape: there
    every loader stops. It is an empty buffer, and no product reads it (decision 0015).

    It is no ``nn.Linear``: whoever quantises or adapts those finds the factors, each of which is one.

    Args:
        d_in: features of the input.
        d_out: output features.
    """

    weight: Tensor

    def __init__(self, d_in: int, d_out: int) -> None:
        super().__init__()
        self.in_features, self.out_features = d_in, d_out
        self.register_buffer(MARK, mark())

    def product(self) -> tuple[Tensor, Tensor]:
        """The dense weight [d_out, d_in] and bias [d_out] that it stands for."""
        raise NotImplementedError

    def extra_repr(self) -> str:
        """One line for ``print(model)``."""
        return f"in_features={self.in_features}, out_features={self.out_features}"


def mark() -> Tensor:
    """The mark: one dimension without a number, where a dense weight has two."""
    return torch.empty(0)
