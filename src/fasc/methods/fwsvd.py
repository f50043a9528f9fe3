"""Fisher-weighted SVD: FWSVD."""

import torch
from jaxtyping import Float
from torch import Tensor

from fasc.linalg.decomposition import Decomposition
from fasc.methods._registry import method
from fasc.methods.options import MethodOptions
from fasc.statistics.moments import UnitStatistics


@method(
    "fwsvd",
    scopes=("layer",),
    needs={"input", "rows"},
    energy_unit="none",
    surrogate="Σ_o F_o ‖(W − W')_o‖², F_o = Σ_i E[(∂L/∂W_oi)²]",
    reference="arXiv:2207.00112 (FWSVD)",
)
def fwsvd(weight: Float[Tensor, "o i"], statistics: UnitStatistics, options: MethodOptions) -> Decomposition:
    """FWSVD: SVD of the weight with each row scaled by the root of its summed diagonal Fisher."""
    rows = statistics.require_extra("rows").to(weight)
    scale = (rows + options.damping * rows.mean()).sqrt()[:, None]
    u, s, vh = torch.linalg.svd(weight * scale, full_matrices=False)
    return Decomposition(down=vh, up=(u * s) / scale, energies=s.square())
