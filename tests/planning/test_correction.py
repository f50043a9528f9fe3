"""What plans were measured to lose says what to expect of another."""

import numpy as np
import pytest

from fasc.errors import FascError
from fasc.planning.correction import Correction, Measured, read_correction
from fasc.planning.plan import Plan
from fasc.stages.plan import plan
from fasc.storage import write_json
from tests.conftest import tiny_model


def law(half_j):
    return 1.7 * half_j**1.1


def measured(half_js, noise=0.0, seed=0):
    generator = np.random.default_rng(seed)
    return [Measured(x, law(x) * float(np.exp(noise * generator.normal())), 0.0) for x in half_js]


@pytest.mark.parametrize("half_j", [0.02, 0.1, 0.7])
def test_a_power_law_is_found_exactly_and_inverted(half_j):
    correction = Correction(measured([0.05, 0.1, 0.2, 0.4]))
    expected = correction.of(half_j)
    assert expected.kl == pytest.approx(law(half_j))
    assert expected.low == pytest.approx(expected.high) == pytest.approx(expected.kl)
    assert correction.half_j_of(expected.kl) == pytest.approx(half_j)


def test_the_interval_holds_the_truth_nineteen_times_in_twenty():
    held = []
    for seed in range(400):
        *known, new = measured([0.05, 0.1, 0.2, 0.4, 0.8, 0.15], noise=0.2, seed=seed)
        expected = Correction(known).of(new.half_j)
        held.append(expected.low <= new.kl <= expected.high)
    assert np.mean(held) == pytest.approx(0.95, abs=0.03)


def test_of_one_plan_there_is_a_factor_whose_interval_is_that_of_the_measurement():
    expected = Correction([Measured(0.1, 0.2, 0.02)]).of(0.3)
    assert expected.kl == pytest.approx(0.6)
    assert expected.high / expected.kl == pytest.approx(np.exp(1.96 * 0.1 * 2**0.5))
    assert Correction([Measured(0.1, 0.2, 0.0), Measured(0.11, 0.3, 0.0)]).of(0.1).low < 0.1


@pytest.fixture
def file(tmp_path):
    rows = [{"half_j": x, "kl": law(x), "kl_error": 0.01 * law(x), "ratio": 1.0} for x in (0.5, 1.0, 2.0)]
    return write_json(tmp_path / "validation.json", {"plans": rows, "provenance": {"calibration": {"corpus": "wikitext2"}}})


def test_a_plan_carries_what_to_expect_and_a_limit_is_one_of_that(statistics, file, tmp_path):
    made = plan(tiny_model(), statistics, param_fraction=0.8, validation=file)
    assert made.expected.kl == pytest.approx(law(made.predicted_loss))
    assert made.expected.text == "wikitext2"
    assert Plan.from_dict(made.to_dict()) == made
    assert "by 3 measured plans of this model" in str(made)
    limited = plan(tiny_model(), statistics, max_kl=1.0, validation=file)
    assert limited.expected.kl <= 1.0 < plan(tiny_model(), statistics, max_kl=1.0).predicted_loss * 1.7
    assert limited.budget["max_kl"] == 1.0


@pytest.mark.parametrize("raw", [{}, {"plans": []}, {"plans": [{"half_j": None, "kl": 0.1}]}, {"plans": [{"kl": "much"}]}, []])
def test_what_is_no_validation_is_refused_in_one_line(raw, tmp_path):
    file = tmp_path / "other.json"
    write_json(file, raw)
    with pytest.raises(FascError) as problem:
        read_correction(file)
    assert "\n" not in str(problem.value)
