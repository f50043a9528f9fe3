"""The paper's printed formula (Eq. 6), literally. It is not the solution of Eq. 1 and collapses models; see docs/method.md."""

import torch
from jaxtyping import Float
from torch import Tensor

from fasc.calibration.statistics import UnitStatistics, as_float64
from fasc.config import MethodConfig
from fasc.errors import NonFiniteError
from fasc.linalg.decomposition import Decomposition
from fasc.linalg.psd import descending_eigh
from fasc.methods._registry import method

EPSILON = 1e-8
"""The paper's ε (B.1): an absolute shift of ``Σ_xx``."""

CUTOFF = 1e-6
"""The paper's τ (App. C): singular values of ``Σ_xx`` below it are left out of the pseudo-inverse."""


@method(
    "fasc-eq6",
    scopes=("group",),
    needs={"input", "gradient", "cross"},
    energy_unit="none",
    surrogate="Σ of the dropped eigenvalues of Σ_xg Σ_gg Σ_xgᵀ v = λ (Σ_xx + εI) v",
    reference="arXiv:2601.07197 Eq. 6, B.1, App. C",
)
def fasc_eq6(weight: Float[Tensor, "o i"], statistics: UnitStatistics, options: MethodConfig) -> Decomposition:
    """The paper's Eq. 6 as printed (readings: orthonormal, oblique); kept for comparison, it collapses models."""
    _, covariance_x = as_float64(statistics.input, weight.device)
    printed = _printed_matrix(weight, statistics)
    covariance_x = covariance_x + EPSILON * torch.eye(covariance_x.shape[0]).to(covariance_x)
    if not bool(torch.isfinite(printed).all() and torch.isfinite(covariance_x).all()):
        raise NonFiniteError(f"`{statistics.name}`: Σ_xg Σ_gg Σ_xgᵀ", "check the calibration text and the model's weights")
    values, vectors = descending_eigh(covariance_x)
    kept = int((values > CUTOFF).sum())
    whiten = vectors[:, :kept] / values[:kept].sqrt()
    energies, rotated = descending_eigh(whiten.mT @ printed @ whiten)
    v = whiten @ rotated
    # The directions that the pseudo-inverse leaves out come last and carry no energy, so that full rank stays lossless.
    rest = vectors[:, kept:]
    energies = torch.cat([energies.clamp_min(0), energies.new_zeros(rest.shape[1])])
    if options.reading == "oblique":
        down = torch.cat([v, rest], dim=1).mT
        reconstruct = torch.cat([covariance_x @ v, rest], dim=1)
        return Decomposition(down=down, up=weight @ reconstruct, energies=energies)
    basis, _ = torch.linalg.qr(torch.cat([v, rest], dim=1))
    return Decomposition(down=basis.mT, up=weight @ basis, energies=energies)


def _printed_matrix(weight: Float[Tensor, "o i"], statistics: UnitStatistics) -> Float[Tensor, "i i"]:
    """``Σ_xg Σ_gg Σ_xgᵀ``, from moments on either side."""
    statistics.require_cross()
    covariance_g, cross = statistics.require_gradient().at_input(weight)
    assert cross is not None  # noqa: S101 - required above
    matrix = cross @ covariance_g @ cross.mT
    return (matrix + matrix.mT) / 2
