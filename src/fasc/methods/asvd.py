"""Activation-aware SVD: ASVD."""

import torch
from jaxtyping import Float
from torch import Tensor

from fasc.linalg.decomposition import Decomposition
from fasc.methods._registry import method
from fasc.methods.options import MethodOptions
from fasc.statistics.moments import UnitStatistics

ALPHA = 0.5
"""The paper's exponent of the channels' magnitudes."""


@method(
    "asvd",
    scopes=("layer",),
    needs={"input", "magnitude"},
    energy_unit="none",
    surrogate="‖(W − W') diag(E|x|)^½‖²",
    reference="arXiv:2312.05821 (ASVD)",
    coordinate_free=False,
)
def asvd(weight: Float[Tensor, "o i"], statistics: UnitStatistics, options: MethodOptions) -> Decomposition:
    """ASVD: SVD of the weight with each input channel scaled by its mean magnitude to the power ½."""
    magnitude = statistics.require_extra("magnitude").to(weight)
    scale = (magnitude + options.damping * magnitude.mean()) ** ALPHA
    u, s, vh = torch.linalg.svd(weight * scale, full_matrices=False)
    return Decomposition(down=vh / scale, up=u * s, energies=s.square())
