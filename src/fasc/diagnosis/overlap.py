"""How much of one chosen subspace lies in another, beside what chance alone gives."""

from collections.abc import Iterator, Mapping, Sequence
from itertools import combinations
from statistics import quantiles
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from transformers import PreTrainedModel

from fasc.calibration.statistics import Statistics
from fasc.config import MethodConfig
from fasc.errors import StatisticsError
from fasc.methods import decompose_unit, unit_in
from fasc.progress import progress

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


def reading_directions(model: PreTrainedModel, statistics: Statistics, group: str, options: MethodConfig) -> Float[Tensor, "d r"]:
    """What a method reads of a group's input, most valuable direction first: columns; the first k span what rank k reads.

    A method of single layers is applied to all layers of the group as one.

    Raises:
        StatisticsError: a moment is missing.
    """
    found = statistics.groups[group].group
    return decompose_unit(model, statistics, unit_in(found, found.layers), options).down.mT


def compare_subspaces(
    model: PreTrainedModel,
    measured: Mapping[str, Statistics],
    options: MethodConfig,
    rank_fractions: Sequence[float],
) -> list[Row]:
    """The overlap of what a method chooses on each pair of calibrations, for every group.

    Args:
        model: that all of them were measured on.
        measured: statistics by label.
        options: the method.
        rank_fractions: of each group's directions.

    Returns:
        A row per group, pair and fraction: ``group``, ``block``, ``kind``, ``a``, ``b``, ``rank_fraction``, ``rank``, ``d``,
        ``overlap``, ``chance``.

    Raises:
        StatisticsError: the calibrations are of different groups, or lack a moment.
    """
    first = next(iter(measured.values()))
    for label, statistics in measured.items():
        if statistics.groups.keys() != first.groups.keys():
            raise StatisticsError(f"`{label}` was measured on other layers than the first", "measure both with the same layers")
    rows: list[Row] = []
    with progress(f"comparing subspaces of {options.name}", len(first.groups), "groups") as advance, torch.no_grad():
        for name, found in first.groups.items():
            # The first k columns of Q span what the first k directions do, for every k.
            sides = {
                label: torch.linalg.qr(reading_directions(model, statistics, name, options))[0]
                for label, statistics in measured.items()
            }
            place = {"group": name, "block": found.group.block, "kind": found.group.kind}
            for a, b in combinations(sides, 2):
                rows += [
                    place | {"a": a, "b": b} | row for row in _overlaps(sides[a].mT @ sides[b], found.group.d_in, rank_fractions)
                ]
            advance()
    return rows


def _overlaps(cosines: Tensor, d: int, rank_fractions: Sequence[float]) -> Iterator[Row]:
    """From the products of two nested orthonormal bases in ``d`` dimensions."""
    for fraction in rank_fractions:
        rank = max(1, int(fraction * len(cosines) + 1e-9))
        value = float(cosines[:rank, :rank].square().sum()) / rank
        yield {"rank_fraction": fraction, "rank": rank, "d": d, "overlap": value, "chance": chance(rank, d)}


def summarise_overlaps(rows: Sequence[Mapping[str, Any]]) -> list[Row]:
    """Median and quartiles over groups, for every pair and rank fraction.

    Returns:
        Rows of ``a``, ``b``, ``rank_fraction``, ``groups``, ``overlap``, ``low``, ``high`` (quartiles), ``chance`` (median), and
        ``above_chance``: the median of ``(overlap − chance) / (1 − chance)``, 0 for random subspaces and 1 for equal ones.
    """
    cases = dict.fromkeys((row["a"], row["b"], row["rank_fraction"]) for row in rows)
    found = []
    for a, b, fraction in cases:
        chosen = [row for row in rows if (row["a"], row["b"], row["rank_fraction"]) == (a, b, fraction)]
        low, middle, high = _quartiles([row["overlap"] for row in chosen])
        expected = _quartiles([row["chance"] for row in chosen])[1]
        excess = [(row["overlap"] - row["chance"]) / (1 - row["chance"]) for row in chosen if row["chance"] < 1]
        found.append(
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
    return found


def _quartiles(values: Sequence[float]) -> list[float]:
    return quantiles(values, n=4, method="inclusive") if len(values) > 1 else list(values) * 3
