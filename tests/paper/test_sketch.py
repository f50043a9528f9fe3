"""The paper's sketches: given up where they cannot show that they are good enough, and within their bound elsewhere."""

import pytest
import scipy.linalg
import torch

from fasc.compression.compress import carry_out
from fasc.edits.structure import parsed, structure_of
from fasc.methods import METHODS, solver
from fasc.stages.plan import plan
from fasc.statistics.collect import collect_moments
from tests.conftest import tiny_model
from tests.methods.problems import data, statistics_of


def problem(*shape):
    weight, x, h = data(*shape)
    return weight, statistics_of(weight, x, h), x


@pytest.mark.parametrize("shape", [(60, 50), (50, 60)])
def test_a_sketch_of_fasc_is_the_exact_solution_within_its_bound(shape):
    weight, statistics, x = problem(*shape)
    exact = solver("fasc", {"damping": 1e-6}).decompose(weight, statistics)
    solution = solver("fasc-sketch", {"damping": 1e-6, "tolerance": 10, "threshold": 0}).at_rank(weight, statistics, 6)
    assert not solution.whole
    optimum, lost = float(exact.energies[6:].sum()), float(exact.energies.sum() - solution.decomposition.energies[:6].sum())
    assert optimum <= lost * (1 + 1e-9)
    assert (lost - optimum) / lost <= solution.notes["lost_bound"] + 1e-12
    ours = solution.decomposition.truncate(6, x.mean(0), weight @ x.mean(0))
    theirs = exact.truncate(6, x.mean(0))
    assert (ours.dense() - theirs.dense()).norm() < 0.05 * theirs.dense().norm()
    torch.testing.assert_close(ours.dense() @ x.mean(0) + ours.offset, weight @ x.mean(0))


def test_a_sketch_that_cannot_show_its_worth_is_not_used():
    weight, statistics, _ = problem(60, 50)
    strict = solver("fasc-sketch", {"damping": 1e-6, "tolerance": 0}).at_rank(weight, statistics, 6)
    assert strict.whole
    assert strict.notes["lost_bound"] > 0
    exact = solver("fasc", {"damping": 1e-6}).decompose(weight, statistics)
    torch.testing.assert_close(strict.decomposition.energies, exact.energies)


def test_a_sketch_is_wide_where_rho_is_above_the_threshold():
    """And a wide sketch loses less."""
    weight, statistics, _ = problem(60, 50)
    narrow, wide = (
        solver("fasc-sketch", {"damping": 1e-6, "tolerance": 1e9, "threshold": threshold}).at_rank(weight, statistics, 6)
        for threshold in (1.0, 0.0)
    )
    assert len(narrow.decomposition.energies) < len(wide.decomposition.energies)
    assert wide.notes["lost_bound"] < narrow.notes["lost_bound"]


@pytest.mark.parametrize("name", ["fasc", "two-sided"])
def test_a_sketched_model_is_close_to_the_exact_one_and_says_what_it_did(name, tokens):
    exact, sketched = tiny_model(), tiny_model()
    statistics = collect_moments(exact, tokens, METHODS[name].needs)
    carry_out(exact, statistics, plan(exact, statistics, method=name, rank_fraction=0.25, damping=1e-3))
    made = plan(sketched, statistics, method=f"{name}-sketch", rank_fraction=0.25, damping=1e-3, tolerance=0.5)
    done = carry_out(sketched, statistics, made)
    notes = [edit.notes for edit in parsed(structure_of(sketched))]
    assert notes == [edit.notes for edit in done.edits]
    assert len(notes) == len(made.edits)
    assert any(not note["exact"] for note in notes)
    assert all(note["exact"] == (note["lost_bound"] > 0.5 or note["lost_bound"] == 0) for note in notes)
    with torch.no_grad():
        a, b = (model(input_ids=tokens).logits for model in (exact, sketched))
    assert 0 < (a - b).norm() < 0.2 * a.norm()
    assert done.method == f"{name}-sketch"


@pytest.mark.parametrize("reading", ["orthonormal", "oblique"])
@pytest.mark.parametrize("wide", [False, True])
def test_the_papers_sketch_of_eq6_says_what_it_lost(reading, wide):
    weight, statistics, _ = problem(50, 60)
    options = {"reading": reading, "sketch": True, "tolerance": 1e9, "threshold": 0.0 if wide else 1.0}
    rank = 10
    sketched = solver("fasc-eq6", options).at_rank(weight, statistics, rank)
    assert not sketched.whole
    # What the exact solution and the sketch keep of the printed problem, from scipy's own solver.
    gg, cross = statistics.gradient.at_input(weight)
    printed = cross @ gg @ cross.mT
    values = scipy.linalg.eigh(printed.numpy(), statistics.input.matrix.numpy(), eigvals_only=True)[::-1]
    down = sketched.decomposition.down[:rank].mT
    inside = scipy.linalg.eigh(
        (down.mT @ printed @ down).numpy(), (down.mT @ statistics.input.matrix @ down).numpy(), eigvals_only=True
    )
    lost, dropped = values[:rank].sum() - inside.sum(), values.sum() - inside.sum()
    assert 0 <= lost / dropped <= sketched.notes["lost_bound"] * (1 + 1e-6)
    strict = solver("fasc-eq6", options | {"tolerance": 0.0}).at_rank(weight, statistics, rank)
    assert strict.whole
    exact = solver("fasc-eq6", {"reading": reading}).decompose(weight, statistics)
    torch.testing.assert_close(strict.decomposition.energies, exact.energies)
