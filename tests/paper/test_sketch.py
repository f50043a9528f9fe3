"""Sketches: as good as they say, and given up where they cannot show it."""

import pytest
import torch

from fasc import pipeline
from fasc.statistics.collect import collect
from fasc.compression.compress import compress
from fasc.planning.options import BudgetConfig, MethodConfig
from fasc.linalg.sketch import gaussian, residual_norms, sketch_width, sketched_eigenpairs
from fasc.methods import METHODS
from tests.conftest import tiny_model
from tests.methods.test_every_method import unit


def spectrum(kind, d=120):
    j = torch.arange(1, d + 1, dtype=torch.float64)
    return {"fast": torch.exp(-0.15 * j), "slow": 1 / j, "flat": torch.ones(d, dtype=torch.float64)}[kind]


def operator(values, seed=0):
    g = torch.Generator().manual_seed(seed)
    q, _ = torch.linalg.qr(torch.randn(len(values), len(values), generator=g, dtype=torch.float64))
    return (q * values) @ q.mT


@pytest.mark.parametrize("kind", ["fast", "slow", "flat"])
@pytest.mark.parametrize("seed", range(5))
def test_the_bound_holds_whatever_the_decay(kind, seed):
    values, rank = spectrum(kind), 15
    matrix = operator(values, seed)
    start = gaussian(120, 30, matrix, seed=seed)
    for power in (0, 2):
        pairs = sketched_eigenpairs(lambda v: matrix @ v, start, trace=float(matrix.trace()), power=power, seed=seed)
        lost = float(values[:rank].sum() - pairs.values[:rank].sum())
        assert -1e-9 <= lost <= pairs.lost_bound(rank) + 1e-9
        assert pairs.dropped(rank) == pytest.approx(float(values[rank:].sum()) + lost, abs=1e-8)
        estimate = pairs.lost_estimate(rank, residual_norms(lambda v: matrix @ v, pairs))
        assert 0 <= estimate <= pairs.lost_bound(rank)
        if kind == "fast" and power == 2:
            assert lost < 1e-6
            assert estimate == pytest.approx(lost, abs=1e-6)


def test_power_iterations_help_where_the_decay_is_slow():
    matrix = operator(spectrum("slow"))
    start = gaussian(120, 30, matrix, seed=0)
    kept = [
        float(sketched_eigenpairs(lambda v: matrix @ v, start, trace=1.0, power=power).values[:15].sum()) for power in (0, 1, 3)
    ]
    assert kept == sorted(kept)
    assert kept[0] < kept[2]


@pytest.mark.parametrize("shape", [(60, 50), (50, 60)])
def test_a_sketch_of_fasc_is_the_exact_solution_within_its_bound(shape):
    weight, statistics, x, _ = unit(*shape)
    exact = METHODS["fasc"].decompose(weight, statistics, MethodConfig(damping=1e-6))
    sketched = METHODS["fasc"].sketch(weight, statistics, MethodConfig(damping=1e-6, sketch_tolerance=10), 6, wide=True)
    assert not sketched.exact
    optimum, found = float(exact.energies[6:].sum()), float(exact.energies.sum() - sketched.decomposition.energies[:6].sum())
    assert optimum <= found * (1 + 1e-9)
    assert (found - optimum) / found <= sketched.lost_bound + 1e-12
    ours = sketched.decomposition.truncate(6, x.mean(0), weight @ x.mean(0))
    theirs = exact.truncate(6, x.mean(0))
    assert (ours.dense() - theirs.dense()).norm() < 0.05 * theirs.dense().norm()
    torch.testing.assert_close(ours.dense() @ x.mean(0) + ours.offset, weight @ x.mean(0))


def test_a_sketch_that_cannot_show_its_worth_is_not_used():
    weight, statistics, *_ = unit(60, 50)
    strict = METHODS["fasc"].sketch(weight, statistics, MethodConfig(damping=1e-6, sketch_tolerance=0), 6)
    assert strict.exact
    assert strict.lost_bound > 0
    exact = METHODS["fasc"].decompose(weight, statistics, MethodConfig(damping=1e-6))
    torch.testing.assert_close(strict.decomposition.energies, exact.energies)


def test_sizes_are_those_of_the_paper():
    assert sketch_width(64, 1024, wide=False) == 128
    assert sketch_width(64, 1024, wide=True) == 256
    assert sketch_width(400, 1024, wide=True) == 512
    assert sketch_width(600, 1024, wide=False) == 1024


def test_a_sketched_model_is_close_to_the_exact_one_and_says_what_it_did(tokens):
    exact, sketched = tiny_model(), tiny_model()
    options = MethodConfig(damping=1e-3, sketch=True, sketch_tolerance=0.5)
    statistics = collect(exact, tokens, METHODS["fasc"].needs)
    plan = pipeline.plan(exact, "fasc", BudgetConfig(rank_fraction=0.25))
    compress(exact, statistics, plan, MethodConfig(damping=1e-3))
    done = compress(sketched, statistics, plan, options)
    notes = [entry["sketch"] for entry in sketched.config.quantization_config.units]
    assert len(notes) == len(plan.units)
    assert any(not note["exact"] for note in notes)
    assert all(note["exact"] == (note["lost_bound"] > 0.5 or note["lost_bound"] == 0) for note in notes)
    with torch.no_grad():
        a, b = (model(input_ids=tokens).logits for model in (exact, sketched))
    assert (a - b).norm() < 0.2 * a.norm()
    assert done.method == "fasc"


@pytest.mark.parametrize("reading", ["orthonormal", "oblique"])
@pytest.mark.parametrize("wide", [False, True])
def test_the_papers_sketch_of_eq6_says_what_it_lost(reading, wide):
    weight, statistics, *_ = unit(50, 60)
    options = MethodConfig(name="fasc-eq6", reading=reading, sketch_tolerance=1e9)
    rank = 10
    sketched = METHODS["fasc-eq6"].sketch(weight, statistics, options, rank, wide=wide)
    assert not sketched.exact
    # What the exact solution and the sketch keep of the printed problem, from scipy's own solver.
    import scipy.linalg

    gg, cross = statistics.gradient.at_input(weight)
    printed = cross @ gg @ cross.mT
    values = scipy.linalg.eigh(printed.numpy(), statistics.input.matrix.numpy(), eigvals_only=True)[::-1]
    down = sketched.decomposition.down[:rank].mT
    inside = scipy.linalg.eigh(
        (down.mT @ printed @ down).numpy(), (down.mT @ statistics.input.matrix @ down).numpy(), eigvals_only=True
    )
    lost, dropped = values[:rank].sum() - inside.sum(), values.sum() - inside.sum()
    assert 0 <= lost / dropped <= sketched.lost_bound * (1 + 1e-6)
    strict = METHODS["fasc-eq6"].sketch(weight, statistics, options.model_copy(update={"sketch_tolerance": 0.0}), rank)
    assert strict.exact
    exact = METHODS["fasc-eq6"].decompose(weight, statistics, options)
    torch.testing.assert_close(strict.decomposition.energies, exact.energies)
