"""A model is run only as far as some of its blocks, where that is as far as they go."""

import torch
from torch import nn

from fasc.model.blocks import stopping_after


class Chain(nn.Module):
    """Blocks that are called in an order of one's own."""

    def __init__(self, order):
        super().__init__()
        self.layers = nn.ModuleList(nn.Identity() for _ in range(3))
        self.order = order

    def forward(self, x):
        for index in self.order:
            x = self.layers[index](x)
        return x


def calls(order, last, runs=3):
    """Which blocks each run calls."""
    model, seen = Chain(order), []
    for index, layer in enumerate(model.layers):
        layer.register_forward_hook(lambda *_, index=index: seen.append(index))
    found = []
    with stopping_after(model, [f"layers.{index}" for index in range(3)], [f"layers.{index}" for index in last]) as run:
        for _ in range(runs):
            seen.clear()
            run(lambda: model(torch.zeros(1)))
            found.append(list(seen))
    seen.clear()
    model(torch.zeros(1))
    assert seen == list(order), "the model is as it was"
    return found


def test_runs_after_the_first_end_after_the_last_block_that_is_asked_for():
    assert calls([0, 1, 2], last=[0]) == [[0, 1, 2], [0], [0]]
    assert calls([0, 1, 2], last=[0, 1]) == [[0, 1, 2], [0, 1], [0, 1]]
    assert calls([2, 0, 1], last=[2]) == [[2, 0, 1], [2], [2]]


def test_runs_go_to_the_end_where_nothing_is_left_or_a_block_is_called_again():
    assert calls([0, 1, 2], last=[2]) == [[0, 1, 2]] * 3
    assert calls([0, 1, 0, 2], last=[0]) == [[0, 1, 0, 2]] * 3
    assert calls([0, 1, 2], last=[]) == [[0, 1, 2]] * 3
