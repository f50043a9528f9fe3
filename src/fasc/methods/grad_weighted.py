"""Gradient-weighted activation PCA, a baseline of the paper."""

from jaxtyping import Float
from torch import Tensor

from fasc.linalg.decomposition import Decomposition
from fasc.linalg.psd import descending_eigh
from fasc.methods._registry import method
from fasc.methods.options import MethodOptions
from fasc.statistics.moments import UnitStatistics


@method(
    "grad-weighted",
    scopes=("group",),
    needs={"input", "product"},
    energy_unit="none",
    surrogate="E‖(I − P)(g ⊙ x)‖²",
    reference="arXiv:2601.07197 §3 (Grad-Weighted SVD)",
    coordinate_free=False,
)
def grad_weighted(weight: Float[Tensor, "o i"], statistics: UnitStatistics, options: MethodOptions) -> Decomposition:
    """Grad-Weighted SVD: PCA of the elementwise product of input and gradient; a subspace, and a poor one."""
    product = statistics.require_extra("product").to(weight)
    energies, basis = descending_eigh((product + product.mT) / 2)
    return Decomposition(down=basis.mT, up=weight @ basis, energies=energies.clamp_min(0))
