"""The Fisher objective with only the diagonal of the gradient moment, a baseline of the paper."""

import torch
from jaxtyping import Float
from torch import Tensor

from fasc.linalg.decomposition import Decomposition, decompose_on_inputs
from fasc.linalg.psd import cholesky, damped
from fasc.methods._registry import method
from fasc.methods.options import MethodOptions
from fasc.statistics.moments import UnitStatistics, as_float64


@method(
    "fisher-diag",
    scopes=("group",),
    needs={"input", "gradient"},
    energy_unit="none",
    surrogate="tr((I−P)ᵀ diag(Σ_gg) (I−P) Σ_xx)",
    reference="arXiv:2601.07197 §3 (Fisher-Diag)",
    coordinate_free=False,
)
def fisher_diag(weight: Float[Tensor, "o i"], statistics: UnitStatistics, options: MethodOptions) -> Decomposition:
    """Fisher-Diag: the objective of `fasc` with every gradient coordinate taken by itself."""
    gradient = statistics.require_gradient()
    _, covariance_x = as_float64(statistics.input, weight.device)
    _, covariance_g = as_float64(gradient.covariance, weight.device)
    diagonal = (covariance_g @ weight * weight).sum(0) if gradient.side == "output" else covariance_g.diagonal()
    where = f"`{statistics.name}`: the inputs'"
    chol = cholesky(damped(covariance_x, options.damping), where=where, tokens=statistics.tokens)
    return decompose_on_inputs(weight, chol, torch.diag(diagonal))
