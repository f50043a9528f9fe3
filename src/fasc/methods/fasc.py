"""The paper's objective (Eq. 1), solved correctly."""

from jaxtyping import Float
from torch import Tensor

from fasc.linalg.decomposition import Decomposition
from fasc.methods._fisher import fisher_energies, minimise_fisher_loss
from fasc.methods._registry import method
from fasc.methods.options import MethodOptions
from fasc.statistics.moments import UnitStatistics


@method(
    "fasc",
    scopes=("group", "layer"),
    needs={"input", "gradient"},
    energy_unit="nats²/token",
    surrogate="tr((I−P)ᵀ Σ_gg (I−P) Σ_xx)",
    reference="arXiv:2601.07197 Eq. 1, solved in docs/method.md",
    energies=fisher_energies,
)
def fasc(weight: Float[Tensor, "o i"], statistics: UnitStatistics, options: MethodOptions) -> Decomposition:
    """Fisher-aligned subspace: least expected squared change of the loss, one projector per input group."""
    return minimise_fisher_loss(weight, statistics, options)
