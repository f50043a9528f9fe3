"""What every registered method owes, on Gaussian data whose moments are known."""

from dataclasses import replace

import pytest
import torch

from fasc.errors import NumericalError, StatisticsError, UnknownNameError, UsageError
from fasc.methods import METHODS, get_method, solver
from fasc.methods.options import MethodOptions
from fasc.planning.needs import solver_of
from fasc.planning.options import MethodConfig
from fasc.statistics.accumulators import Covariance
from fasc.statistics.moments import GradientMoment, Need, UnitStatistics
from tests import reference
from tests.methods.problems import SHAPES, data, statistics_of

VARIANTS = {
    "fasc-eq6": [{}, {"reading": "oblique"}, {"sketch": True}, {"sketch": True, "reading": "oblique"}],
    "fasc-sketch": [{}, {"tolerance": 0.5}],
    "two-sided-sketch": [{}, {"tolerance": 0.5}],
}
"""Options that change what a method does."""

CASES = [(name, options) for name in sorted(METHODS) for options in VARIANTS.get(name, [{}])]
every_method = pytest.mark.parametrize(
    ("name", "options"), CASES, ids=["-".join([name, *map(str, options.values())]) for name, options in CASES]
)
every_name = pytest.mark.parametrize("name", sorted(METHODS))


def chosen(name, options, damping=0.0):
    return solver(name, {**options, "damping": damping})


@pytest.fixture(params=sorted(SHAPES))
def case(request):
    weight, x, h = data(*SHAPES[request.param])
    return weight, statistics_of(weight, x, h), x, h


def small(case, name, options, rank=5, damping=0.0):
    """The product at a rank, and the correction of the mean."""
    weight, statistics, *_ = case
    factors = chosen(name, options, damping).decompose(weight, statistics).truncate(rank, statistics.input.mean.to(weight))
    return factors.dense(), factors.offset


@every_method
class TestEveryMethod:
    def test_full_rank_is_lossless(self, name, options, case):
        weight, statistics, *_ = case
        full = chosen(name, options).decompose(weight, statistics)
        factors = full.truncate(full.full_rank, statistics.input.mean)
        torch.testing.assert_close(factors.dense(), weight, rtol=0, atol=1e-8)
        assert factors.offset.abs().max() < 1e-8
        assert full.full_rank >= min(weight.shape), "rank fraction 1 must be reachable"

    def test_energies_are_sorted_and_non_negative(self, name, options, case):
        weight, statistics, *_ = case
        energies = chosen(name, options).decompose(weight, statistics).energies
        assert (energies >= 0).all()
        assert (energies.diff() <= 1e-9 * energies[0]).all()
        assert energies[0] > 0

    def test_dropped_energies_are_the_loss_of_the_stated_surrogate(self, name, options, case):
        weight, statistics, _, h = case
        full = chosen(name, options).decompose(weight, statistics)
        slow = reference.SURROGATE[name]
        for rank in (1, 4, full.full_rank - 1):
            loss = slow(full.truncate(rank, statistics.input.mean), statistics, weight, reference.covariance(h))
            torch.testing.assert_close(full.energies[rank:].sum(), loss, rtol=1e-6, atol=1e-9 * float(full.energies.sum()))

    def test_the_surrogates_error_does_not_grow_with_rank(self, name, options, case):
        weight, statistics, _, h = case
        full = chosen(name, options).decompose(weight, statistics)
        metric = reference.covariance(h)
        losses = [
            float(reference.SURROGATE[name](full.truncate(r, statistics.input.mean), statistics, weight, metric))
            for r in range(1, full.full_rank + 1)
        ]
        assert all(after <= before + 1e-9 * losses[0] for before, after in zip(losses, losses[1:], strict=False))

    def test_energies_alone_are_those_of_the_decomposition_or_are_not_offered(self, name, options, case):
        weight, statistics, *_ = case
        one = chosen(name, options, damping=1e-6)
        energies = one.energies(weight, statistics)
        assert (energies is None) == (METHODS[name].energies is None)
        assert (energies is None) == (not METHODS[name].is_loss), "plans forecast from them; only a loss in nats is one"
        if energies is not None:
            torch.testing.assert_close(energies, one.decompose(weight, statistics).energies)

    def test_a_solution_for_one_rank_is_the_decomposition_or_says_what_it_lost(self, name, options, case):
        weight, statistics, _, h = case
        one = chosen(name, options, damping=1e-6)
        sketches = METHODS[name].at_rank is not None and options.get("sketch", name != "fasc-eq6")
        for rank in (1, 2, 5):
            solution, full = one.at_rank(weight, statistics, rank), one.decompose(weight, statistics)
            factors, best = (part.truncate(rank, statistics.input.mean) for part in (solution.decomposition, full))
            assert factors.down.shape == (rank, weight.shape[1])
            assert bool(solution.notes) == sketches
            if solution.whole:
                torch.testing.assert_close(factors.dense(), best.dense())
                continue
            assert solution.notes["lost_bound"] <= one.options.tolerance
            if METHODS[name].is_loss:
                slow, metric = reference.SURROGATE[name], reference.covariance(h)
                losses = [float(slow(part, statistics, weight, metric)) for part in (factors, best)]
                assert losses[0] <= losses[1] * (1 + one.options.tolerance + 1e-5)

    def test_the_mean_output_is_the_same_at_every_rank(self, name, options, case):
        weight, statistics, x, _ = case
        full = chosen(name, options).decompose(weight, statistics)
        for rank in (1, 3, 7):
            factors = full.truncate(rank, statistics.input.mean)
            outputs = x @ factors.dense().mT + factors.offset
            torch.testing.assert_close(outputs.mean(0), (x @ weight.mT).mean(0), rtol=0, atol=1e-8)
            assert factors.offset.abs().max() > 1e-3, "without the offset the mean would be lost"

    def test_a_rotation_of_the_inputs_changes_nothing_unless_the_method_says_so(self, name, options, case):
        weight, _, x, h = case
        draw = torch.Generator().manual_seed(5)
        q, _ = torch.linalg.qr(torch.randn(x.shape[1], x.shape[1], generator=draw, dtype=torch.float64))
        plain = small(case, name, options)
        turned = small((weight @ q, statistics_of(weight @ q, x @ q, h)), name, options)
        if METHODS[name].coordinate_free:
            torch.testing.assert_close(turned[0] @ q.mT, plain[0], rtol=0, atol=1e-6)
            torch.testing.assert_close(turned[1], plain[1], rtol=0, atol=1e-6)
        else:
            assert (turned[0] @ q.mT - plain[0]).abs().max() > 1e-3

    def test_the_order_of_inputs_and_outputs_does_not_matter(self, name, options, case):
        weight, _, x, h = case
        plain = small(case, name, options)[0]
        draw = torch.Generator().manual_seed(3)
        rows, columns = (torch.randperm(size, generator=draw) for size in weight.shape)
        turned = weight[rows][:, columns]
        other = small((turned, statistics_of(turned, x[:, columns], h[:, rows])), name, options)[0]
        torch.testing.assert_close(other, plain[rows][:, columns], rtol=0, atol=1e-6)

    def test_the_unit_of_the_inputs_does_not_matter(self, name, options, case):
        weight, _, x, h = case
        plain = small(case, name, options)
        other = small((weight / 8, statistics_of(weight / 8, 8 * x, h)), name, options)
        error = 1e-2 if name == "fasc-eq6" else 1e-6  # its ε is absolute, as the paper prints it (B.1)
        torch.testing.assert_close(8 * other[0], plain[0], rtol=0, atol=error)
        torch.testing.assert_close(other[1], plain[1], rtol=0, atol=error)

    def test_the_scale_of_the_gradients_does_not_matter(self, name, options, case):
        weight, _, x, h = case
        products = [small((weight, statistics_of(weight, x, scale * h)), name, options, damping=1e-6)[0] for scale in (1e-3, 1e3)]
        torch.testing.assert_close(*products, rtol=0, atol=1e-7)

    def test_it_is_deterministic_and_leaves_its_inputs_alone(self, name, options, case):
        weight, statistics, *_ = case
        tensors = [weight, *parts_of(statistics)]
        before = [tensor.clone() for tensor in tensors]
        for solve in (
            lambda: chosen(name, options).decompose(weight, statistics),
            lambda: at_rank(name, options, weight, statistics),
        ):
            first, second = solve(), solve()
            assert torch.equal(first.up, second.up)
            assert torch.equal(first.down, second.down)
        assert all(torch.equal(*pair) for pair in zip(tensors, before, strict=True))

    def test_float32_statistics_agree_with_float64(self, name, options, case):
        weight, statistics, *_ = case
        exact = small(case, name, options, rank=4)[0]
        close = small((weight, changed(statistics, lambda tensor: tensor.float())), name, options, rank=4)[0]
        torch.testing.assert_close(close, exact, rtol=0, atol=1e-3 * float(exact.abs().max()))

    def test_it_needs_what_it_declares_and_nothing_else(self, name, options, case):
        """Moments that it does not declare may be absent, or anything."""
        weight, statistics, *_ = case
        plain = small(case, name, options)
        for other in (bare(statistics, METHODS[name].moments), ruined(statistics, all_moments() - METHODS[name].moments)):
            assert all(torch.equal(*pair) for pair in zip(small((weight, other), name, options), plain, strict=True))

    def test_a_declared_moment_that_is_absent_is_asked_for(self, name, options, case):
        weight, statistics, *_ = case
        for moment in METHODS[name].moments - {"input"}:
            with pytest.raises(StatisticsError, match=r"`unit`: the statistics hold no .*collect again"):
                chosen(name, options).decompose(weight, bare(statistics, METHODS[name].moments - {moment}))

    def test_a_declared_moment_that_is_not_finite_gives_no_finite_solution(self, name, options, case):
        weight, statistics, *_ = case
        for moment in METHODS[name].moments:
            broken = ruined(statistics, {moment})
            try:
                full = chosen(name, options, damping=1e-6).decompose(weight, broken)
            except (NumericalError, torch.linalg.LinAlgError):
                continue
            factors = full.truncate(3, broken.input.mean)
            assert not all(bool(part.isfinite().all()) for part in (factors.up, factors.down, factors.offset)), moment

    def test_damping_is_relative_and_small_damping_changes_little(self, name, options, case):
        plain, damped = (small(case, name, options, damping=damping)[0] for damping in (0.0, 1e-9))
        torch.testing.assert_close(damped, plain, rtol=0, atol=1e-5)


def at_rank(name, options, weight, statistics):
    return chosen(name, options).at_rank(weight, statistics, 3).decomposition


def all_moments():
    return frozenset().union(*(method.moments for method in METHODS.values()))


def parts_of(statistics):
    gradient = statistics.gradient
    covariances = [part for one in (statistics.input, gradient.covariance) for part in (one.mean, one.matrix)]
    return [*covariances, gradient.cross, *statistics.extras.values()]


def changed(statistics, change, moments=None):
    """The statistics with some moments changed; by default all."""

    def of(moment, tensor):
        return change(tensor) if moments is None or moment in moments else tensor

    def covariance(moment, one):
        return Covariance(of(moment, one.mean), of(moment, one.matrix))

    gradient = statistics.gradient
    moment = GradientMoment(gradient.side, covariance("gradient", gradient.covariance), of("cross", gradient.cross))
    extras = {key: of(key.partition("/")[0], value) for key, value in statistics.extras.items()}
    return UnitStatistics(statistics.name, statistics.tokens, covariance("input", statistics.input), moment, extras)


def ruined(statistics, moments):
    return changed(statistics, lambda tensor: tensor * float("nan"), moments)


def bare(statistics, moments):
    """The statistics of a collection that was asked for these moments alone."""
    gradient = statistics.gradient if moments & {"gradient", "cross"} else None
    if gradient is not None and "cross" not in moments:
        gradient = replace(gradient, cross=None)
    if gradient is not None and "gradient" not in moments:
        gradient = None
    extras = {key: value for key, value in statistics.extras.items() if key.partition("/")[0] in moments}
    return replace(statistics, gradient=gradient, extras=extras)


@pytest.mark.parametrize("name", sorted(name for name, method in METHODS.items() if method.is_loss))
@pytest.mark.parametrize("shape", sorted(SHAPES))
def test_a_loss_in_nats_does_not_depend_on_the_coordinates_of_the_inputs_at_all(name, shape):
    """Any invertible map of x, undone in W: the same energies, the same product."""
    weight, x, h = data(*SHAPES[shape])
    draw = torch.Generator().manual_seed(5)
    size = x.shape[1]
    mix = torch.eye(size, dtype=torch.float64) + 0.3 * torch.randn(size, size, generator=draw, dtype=torch.float64)
    turned = weight @ torch.linalg.inv(mix).mT
    plain, other = (chosen(name, {}).decompose(w, statistics_of(w, y, h)) for w, y in ((weight, x), (turned, x @ mix)))
    least = min(weight.shape)
    torch.testing.assert_close(other.energies[:least], plain.energies[:least], rtol=1e-6, atol=1e-9)
    products = [part.truncate(4, y.mean(0)).dense() for part, y in ((plain, x), (other, x @ mix))]
    torch.testing.assert_close(products[1] @ mix.mT, products[0], rtol=0, atol=1e-6)


def test_every_method_says_what_it_is():
    assert set(reference.SURROGATE) == set(METHODS)
    for name, method in METHODS.items():
        assert method.name == name
        assert method.surrogate
        assert method.reference
        assert method.summary.endswith(".")
        assert method.scope == method.scopes[0]
        assert "input" in method.moments, "its mean corrects every factorisation"


def test_the_papers_methods_are_found_by_name_although_nobody_imports_them():
    assert {"fasc-eq6", "fasc-sketch", "two-sided-sketch"} <= set(METHODS)
    with pytest.raises(UnknownNameError, match=r"unknown method `fasc-eq7` .*did you mean `fasc-eq6`"):
        get_method("fasc-eq7")


@every_name
def test_needs_are_of_the_groups_input_and_of_each_scopes_gradients(name):
    method = METHODS[name]
    for scope in ("group", "layer"):
        needs = method.needs_in((scope,))
        assert {need.moment for need in needs} == method.moments
        assert Need("input", "group") in needs
        assert {need.scope for need in needs if need.moment in ("gradient", "cross")} <= {scope}
    assert method.needs == method.needs_in(method.scopes[:1])


@every_name
def test_options_that_a_method_does_not_declare_are_refused(name):
    declared = set(METHODS[name].options.model_fields)
    foreign = {field for method in METHODS.values() for field in method.options.model_fields} - declared | {"dampng", "rank"}
    for option in sorted(foreign):
        with pytest.raises(UsageError, match=rf"method `{name}`: `{option}`: no such field"):
            solver(name, {option: 1})
        with pytest.raises(UsageError, match=f"`{option}`"):
            solver_of(MethodConfig(name=name, **{option: 1}))


@every_name
def test_options_are_declared_with_a_default_a_help_and_a_range(name):
    options = METHODS[name].options
    assert issubclass(options, MethodOptions)
    assert solver(name).options == options()
    for field, info in options.model_fields.items():
        assert info.description, field
        assert not info.is_required(), field
    for damping in (-1, float("nan"), float("inf"), "much"):
        with pytest.raises(UsageError, match="`damping`"):
            solver(name, {"damping": damping})


@every_name
def test_options_reach_the_method(name):
    given = {"damping": 0.5} | ({"tolerance": 0.25} if "tolerance" in METHODS[name].options.model_fields else {})
    one = solver_of(MethodConfig(name=name, **given))
    assert one.name == name
    assert one.damping == 0.5
    assert one.options.model_dump(include=set(given)) == given


@every_name
def test_a_damped_inverse_is_told_apart_from_none(name):
    """Heavy damping changes the solution of every method that inverts or scales, and only of those."""
    weight, x, h = data(*SHAPES["tall"])
    case = weight, statistics_of(weight, x, h)
    plain, heavy = (small(case, name, {}, damping=damping)[0] for damping in (0.0, 10.0))
    ignores = {"svd", "weight-svd", "grad-weighted", "fasc-eq6"}
    assert torch.equal(plain, heavy) == (name in ignores)
