"""A confidence interval of ρ, by resampling sequences."""

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

RESAMPLES = 1000


def rho_interval(sketches: Mapping[str, Tensor], rho: float, *, resamples: int = RESAMPLES, seed: int = 0) -> tuple[float, float]:
    """95 % bootstrap interval of ρ over sequences, because the tokens of one sequence are dependent.

    Each resample draws as many sequences as there are, with replacement, and forms ρ from the sketches of their partial moments
    (``SequenceSketches``). A resample is noisier than the sample by about the sample's own noise, which lifts every ρ*: the
    quantiles are therefore taken relative to the median of ρ* and scaled to the exact ρ. The noise of the sketches adds to
    that of the sampling, so the interval errs on the wide side (1.4 × in a test).

    Args:
        sketches: ``sequences/…`` of a group, first axis over sequences.
        rho: the exact ρ.
        resamples: how many.
        seed: of the draws.

    Returns:
        Low and high; both are ρ if there is only one sequence.
    """
    sequences = sketches["sequences/count"].shape[0]
    if sequences < 2:
        return rho, rho
    draws = np.random.default_rng(seed).multinomial(sequences, np.full(sequences, 1 / sequences), size=resamples)
    low, middle, high = np.quantile(_scores(sketches, torch.from_numpy(draws).double()).numpy(), [0.025, 0.5, 0.975])
    return (rho * low / middle, rho * high / middle) if middle > 0 else (rho, rho)


def rho_by_tokens(sketches: Mapping[str, Tensor], rho: float, *, parts: Sequence[int] = (8, 4, 2)) -> dict[int, float]:
    """ρ on the first eighth, quarter and half of the sequences: what is noise falls like 1/√n, what is dependence stays.

    From the sketches, scaled so that all sequences give the exact ρ.

    Args:
        sketches: as for :func:`rho_interval`.
        rho: the exact ρ of all sequences.
        parts: divisors of the number of sequences.

    Returns:
        ρ by number of tokens, ascending; without parts of fewer than two sequences.
    """
    count = sketches["sequences/count"].double()
    sizes = [len(count) // part for part in parts if len(count) // part >= 2] + [len(count)]
    weights = torch.zeros(len(sizes), len(count), dtype=torch.float64)
    for row, size in zip(weights, sizes, strict=True):
        row[:size] = 1
    scores = _scores(sketches, weights)
    scale = rho / float(scores[-1]) if float(scores[-1]) > 0 else 0.0
    return {int(count[:size].sum()): scale * float(score) for size, score in zip(sizes, scores, strict=True)}


def _scores(sketches: Mapping[str, Tensor], weights: Tensor) -> Tensor:
    """ρ of weighted samples of the sequences, as the sketches see it; ``weights`` [samples, sequences]."""
    part = {name: sketches[f"sequences/{name}"].double() for name in ("count", "xx", "gg", "xg")}
    means = {name: sketches[f"sequences/{name}"].double() for name in ("x_left", "x_right", "g_left", "g_right")}
    tokens = (weights @ part["count"])[:, None, None]

    def norm(name: str, left: str, right: str) -> Tensor:
        raw = (weights @ part[name].flatten(1)).view(len(weights), *part[name].shape[1:]) / tokens
        outer = (weights @ means[left])[:, :, None] * (weights @ means[right])[:, None, :] / tokens.square()
        norms: Tensor = torch.linalg.matrix_norm(raw - outer)
        return norms

    scale = (norm("xx", "x_left", "x_right") * norm("gg", "g_left", "g_right")).sqrt()
    scores: Tensor = norm("xg", "x_left", "g_right") / scale.clamp_min(torch.finfo(torch.float64).tiny)
    return scores
