"""Moments are right, cheap to state, and the model comes out as it went in."""

import pytest
import torch

from fasc.errors import CorpusError, NonFiniteError, StatisticsError
from fasc.statistics.collect import collect_moments
from fasc.statistics.options import CalibrationConfig
from tests.conftest import CONFIGS, PARALLEL, tiny_model
from tests.reference import covariance, moments_by_hand
from tests.statistics.needs import EVERYTHING, GRADIENTS, INPUTS


def calibration(**options):
    return CalibrationConfig(batch_tokens=160, **options)


@pytest.mark.parametrize("architecture", [*CONFIGS, *PARALLEL])
def test_moments_equal_those_of_kept_activations_and_gradients(architecture, tokens):
    model = tiny_model(architecture)
    statistics = collect_moments(model, tokens, EVERYTHING, calibration=calibration())
    names = [layer.name for group in statistics.groups.values() for layer in group.group.layers]
    x, h = moments_by_hand(model, tokens, names)
    for name, group in statistics.groups.items():
        members = [layer.name for layer in group.group.layers]
        inputs = x[members[0]]
        assert group.tokens == tokens.numel()
        close(group.input.mean, inputs.mean(0))
        close(group.input.matrix, covariance(inputs))
        for unit, layers in {name: members, **{member: [member] for member in members}}.items():
            moment = group.gradients[unit]
            expected = _gradient(model, h, layers, moment.side)
            close(moment.covariance.matrix, covariance(expected))
            if moment.cross is not None:
                close(moment.cross, covariance(inputs, expected))


def _gradient(model, h, layers, side):
    from fasc.model.layers import oriented_weight

    if side == "output":
        return torch.cat([h[layer] for layer in layers], dim=1)
    return sum(h[layer] @ oriented_weight(model.get_submodule(layer)).detach().double() for layer in layers)


def close(found, expected):
    torch.testing.assert_close(found.double(), expected, rtol=1e-3, atol=2e-5 * float(expected.abs().max()) + 1e-9)


def test_a_moment_lies_on_the_smaller_side(model, tokens):
    statistics = collect_moments(model, tokens, EVERYTHING, calibration=calibration())
    sides = {name.split(".")[-1]: group.gradients[name].side for name, group in statistics.groups.items()}
    assert sides == {
        "q_proj+k_proj+v_proj": "input",
        "o_proj": "input",
        "gate_proj+up_proj": "input",
        "down_proj": "output",
    }


def test_the_cross_moment_is_the_transposed_weight_gradient(tokens):
    """E[x hᵀ] is the mean of the weight's gradient, transposed: the labels are not shifted twice."""
    model = tiny_model()
    name = "model.layers.1.mlp.down_proj"
    statistics = collect_moments(model, tokens, EVERYTHING, calibration=calibration())
    group = statistics.groups[name]
    raw = group.gradients[name].cross.double() + torch.outer(
        group.input.mean.double(), group.gradients[name].covariance.mean.double()
    )
    model(input_ids=tokens, labels=tokens, num_items_in_batch=1).loss.backward()
    close(raw.mT * group.tokens, model.get_submodule(name).weight.grad.double())


@pytest.mark.parametrize("options", [{"batch_tokens": 20}, {"batch_tokens": 100_000}, {"gradient_checkpointing": True}])
def test_batches_and_checkpointing_do_not_change_the_moments(tokens, options, architecture):
    plain = collect_moments(tiny_model(architecture), tokens, EVERYTHING, calibration=calibration())
    other = collect_moments(
        tiny_model(architecture), tokens, EVERYTHING, calibration=CalibrationConfig(**({"batch_tokens": 160} | options))
    )
    assert_same(plain, other)


def test_in_mixed_precision_only_the_model_is_rounded(tokens, architecture):
    """Sums stay in float32: what the first layers read was not rounded, and its covariance is the same to the last digit."""
    plain = collect_moments(tiny_model(architecture), tokens, EVERYTHING, calibration=calibration())
    mixed = collect_moments(tiny_model(architecture), tokens, EVERYTHING, calibration=calibration(mixed_precision=True))
    first = next(iter(plain.groups))
    assert torch.equal(mixed.groups[first].input.matrix, plain.groups[first].input.matrix)
    for name, group in plain.groups.items():
        pairs = [(mixed.groups[name].input.matrix, group.input.matrix)]
        pairs += [(mixed.groups[name].gradients[u].covariance.matrix, g.covariance.matrix) for u, g in group.gradients.items()]
        for found, expected in pairs:
            assert found.dtype == torch.float32
            assert not torch.equal(found, expected) or name == first
            assert float((found - expected).norm()) < 0.15 * float(expected.norm()), name


def assert_same(a, b):
    assert list(a.groups) == list(b.groups)
    for name, group in a.groups.items():
        close(b.groups[name].input.matrix, group.input.matrix.double())
        for unit, moment in group.gradients.items():
            close(b.groups[name].gradients[unit].covariance.matrix, moment.covariance.matrix.double())


@pytest.mark.parametrize("labels", ["corpus", "sampled"])
def test_padding_is_excluded(tokens, labels):
    short = tokens[:8, :12]
    padded = torch.cat([short, torch.full((8, 5), 2)], dim=1)
    mask = torch.cat([torch.ones(8, 12), torch.zeros(8, 5)], dim=1).long()
    needs = GRADIENTS if labels == "corpus" else INPUTS
    plain = collect_moments(tiny_model(), short, needs, calibration=calibration(labels=labels))
    with_padding = collect_moments(tiny_model(), padded, needs, calibration=calibration(labels=labels), mask=mask)
    assert_same(plain, with_padding)
    assert next(iter(with_padding.groups.values())).tokens == 96


def test_the_model_comes_out_as_it_went_in(tokens):
    model = tiny_model("gpt2").train()
    model.transformer.h[0].eval()
    parameter = model.transformer.h[1].mlp.c_fc.weight
    parameter.requires_grad_(False)
    parameter.grad = torch.ones_like(parameter)
    calls = []
    handle = model.transformer.h[0].register_forward_hook(lambda *_: calls.append(1) and None)
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    modes = [m.training for m in model.modules()]
    flags = [p.requires_grad for p in model.parameters()]
    torch.manual_seed(11)
    state = torch.get_rng_state()
    collect_moments(model, tokens, EVERYTHING, calibration=calibration(labels="sampled", gradient_checkpointing=True))
    assert torch.equal(torch.get_rng_state(), state)
    assert [m.training for m in model.modules()] == modes
    assert [p.requires_grad for p in model.parameters()] == flags
    assert torch.equal(parameter.grad, torch.ones_like(parameter))
    assert all(p.grad is None for p in model.parameters() if p is not parameter)
    assert all(torch.equal(before[n], p) for n, p in model.named_parameters())
    hooks = sum(len(m._forward_hooks) + len(m._forward_pre_hooks) + len(m._backward_hooks) for m in model.modules())
    assert hooks == 1
    assert calls
    assert "forward" not in vars(model.transformer.h[0])
    handle.remove()


def test_our_hooks_are_removed_when_the_body_raises(tokens):
    model = tiny_model()
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.weight[0, 0] = float("inf")
    with pytest.raises(NonFiniteError, match="calibration sequences 0-7"):
        collect_moments(model, tokens, EVERYTHING, calibration=calibration())
    assert not any(m._forward_hooks or m._forward_pre_hooks or m._backward_hooks for m in model.modules())
    assert all(p.requires_grad for p in model.parameters())


def test_no_backward_pass_runs_unless_a_method_asks_for_gradients(tokens, monkeypatch):
    monkeypatch.setattr(torch.Tensor, "backward", lambda *_: pytest.fail("backward ran"))
    statistics = collect_moments(tiny_model(), tokens, INPUTS, calibration=calibration())
    assert not next(iter(statistics.groups.values())).gradients
    with pytest.raises(StatisticsError, match="gradient per group"):
        statistics.require(GRADIENTS)


def test_bfloat16_models_give_float32_moments(tokens):
    exact = collect_moments(tiny_model(), tokens, GRADIENTS, calibration=calibration())
    rough = collect_moments(tiny_model(dtype=torch.bfloat16), tokens, GRADIENTS, calibration=calibration())
    for name, group in rough.groups.items():
        assert group.input.matrix.dtype == torch.float32
        difference = (group.input.matrix - exact.groups[name].input.matrix).norm() / exact.groups[name].input.matrix.norm()
        assert difference < 0.05


def test_no_tokens_is_an_error():
    with pytest.raises(CorpusError, match="no calibration tokens"):
        collect_moments(tiny_model(), torch.zeros(0, 8, dtype=torch.long), INPUTS)
