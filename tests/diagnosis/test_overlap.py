"""Overlaps of subspaces against their chance level."""

import pytest
import torch

from fasc.diagnosis.overlap import chance, compare_subspaces, overlap, reading_bases, summarise_overlaps
from fasc.errors import StatisticsError
from fasc.methods import METHODS, solver
from fasc.model.options import LayersConfig
from fasc.statistics.collect import collect_moments
from fasc.statistics.options import CalibrationConfig
from tests.conftest import tiny_model

FASC = solver("fasc", {"damping": 1e-3})


def random_basis(d, k, generator):
    return torch.linalg.qr(torch.randn(d, k, generator=generator, dtype=torch.float64))[0]


def test_equal_spaces_overlap_wholly_and_orthogonal_ones_not_at_all():
    generator = torch.Generator().manual_seed(0)
    basis = random_basis(20, 20, generator)
    a, b = basis[:, :6], basis[:, 6:12]
    mixed = a @ torch.randn(6, 6, generator=generator, dtype=torch.float64)
    assert overlap(a, mixed) == pytest.approx(1)
    assert overlap(a, b) == pytest.approx(0, abs=1e-12)
    half = torch.cat([a[:, :3], b[:, :3]], dim=1)
    assert overlap(a, half) == pytest.approx(0.5)


@pytest.mark.parametrize(("d", "k"), [(16, 8), (40, 5)])
def test_random_spaces_overlap_by_chance(d, k):
    generator = torch.Generator().manual_seed(1)
    overlaps = [overlap(random_basis(d, k, generator), random_basis(d, k, generator)) for _ in range(200)]
    assert sum(overlaps) / len(overlaps) == pytest.approx(chance(k, d), rel=0.05)


def measured(model, tokens, needs=METHODS["fasc"].needs):
    return collect_moments(model, tokens, needs, calibration=CalibrationConfig(batch_tokens=160))


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_the_same_text_chooses_the_same_subspaces_and_other_text_others(architecture, tokens):
    model = tiny_model(architecture)
    one, other = measured(model, tokens[:12]), measured(model, tokens[12:])
    ours, theirs = reading_bases(model, one, FASC), reading_bases(model, other, FASC)
    rows = compare_subspaces(one, {"a": ours, "again": ours, "b": theirs}, [0.25, 1.0])
    assert len(rows) == len(one.groups) * 3 * 2
    for row in rows:
        assert row["chance"] == row["rank"] / row["d"]
        if row["rank_fraction"] == 1.0 or (row["a"], row["b"]) == ("a", "again"):  # at full rank: what the weight reads
            assert row["overlap"] == pytest.approx(1, abs=1e-6)
        else:
            assert -1e-6 <= row["overlap"] < 1
    summary = {(row["a"], row["b"], row["rank_fraction"]): row for row in summarise_overlaps(rows)}
    assert summary["a", "again", 0.25]["above_chance"] == pytest.approx(1)
    assert summary["a", "b", 0.25]["chance"] < summary["a", "b", 0.25]["overlap"] < 0.99


def test_bases_need_not_be_kept_beyond_the_largest_rank(tokens):
    model = tiny_model()
    moments = {"a": measured(model, tokens[:12]), "b": measured(model, tokens[12:])}
    whole, short = (
        compare_subspaces(moments["a"], {label: reading_bases(model, one, FASC, most) for label, one in moments.items()}, [0.25])
        for most in (1.0, 0.25)
    )
    assert [row["overlap"] for row in short] == pytest.approx([row["overlap"] for row in whole], abs=1e-5)


def test_the_summary_is_the_median_over_groups_with_its_quartiles():
    rows = [{"a": "a", "b": "b", "rank_fraction": 0.5, "overlap": value, "chance": 0.2} for value in (0.9, 0.3, 0.5, 0.7, 0.2)]
    (row,) = summarise_overlaps(rows)
    assert (row["low"], row["overlap"], row["high"]) == pytest.approx((0.3, 0.5, 0.7))
    assert row["above_chance"] == pytest.approx((0.5 - 0.2) / 0.8)
    assert row["groups"] == 5


def test_statistics_of_other_layers_are_refused(model, tokens):
    some = collect_moments(model, tokens, METHODS["fasc"].needs, layers=LayersConfig(include=("*.mlp.*",)))
    with pytest.raises(StatisticsError, match="other layers"):
        compare_subspaces(measured(model, tokens), {"b": reading_bases(model, some, FASC)}, [0.5])
