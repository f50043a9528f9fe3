"""The divergence is torch's, token by token, and its gradient that of autograd."""

import math

import pytest
import torch
from torch.nn import functional as F

from fasc.linalg import divergence
from fasc.linalg.divergence import kl_divergence


@pytest.fixture(params=[1, 64, 2**21])
def entries(request, monkeypatch):
    """Logits that are looked at together: less than a token's, a few tokens', all."""
    monkeypatch.setattr(divergence, "_ENTRIES", request.param)


def draw(*shape, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    logits, reference = (torch.randn(*shape, generator=generator).mul(4).to(dtype) for _ in range(2))
    logits.view(-1, shape[-1])[2, 3] = 80.0  # neither overflows nor disappears
    reference.view(-1, shape[-1])[4, 5] = 80.0
    return logits, reference


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(7, 13), (2, 5, 13)])
def test_it_is_the_divergence_of_torch_for_every_token(entries, shape, dtype):
    logits, reference = draw(*shape, dtype=dtype)
    value = kl_divergence(logits, reference)
    q, p = (F.log_softmax(one.double(), -1) for one in (logits, reference))
    expected = F.kl_div(q, p, log_target=True, reduction="none").sum(-1)
    assert value.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert value.shape == shape[:-1]
    torch.testing.assert_close(value.double(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_gradient_of_its_mean_is_that_of_autograd(entries, dtype):
    logits, reference = draw(7, 13, dtype=dtype)
    logits.requires_grad_()
    value = kl_divergence(logits, reference).mean()
    (2 * value).backward()
    known = logits.detach().double().requires_grad_()
    expected = F.kl_div(F.log_softmax(known, -1), F.log_softmax(reference.double(), -1), log_target=True, reduction="batchmean")
    (2 * expected).backward()
    assert math.isclose(value.item(), expected.item(), rel_tol=1e-5)
    assert logits.grad.dtype == dtype
    torch.testing.assert_close(logits.grad.double(), known.grad, rtol=0, atol=1e-7 if dtype == torch.float32 else 2e-3)


def test_the_gradient_of_each_token_is_the_derivative_of_its_value(entries):
    """Each token weighs as much as what follows says, so that any mean over tokens can be trained on."""
    logits, reference = draw(2, 3, 7, dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda x: kl_divergence(x, reference), logits.requires_grad_())


def test_it_has_a_first_derivative_only_and_says_so():
    logits, reference = draw(5, 13)
    value = kl_divergence(logits.requires_grad_(), reference).mean()
    (slope,) = torch.autograd.grad(value.square(), logits, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        slope.sum().backward()


def test_of_a_model_with_itself_it_is_zero_and_the_reference_is_left_alone():
    logits, reference = draw(5, 13)
    before = (logits.clone(), reference.clone())
    assert kl_divergence(logits, logits).abs().max() == 0
    value = kl_divergence(logits.requires_grad_(), reference.requires_grad_())
    value.sum().backward()
    assert reference.grad is None
    assert torch.equal(logits, before[0])
    assert torch.equal(reference, before[1])


def test_without_gradients_nothing_is_kept_for_a_backward_pass():
    logits, reference = draw(5, 13)
    with torch.no_grad():
        assert kl_divergence(logits.requires_grad_(), reference).grad_fn is None
    assert kl_divergence(logits.detach(), reference).grad_fn is None
