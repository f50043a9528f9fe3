"""Two-sided whitening (K-FAC), per layer."""

from jaxtyping import Float
from torch import Tensor

from fasc.linalg.decomposition import Decomposition
from fasc.methods._fisher import fisher_energies, minimise_fisher_loss
from fasc.methods._registry import method
from fasc.methods.options import MethodOptions
from fasc.statistics.moments import UnitStatistics


@method(
    "two-sided",
    scopes=("layer",),
    needs={"input", "gradient"},
    energy_unit="nats²/token",
    surrogate="‖Σ_hh^½ (W − W') Σ_xx^½‖²",
    reference="arXiv:1503.05671 (K-FAC); GFWSVD; OBD-LLM",
    energies=fisher_energies,
)
def two_sided(weight: Float[Tensor, "o i"], statistics: UnitStatistics, options: MethodOptions) -> Decomposition:
    """K-FAC two-sided whitening: the same loss as `fasc`, with separate factors for every layer."""
    return minimise_fisher_loss(weight, statistics, options)
