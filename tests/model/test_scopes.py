"""After a scope the model is exactly as before, also when the body raises."""

import pytest
import torch
from torch import nn

from fasc.model.scopes import evaluating, forwarding, frozen, restored
from tests.conftest import tiny_model


class StopError(Exception):
    pass


@pytest.fixture(params=[False, True], ids=["returns", "raises"])
def run(request):
    """Run a body in a scope; once it returns, once it raises."""

    def within(scope, body):
        if not request.param:
            with scope:
                body()
            return
        with pytest.raises(StopError), scope:
            body()
            raise StopError

    return within


def modes(model):
    return [module.training for module in model.modules()]


def test_every_module_has_its_own_mode_again(run):
    model, other = tiny_model().train(), tiny_model(seed=1)
    model.model.layers[0].mlp.eval()
    before = modes(model), modes(other)

    def body():
        assert not any(modes(model))
        assert not any(modes(other))
        model.model.layers[1].train()

    run(evaluating(model, other), body)
    assert (modes(model), modes(other)) == before
    assert len(set(before[0])) == 2


@pytest.fixture
def half_trained():
    """A model with mixed flags, of which one parameter has a gradient."""
    model = tiny_model()
    model.model.layers[0].requires_grad_(requires_grad=False)
    model.lm_head.weight.grad = torch.ones_like(model.lm_head.weight)
    return model


def test_flags_and_gradients_are_the_same_objects_again(half_trained, run):
    model, trained = half_trained, half_trained.model.layers[0].mlp.up_proj
    before = [(parameter.requires_grad, parameter.grad) for parameter in model.parameters()]

    def body():
        assert [name for name, parameter in model.named_parameters() if parameter.requires_grad] == [
            "model.layers.0.mlp.up_proj.weight"
        ]
        assert all(parameter.grad is None for parameter in model.parameters())
        model(input_ids=torch.arange(8)[None]).logits.sum().backward()
        assert trained.weight.grad.abs().sum() > 0
        model.requires_grad_()

    run(frozen(model, except_=[trained]), body)
    after = [(parameter.requires_grad, parameter.grad) for parameter in model.parameters()]
    assert all(a[0] == b[0] and a[1] is b[1] for a, b in zip(before, after, strict=True))
    assert torch.equal(model.lm_head.weight.grad, torch.ones_like(model.lm_head.weight)), "the body's gradients are its own"


def test_without_exceptions_nothing_is_trainable_and_nothing_gets_a_gradient(half_trained):
    with frozen(half_trained):
        assert not half_trained(input_ids=torch.arange(8)[None]).logits.requires_grad


def test_modules_stand_in_their_places_again_whatever_stood_there(run):
    model = tiny_model()
    before = dict(model.named_modules())
    logits = model(input_ids=torch.arange(8)[None]).logits

    def body():
        model.model.layers[1].mlp = nn.Identity()  # holds one of the layers, which thus has no place
        model.model.layers[0].self_attn.q_proj = nn.Linear(32, 32)

    run(restored(model, ["model.layers.1.mlp.up_proj", "model.layers.1.mlp", "model.layers.0.self_attn.q_proj"]), body)
    assert dict(model.named_modules()) == before
    assert list(dict(model.named_modules())) == list(before), "in the same order"
    assert torch.equal(model(input_ids=torch.arange(8)[None]).logits, logits)


@pytest.mark.parametrize("others", [False, True], ids=["class", "instance"])
def test_a_forward_that_somebody_else_has_set_is_there_again(run, others):
    module = nn.Linear(2, 2)
    if others:  # as accelerate does for `device_map`
        module.forward = lambda x: 3 * x
    expected = module(torch.ones(2))
    before = dict(vars(module))

    def body():
        assert module(torch.ones(2)) == "ours"

    run(forwarding(module, lambda _: "ours"), body)
    assert vars(module) == before
    assert torch.equal(module(torch.ones(2)), expected)
