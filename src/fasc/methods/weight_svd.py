"""Plain truncated SVD of the weight."""

import torch
from jaxtyping import Float
from torch import Tensor

from fasc.linalg.decomposition import Decomposition
from fasc.methods._registry import method
from fasc.methods.options import MethodOptions
from fasc.statistics.moments import UnitStatistics


@method(
    "weight-svd",
    scopes=("layer",),
    needs={"input"},
    energy_unit="weight²",
    surrogate="‖W − W'‖²",
    reference="Eckart & Young 1936",
)
def weight_svd(weight: Float[Tensor, "o i"], statistics: UnitStatistics, options: MethodOptions) -> Decomposition:
    """SVD of the weight alone, blind to data (the mean apart)."""
    u, s, vh = torch.linalg.svd(weight, full_matrices=False)
    return Decomposition(down=vh, up=u * s, energies=s.square())
