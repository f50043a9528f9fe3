"""Activation PCA: what the paper calls SVD, its baseline."""

from jaxtyping import Float
from torch import Tensor

from fasc.linalg.decomposition import Decomposition
from fasc.linalg.psd import descending_eigh
from fasc.methods._registry import method
from fasc.methods.options import MethodOptions
from fasc.statistics.moments import UnitStatistics, as_float64


@method(
    "svd",
    scopes=("group",),
    needs={"input"},
    energy_unit="input²/token",
    surrogate="E‖x̃ − P x̃‖²",
    reference="arXiv:2601.07197 §2.1",
)
def svd(weight: Float[Tensor, "o i"], statistics: UnitStatistics, options: MethodOptions) -> Decomposition:
    """Activation PCA: keep the input directions of largest variance; blind to the loss."""
    _, covariance = as_float64(statistics.input, weight.device)
    energies, basis = descending_eigh(covariance)
    return Decomposition(down=basis.mT, up=weight @ basis, energies=energies.clamp_min(0))
