"""Whitened SVD: SVD-LLM."""

from jaxtyping import Float
from torch import Tensor

from fasc.linalg.decomposition import Decomposition, decompose_on_inputs, decompose_on_outputs
from fasc.linalg.psd import cholesky, damped
from fasc.methods._registry import method
from fasc.methods.options import MethodOptions
from fasc.statistics.moments import UnitStatistics, as_float64


@method(
    "whitened",
    scopes=("layer",),
    needs={"input"},
    energy_unit="output²/token",
    surrogate="E‖(W − W') x̃‖²",
    reference="arXiv:2403.07378 (SVD-LLM)",
)
def whitened(weight: Float[Tensor, "o i"], statistics: UnitStatistics, options: MethodOptions) -> Decomposition:
    """SVD-LLM: least squared error of each layer's output, by SVD of ``W Σ_xx^½``."""
    if weight.shape[0] <= weight.shape[1]:
        return decompose_on_outputs(weight, statistics.input.matrix.to(weight.device), None)
    _, covariance = as_float64(statistics.input, weight.device)
    where = f"`{statistics.name}`: the inputs'"
    chol = cholesky(damped(covariance, options.damping), where=where, tokens=statistics.tokens)
    return decompose_on_inputs(weight, chol, weight.mT @ weight)
