"""Positive semidefinite matrices: damping, Cholesky factors, eigenpairs, roots."""

import torch
from jaxtyping import Float
from torch import Tensor

from fasc.errors import NonFiniteError, NotPositiveDefiniteError


def damped(matrix: Float[Tensor, "d d"], damping: float) -> Float[Tensor, "d d"]:
    """``C + λ · tr(C)/d · I``: damping relative to the mean eigenvalue, so that it has no unit."""
    shift = damping * matrix.diagonal().mean()
    result = matrix.clone()
    result.diagonal().add_(shift)
    return result


def descending_eigh(matrix: Float[Tensor, "d d"]) -> tuple[Float[Tensor, " d"], Float[Tensor, "d d"]]:
    """Eigenvalues, largest first, and the eigenvectors as columns in the same order."""
    values, vectors = torch.linalg.eigh(matrix)
    return values.flip(-1), vectors.flip(-1)


def cholesky(matrix: Float[Tensor, "d d"], *, where: str, tokens: int) -> Float[Tensor, "d d"]:
    """Lower Cholesky factor ``L Lᵀ = C``.

    Args:
        matrix: symmetric, positive definite.
        where: which layer and which moment, for the error.
        tokens: how many tokens were averaged, for the error.

    Raises:
        NonFiniteError: the matrix holds NaN or infinity.
        NotPositiveDefiniteError: the matrix is singular or indefinite; nothing is repaired behind the user's back.
    """
    if not torch.isfinite(matrix).all():
        raise NonFiniteError(where, "check the calibration text and the model's weights, or load it as --dtype float32")
    factor: Tensor
    factor, info = torch.linalg.cholesky_ex(matrix)
    if int(info) != 0:
        raise NotPositiveDefiniteError(where, float(torch.linalg.eigvalsh(matrix)[0]), tokens)
    return factor
