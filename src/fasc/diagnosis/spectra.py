"""How many directions a covariance really has."""

import torch
from jaxtyping import Float
from torch import Tensor


def effective_rank(values: Float[Tensor, " d"]) -> float:
    """``exp(entropy of λ/Σλ)`` (Roy & Vetterli 2007): d for a flat spectrum, 1 for a single direction."""
    share = values.clamp_min(0) / values.clamp_min(0).sum().clamp_min(torch.finfo(values.dtype).tiny)
    return float(torch.exp(torch.special.entr(share).sum()))


def stable_rank(values: Float[Tensor, " d"]) -> float:
    """``tr Σ / λ_max`` of a covariance, i.e. ``‖C‖_F² / ‖C‖₂²`` of its root."""
    return float(values.sum() / values.max().clamp_min(torch.finfo(values.dtype).tiny))


def rank_keeping(energies: Float[Tensor, " r"], share: float) -> int:
    """The smallest rank that keeps ``share`` of the energy; energies descend."""
    total = energies.cumsum(0)
    return min(int((total < share * total[-1]).sum()) + 1, energies.shape[0])


def principal_angles(a: Float[Tensor, "d k"], b: Float[Tensor, "d m"]) -> Float[Tensor, " n"]:
    """Principal angles between two column spaces, in degrees, smallest first (Björck & Golub 1973)."""
    qa, _ = torch.linalg.qr(a)
    qb, _ = torch.linalg.qr(b)
    return torch.rad2deg(torch.linalg.svdvals(qa.mT @ qb).clamp(-1, 1).arccos())
