"""Features removed one after the other are those that the obvious greedy search removes, at its price."""

import pytest
import torch

from fasc.linalg.elimination import eliminate, refit
from tests.reference import greedy_elimination


def problem(size=30, outputs=7, seed=0):
    generator = torch.Generator().manual_seed(seed)
    root = torch.randn(size, size, generator=generator, dtype=torch.float64)
    covariance = root @ root.mT / size + 0.01 * torch.eye(size, dtype=torch.float64)
    return torch.randn(outputs, size, generator=generator, dtype=torch.float64), covariance


@pytest.mark.parametrize("seed", range(3))
def test_features_go_in_the_order_of_the_obvious_greedy_and_cost_what_it_says(seed):
    weight, covariance = problem(seed=seed)
    order, losses = greedy_elimination(weight, covariance, 3)
    elimination = eliminate(weight, covariance, 3)
    assert elimination.order.tolist() == order
    torch.testing.assert_close(elimination.losses(), torch.tensor(losses, dtype=torch.float64))
    assert elimination.kept(10, 30).tolist() == sorted(set(range(30)) - set(order[:20]))


def test_the_errors_covariance_is_the_sum_of_what_each_removal_adds():
    weight, covariance = problem(size=90)
    elimination = eliminate(weight, covariance, 20)
    stay = elimination.kept(40, 90)
    error = weight.clone()
    error[:, stay] -= weight @ refit(covariance, stay)
    taken = elimination.residuals[:50]
    torch.testing.assert_close(taken.mT @ taken, error @ covariance @ error.mT)


def test_features_that_others_determine_cost_nothing():
    weight, covariance = problem(size=20)
    mix = torch.randn(25, 20, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    mix[:20] = torch.eye(20)
    bigger = mix @ covariance @ mix.mT + 1e-10 * torch.eye(25)
    losses = eliminate(torch.cat([weight, weight[:, :5]], 1), bigger, 15).losses()
    assert float(losses[5]) < 1e-7
    assert float(losses[6]) > 1e-4


def test_the_regression_on_the_features_that_stay_is_the_best_linear_estimate():
    """Its error is uncorrelated with every feature that stays, and zero on those themselves."""
    _, covariance = problem()
    stay = torch.tensor([2, 3, 11, 20])
    estimate = refit(covariance, stay)
    torch.testing.assert_close(estimate[stay], torch.eye(4, dtype=torch.float64), rtol=0, atol=1e-9)
    torch.testing.assert_close(estimate @ covariance[stay][:, stay], covariance[:, stay])
