"""Units of known weights in a layout: what a layout's modules are held against."""

from dataclasses import dataclass

import torch
from torch import nn

from fasc.layouts import LAYOUTS, FactoredLayout
from fasc.linalg.decomposition import Factorization
from fasc.model.groups import Unit
from fasc.model.layers import Layer
from fasc.statistics.accumulators import Covariance

FACTORED = sorted(name for name, layout in LAYOUTS.items() if isinstance(layout, FactoredLayout))
"""The registered layouts that an edit can put in the place of dense layers."""

SHAPES = {
    "one layer": (12, (10,)),
    "one tall layer": (7, (15,)),
    "one row": (9, (1,)),
    "three layers": (12, (10, 6, 8)),
    "three layers, one of a single row": (12, (8, 1, 5)),
    "three layers, one without pivots": (12, (8, 6, 5)),
}
"""``d_in`` and the ``d_out`` of each layer."""

RANKS = [1, 4, "largest"]


@dataclass(frozen=True)
class Stored:
    """A unit in a layout, and what it must compute."""

    layout: FactoredLayout
    unit: Unit
    rank: int
    facts: dict
    states: list
    modules: nn.ModuleList
    """One for each layer, float64."""

    weights: tuple
    """``up · down`` of each layer, [d_out, d_in]."""

    biases: tuple
    """[d_out] of each."""

    def inputs(self, *shape):
        generator = torch.Generator().manual_seed(7)
        return torch.randn(*shape, self.unit.d_in, generator=generator, dtype=torch.float64)

    def outputs(self, x):
        """What the layers must give."""
        return [x @ weight.mT + bias for weight, bias in zip(self.weights, self.biases, strict=True)]

    def linears(self):
        return [module for module in self.modules.modules() if isinstance(module, nn.Linear)]


def unit_of(shape):
    d_in, d_outs = SHAPES[shape]
    layers = tuple(Layer(f"block.{index}", d_in, d_out, bias=False) for index, d_out in enumerate(d_outs))
    return Unit("block.0" if len(layers) == 1 else "block.all", layers)


def rank_of(unit, rank):
    """A rank of ``RANKS`` that the unit can have."""
    most = max(1, min(unit.d_in, unit.d_out) - 1)
    return most if rank == "largest" else min(rank, most)


def factors_of(unit, rank, shape="three layers"):
    """Random factors; where the shape says so, one layer's rows are large enough to be pivots, or too small."""
    generator = torch.Generator().manual_seed(0)
    up = torch.randn(unit.d_out, rank, generator=generator, dtype=torch.float64)
    scale = {"three layers, one of a single row": 10.0, "three layers, one without pivots": 1e-3}.get(shape, 1.0)
    start = unit.layers[0].d_out
    up[start : start + (unit.layers[1].d_out if len(unit.layers) > 1 else 0)] *= scale
    down = torch.randn(rank, unit.d_in, generator=generator, dtype=torch.float64)
    bias = torch.randn(unit.d_out, generator=generator, dtype=torch.float64)
    root = torch.randn(unit.d_in, unit.d_in, generator=generator, dtype=torch.float64)
    inputs = Covariance(torch.randn(unit.d_in, generator=generator).float(), (root @ root.mT).float())
    return Factorization(down=down, up=up, offset=torch.zeros(unit.d_out, dtype=torch.float64)), bias, inputs


def empty(layout, unit, rank, facts):
    """The layout's modules as compression and loading make them: without contents."""
    with torch.device("meta"):
        return nn.ModuleList(layout.build(unit, rank, facts)).double().to_empty(device="cpu")


def stored(name, shape, rank):
    """A unit of random factors in a layout."""
    layout, unit = LAYOUTS[name], unit_of(shape)
    rank = rank_of(unit, rank)
    factors, bias, inputs = factors_of(unit, rank, shape)
    encoded = layout.encode(unit, factors, bias, inputs)
    layout.check(unit, rank, encoded.facts)
    modules = empty(layout, unit, rank, encoded.facts)
    for module, state in zip(modules, encoded.states, strict=True):
        module.load_state_dict(state)
    sizes = [layer.d_out for layer in unit.layers]
    return Stored(
        layout, unit, rank, dict(encoded.facts), list(encoded.states), modules, factors.dense().split(sizes), bias.split(sizes)
    )
