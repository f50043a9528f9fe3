"""Units of correlated Gaussian data whose moments are known."""

import torch

from fasc.statistics.accumulators import Covariance
from fasc.statistics.moments import GradientMoment, UnitStatistics, smaller_side
from tests import reference

SHAPES = {"wide": (10, 16), "square": (12, 12), "tall": (20, 9)}


def statistics_of(weight, x, h):
    """The moments of a unit, from its inputs x and output gradients h themselves."""
    side = smaller_side(weight.shape[1], weight.shape[0])
    gradient = h @ weight if side == "input" else h
    moment = GradientMoment(side, Covariance(gradient.mean(0), reference.covariance(gradient)), reference.covariance(x, gradient))
    product = (h @ weight) * x
    extras = {
        "magnitude": x.abs().mean(0),
        "product": product.mT @ product / x.shape[0],
        "rows/unit": (h.square() * x.square().sum(1, keepdim=True)).mean(0),  # every token a sequence of its own
    }
    return UnitStatistics("unit", x.shape[0], Covariance(x.mean(0), reference.covariance(x)), moment, extras)


def data(d_out, d_in, seed=0, tokens=4000):
    """A weight, inputs and output gradients that depend on the inputs a little."""
    g = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=g, dtype=torch.float64)

    x = normal(tokens, d_in) @ normal(d_in, d_in)
    x = x * torch.logspace(0.5, -0.5, d_in, dtype=torch.float64) + normal(d_in)
    h = normal(tokens, d_out) @ normal(d_out, d_out)
    h = 0.05 * h * torch.logspace(0.7, -0.7, d_out, dtype=torch.float64) + 0.01 * x @ normal(d_in, d_out)
    return normal(d_out, d_in), x, h


def independent(size=12, tokens=60_000, seed=0):
    """Independent Gaussian x and g: the case in which the paper's Eq. 1 equals its first term."""
    g = torch.Generator().manual_seed(seed)

    def mixed():
        x = torch.randn(tokens, size, generator=g, dtype=torch.float64)
        return x @ torch.randn(size, size, generator=g, dtype=torch.float64)

    return mixed(), mixed()


def exact_objective(x, g, projector):
    """The paper's Eq. 1, measured on the data itself and not through moments: mean of (gᵀ(I−P)x̃)²."""
    centred = x - x.mean(0)
    return ((g * (centred - centred @ projector.mT)).sum(-1) ** 2).mean()
