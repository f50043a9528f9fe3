"""How much of one chosen subspace lies in another, beside what chance alone gives."""

from collections.abc import Iterator, Mapping, Sequence
from itertools import combinations
from statistics import quantiles
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor
from transformers import PreTrainedModel

from fasc.errors import StatisticsError
from fasc.methods import Solver
from fasc.model.groups import stacked_weight
from fasc.progress import progress
from fasc.statistics.moments import Statistics

Row = dict[str, Any]


def overlap(a: Float[Tensor, "d k"], b: Float[Tensor, "d k"]) -> float:
    """Mean squared cosine of the principal angles of two column spaces: 1 for the same space, 0 for orthogonal ones.

    It is the share of one subspace that lies in the other, ``‖U_aᵀ U_b‖_F² / k``; of two random ones of dimension k in d it is
    ``k / d`` on average (:func:`chance`).
    """
    qa, _ = torch.linalg.qr(a)
    qb, _ = torch.linalg.qr(b)
    return float((qa.mT @ qb).square().sum()) / a.shape[1]


def chance(rank: int, d: int) -> float:
    """Expected overlap of two uniformly random subspaces: ``k / d``."""
    return rank / d


class Basis(NamedTuple):
    """What a method reads of a group's input, most valuable directions first."""

    columns: Float[Tensor, "d r"]
    """Orthonormal, float32; the first k of them span what rank k reads."""

    directions: int
    """Of the whole decomposition: a rank fraction is of these."""


def reading_bases(model: PreTrainedModel, statistics: Statistics, chosen: Solver, most: float = 1.0) -> dict[str, Basis]:
    """What a method reads of every group's input; all that a comparison needs to keep.

    A method of single layers is applied to all layers of a group as one.

    Args:
        model: dense.
        statistics: with what the method needs of whole groups.
        chosen: the method.
        most: the largest rank fraction that will be compared.

    Raises:
        StatisticsError: a moment is missing.
    """
    bases = {}
    with progress(f"decomposing with {chosen.name}", len(statistics.groups), "groups") as advance, torch.no_grad():
        for name, group in statistics.groups.items():
            unit = group.group.unit()
            down = chosen.decompose(stacked_weight(model, unit), statistics.unit(unit)).down
            rank = max(1, int(most * len(down) + 1e-9))
            bases[name] = Basis(torch.linalg.qr(down[:rank].mT)[0].float(), len(down))
            advance()
    return bases


def compare_subspaces(
    statistics: Statistics, chosen: Mapping[str, Mapping[str, Basis]], rank_fractions: Sequence[float]
) -> list[Row]:
    """The overlap of what was chosen on each pair of calibrations, for every group.

    Args:
        statistics: any of them, for the groups.
        chosen: :func:`reading_bases` by label.
        rank_fractions: of each group's directions, at most what :func:`reading_bases` was asked to keep.

    Returns:
        A row per group, pair and fraction: ``group``, ``block``, ``kind``, ``a``, ``b``, ``rank_fraction``, ``rank``, ``d``,
        ``overlap``, ``chance``.

    Raises:
        StatisticsError: the calibrations are of different groups.
    """
    for label, bases in chosen.items():
        if bases.keys() != statistics.groups.keys():
            raise StatisticsError(f"`{label}` was measured on other layers than the first", "measure both with the same layers")
    rows: list[Row] = []
    for name, group in statistics.groups.items():
        place = {"group": name, "block": group.group.block, "kind": group.group.kind}
        for a, b in combinations(chosen, 2):
            one, other = chosen[a][name], chosen[b][name]
            rows += [place | {"a": a, "b": b} | row for row in _overlaps(one, other, rank_fractions)]
    return rows


def _overlaps(one: Basis, other: Basis, rank_fractions: Sequence[float]) -> Iterator[Row]:
    cosines = one.columns.mT.double() @ other.columns.double()
    d = len(one.columns)
    for fraction in rank_fractions:
        rank = max(1, int(fraction * one.directions + 1e-9))
        value = float(cosines[:rank, :rank].square().sum()) / rank
        yield {"rank_fraction": fraction, "rank": rank, "d": d, "overlap": value, "chance": chance(rank, d)}


def summarise_overlaps(rows: Sequence[Mapping[str, Any]]) -> list[Row]:
    """Median and quartiles over groups, for every pair and rank fraction.

    Returns:
        Rows of ``a``, ``b``, ``rank_fraction``, ``groups``, ``overlap``, ``low``, ``high`` (quartiles), ``chance`` (median), and
        ``above_chance``: the median of ``(overlap − chance) / (1 − chance)``, 0 for random subspaces and 1 for equal ones.
    """
    cases = dict.fromkeys((row["a"], row["b"], row["rank_fraction"]) for row in rows)
    summary = []
    for a, b, fraction in cases:
        chosen = [row for row in rows if (row["a"], row["b"], row["rank_fraction"]) == (a, b, fraction)]
        low, middle, high = _quartiles([row["overlap"] for row in chosen])
        expected = _quartiles([row["chance"] for row in chosen])[1]
        excess = [(row["overlap"] - row["chance"]) / (1 - row["chance"]) for row in chosen if row["chance"] < 1]
        summary.append(
            {
                "a": a,
                "b": b,
                "rank_fraction": fraction,
                "groups": len(chosen),
                "overlap": middle,
                "low": low,
                "high": high,
                "chance": expected,
                "above_chance": _quartiles(excess)[1] if excess else None,
            }
        )
    return summary


def _quartiles(values: Sequence[float]) -> list[float]:
    return quantiles(values, n=4, method="inclusive") if len(values) > 1 else list(values) * 3
