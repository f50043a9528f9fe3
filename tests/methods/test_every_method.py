"""Properties that every registered method has, on Gaussian data whose moments are known."""

import pytest
import torch

from fasc.statistics.moments import GradientMoment, UnitStatistics, smaller_side
from fasc.planning.options import MethodConfig
from fasc.errors import NumericalError
from fasc.statistics.accumulators import Covariance
from fasc.methods import METHODS
from tests import reference

SHAPES = {"wide": (10, 16), "square": (12, 12), "tall": (20, 9)}
CASES = [
    (name, reading)
    for name in sorted(METHODS)
    for reading in ("orthonormal", "oblique")
    if reading == "orthonormal" or name == "fasc-eq6"
]


def unit(d_out, d_in, seed=0, dtype=torch.float64, damping_free=True):
    """A weight and the statistics of correlated Gaussian inputs and output gradients."""
    g = torch.Generator().manual_seed(seed)
    n = 4000
    x = torch.randn(n, d_in, generator=g, dtype=torch.float64) @ torch.randn(d_in, d_in, generator=g, dtype=torch.float64)
    x = x * torch.logspace(0.5, -0.5, d_in, dtype=torch.float64) + torch.randn(d_in, generator=g, dtype=torch.float64)
    h = torch.randn(n, d_out, generator=g, dtype=torch.float64) @ torch.randn(d_out, d_out, generator=g, dtype=torch.float64)
    h = 0.05 * h * torch.logspace(0.7, -0.7, d_out, dtype=torch.float64) + 0.01 * x @ torch.randn(
        d_in, d_out, generator=g, dtype=torch.float64
    )
    weight = torch.randn(d_out, d_in, generator=g, dtype=torch.float64)
    return weight.to(dtype), statistics_of(weight, x, h), x, h


def statistics_of(weight, x, h):
    side = smaller_side(weight.shape[1], weight.shape[0])
    gradient = h @ weight if side == "input" else h
    moment = GradientMoment(side, Covariance(gradient.mean(0), reference.covariance(gradient)), reference.covariance(x, gradient))
    product = (h @ weight) * x
    extras = {
        "magnitude": x.abs().mean(0),
        "product": product.mT @ product / x.shape[0],
        "rows/unit": (h.square() * x.square().sum(1, keepdim=True)).mean(0),  # every token a sequence of its own
    }
    return UnitStatistics("unit", x.shape[0], Covariance(x.mean(0), reference.covariance(x)), moment, extras)


def decompose(name, reading, weight, statistics, damping=0.0):
    return METHODS[name].decompose(weight, statistics, MethodConfig(name=name, reading=reading, damping=damping))


@pytest.fixture(params=sorted(SHAPES))
def case(request):
    return unit(*SHAPES[request.param])


@pytest.mark.parametrize(("name", "reading"), CASES)
class TestEveryMethod:
    def test_full_rank_is_lossless(self, name, reading, case):
        weight, statistics, x, _ = case
        full = decompose(name, reading, weight, statistics)
        factors = full.truncate(full.full_rank, statistics.input.mean)
        torch.testing.assert_close(factors.dense(), weight, rtol=0, atol=1e-8)
        assert factors.offset.abs().max() < 1e-8
        assert full.full_rank >= min(weight.shape), "rank fraction 1 must be reachable"

    def test_energies_are_sorted_and_non_negative(self, name, reading, case):
        weight, statistics, *_ = case
        energies = decompose(name, reading, weight, statistics).energies
        assert (energies >= 0).all()
        assert (energies.diff() <= 1e-9 * energies[0]).all()
        assert energies[0] > 0

    def test_dropped_energies_are_the_loss_of_the_stated_surrogate(self, name, reading, case):
        weight, statistics, _, h = case
        full = decompose(name, reading, weight, statistics)
        slow = reference.SURROGATE[name]
        for rank in (1, 4, full.full_rank - 1):
            loss = slow(full.truncate(rank, statistics.input.mean), statistics, weight, reference.covariance(h))
            torch.testing.assert_close(full.energies[rank:].sum(), loss, rtol=1e-6, atol=1e-9 * float(full.energies.sum()))

    def test_energies_alone_are_those_of_the_decomposition(self, name, reading, case):
        weight, statistics, *_ = case
        if METHODS[name].energies is None:
            return
        alone = METHODS[name].energies(weight, statistics, MethodConfig(name=name, damping=1e-6))
        torch.testing.assert_close(alone, decompose(name, reading, weight, statistics, damping=1e-6).energies)

    def test_the_mean_output_is_kept_at_every_rank(self, name, reading, case):
        weight, statistics, x, _ = case
        full = decompose(name, reading, weight, statistics)
        for rank in (1, 3, 7):
            factors = full.truncate(rank, statistics.input.mean)
            outputs = x @ factors.dense().mT + factors.offset
            torch.testing.assert_close(outputs.mean(0), (x @ weight.mT).mean(0), rtol=0, atol=1e-8)
            assert factors.offset.abs().max() > 1e-3, "without the offset the mean would be lost"

    def test_error_does_not_grow_with_rank(self, name, reading, case):
        weight, statistics, _, h = case
        full = decompose(name, reading, weight, statistics)
        metric = reference.covariance(h)
        losses = [
            float(reference.SURROGATE[name](full.truncate(r, statistics.input.mean), statistics, weight, metric))
            for r in range(1, full.full_rank + 1)
        ]
        assert all(after <= before + 1e-9 * losses[0] for before, after in zip(losses, losses[1:], strict=False))

    def test_a_rotation_of_the_inputs_changes_nothing_unless_the_method_says_so(self, name, reading, case):
        weight, _, x, h = case
        q, _ = torch.linalg.qr(
            torch.randn(x.shape[1], x.shape[1], generator=torch.Generator().manual_seed(5), dtype=torch.float64)
        )
        plain = decompose(name, reading, weight, statistics_of(weight, x, h)).truncate(5, x.mean(0))
        turned = decompose(name, reading, weight @ q, statistics_of(weight @ q, x @ q, h)).truncate(5, x.mean(0) @ q)
        if not METHODS[name].coordinate_free:
            assert (turned.dense() @ q.mT - plain.dense()).abs().max() > 1e-3
            return
        torch.testing.assert_close(turned.dense() @ q.mT, plain.dense(), rtol=0, atol=1e-6)
        torch.testing.assert_close(turned.offset, plain.offset, rtol=0, atol=1e-6)

    def test_the_scale_of_the_gradients_does_not_matter(self, name, reading, case):
        weight, _, x, h = case
        small = decompose(name, reading, weight, statistics_of(weight, x, 1e-3 * h), damping=1e-6).truncate(5, x.mean(0))
        large = decompose(name, reading, weight, statistics_of(weight, x, 1e3 * h), damping=1e-6).truncate(5, x.mean(0))
        torch.testing.assert_close(small.dense(), large.dense(), rtol=0, atol=1e-7)

    def test_it_is_deterministic_and_leaves_its_inputs_alone(self, name, reading, case):
        weight, statistics, *_ = case
        before = weight.clone(), statistics.input.matrix.clone()
        first = decompose(name, reading, weight, statistics)
        second = decompose(name, reading, weight, statistics)
        assert torch.equal(first.up, second.up)
        assert torch.equal(first.down, second.down)
        assert torch.equal(weight, before[0])
        assert torch.equal(statistics.input.matrix, before[1])

    def test_float32_statistics_agree_with_float64(self, name, reading, case):
        weight, statistics, *_ = case

        def single(covariance):
            return Covariance(covariance.mean.float(), covariance.matrix.float())

        gradient = statistics.gradient
        rounded = UnitStatistics(
            "unit",
            statistics.tokens,
            single(statistics.input),
            GradientMoment(gradient.side, single(gradient.covariance), gradient.cross.float()),
            {key: value.float() for key, value in statistics.extras.items()},
        )
        exact = decompose(name, reading, weight, statistics).truncate(4, statistics.input.mean)
        close = decompose(name, reading, weight, rounded).truncate(4, statistics.input.mean)
        torch.testing.assert_close(close.dense(), exact.dense(), rtol=0, atol=1e-3 * float(exact.dense().abs().max()))

    def test_non_finite_moments_are_refused_by_name_or_give_no_finite_factor(self, name, reading, case):
        weight, statistics, *_ = case
        bad = statistics.input.matrix.clone()
        bad[0, 0] = float("nan")
        extras = {key: value * float("nan") for key, value in statistics.extras.items()}
        broken = UnitStatistics("unit", statistics.tokens, Covariance(statistics.input.mean, bad), statistics.gradient, extras)
        if name == "weight-svd":
            return  # looks at no moment but the mean
        try:
            full = decompose(name, reading, weight, broken)
        except (NumericalError, torch.linalg.LinAlgError):
            return
        assert not torch.isfinite(full.up).all() or not torch.isfinite(full.energies).all()


def test_every_method_states_a_surrogate_that_is_tested():
    assert set(reference.SURROGATE) == set(METHODS)
    for method in METHODS.values():
        assert method.surrogate
        assert method.reference
        assert method.summary.endswith(".")


def exact_objective(x, g, projector):
    """The paper's Eq. 1, measured on the data itself and not through moments: mean of (gᵀ(I−P)x̃)²."""
    centred = x - x.mean(0)
    return ((g * (centred - centred @ projector.mT)).sum(-1) ** 2).mean()


def gaussian_pair(d=12, n=60_000, seed=0):
    """Independent Gaussian x and g: the case in which Eq. 1 equals its first term."""
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(n, d, generator=g, dtype=torch.float64) @ torch.randn(d, d, generator=g, dtype=torch.float64)
    grads = torch.randn(n, d, generator=g, dtype=torch.float64) @ torch.randn(d, d, generator=g, dtype=torch.float64)
    return x, grads


@pytest.mark.parametrize("rank", [3, 6, 9])
def test_fasc_beats_random_projectors_and_every_other_method_on_its_own_objective(rank):
    x, g = gaussian_pair()
    weight = torch.eye(12, dtype=torch.float64)  # then W' is the projector itself, and h = g
    statistics = statistics_of(weight, x, g)
    ours = exact_objective(x, g, decompose("fasc", "orthonormal", weight, statistics).truncate(rank, x.mean(0)).dense())
    generator = torch.Generator().manual_seed(7)
    for trial in range(200):
        basis = torch.randn(12, rank, generator=generator, dtype=torch.float64)
        other = torch.randn(12, rank, generator=generator, dtype=torch.float64) if trial % 2 else basis
        oblique = basis @ torch.linalg.solve(other.mT @ basis, other.mT)
        assert exact_objective(x, g, oblique) > ours
    for name, reading in CASES:
        if name in ("fasc", "two-sided"):
            continue
        theirs = decompose(name, reading, weight, statistics).truncate(rank, x.mean(0)).dense()
        assert exact_objective(x, g, theirs) > ours, name


@pytest.mark.parametrize("shape", sorted(SHAPES))
def test_fasc_equals_two_sided_on_a_one_layer_group(shape):
    weight, statistics, *_ = unit(*SHAPES[shape])
    ours = decompose("fasc", "orthonormal", weight, statistics).truncate(5, statistics.input.mean)
    theirs = decompose("two-sided", "orthonormal", weight, statistics).truncate(5, statistics.input.mean)
    torch.testing.assert_close(ours.dense(), theirs.dense())


@pytest.mark.parametrize("shape", sorted(SHAPES))
def test_the_two_sides_have_the_same_optimum(shape):
    from fasc.linalg.decomposition import decompose_on_inputs, decompose_on_outputs

    weight, statistics, x, h = unit(*SHAPES[shape])
    covariance_x, covariance_h = reference.covariance(x), reference.covariance(h)
    on_inputs = decompose_on_inputs(weight, torch.linalg.cholesky(covariance_x), weight.mT @ covariance_h @ weight)
    on_outputs = decompose_on_outputs(weight, covariance_x, torch.linalg.cholesky(covariance_h))
    for rank in (1, 4, 8):
        torch.testing.assert_close(
            on_inputs.truncate(rank, x.mean(0)).dense(), on_outputs.truncate(rank, x.mean(0)).dense(), rtol=0, atol=1e-6
        )


def test_whitened_is_the_svd_of_the_whitened_weight():
    weight, statistics, x, _ = unit(20, 9)
    values, vectors = torch.linalg.eigh(reference.covariance(x))
    root = vectors @ torch.diag(values.sqrt()) @ vectors.mT
    u, s, vh = torch.linalg.svd(weight @ root, full_matrices=False)
    expected = (u[:, :4] * s[:4]) @ vh[:4] @ torch.linalg.inv(root)
    ours = decompose("whitened", "orthonormal", weight, statistics).truncate(4, x.mean(0)).dense()
    torch.testing.assert_close(ours, expected, rtol=0, atol=1e-8)


def test_oblique_eq6_is_no_projector_unless_lambda_is_right():
    """METHOD: the printed P = Σ v vᵀ is no projector; our oblique reading P = Σ_xx V Vᵀ is one."""
    weight, statistics, x, _ = unit(12, 12)
    full = decompose(
        "fasc-eq6",
        "oblique",
        torch.eye(12, dtype=torch.float64),
        statistics_of(
            torch.eye(12, dtype=torch.float64),
            x,
            torch.randn(x.shape[0], 12, dtype=torch.float64, generator=torch.Generator().manual_seed(0)),
        ),
    )
    v = full.down[:5].mT
    printed = v @ v.mT
    assert (printed @ printed - printed).abs().max() > 1e-2
    ours = full.up[:, :5] @ full.down[:5]
    torch.testing.assert_close(ours @ ours, ours, rtol=0, atol=1e-6)
