"""The moments of a model whose MLPs have lost channels."""

from dataclasses import replace

import pytest
import torch

from fasc.forecast.channels import choose_channels
from fasc.methods import METHODS
from fasc.model.coupling import find_channels
from fasc.model.groups import find_groups
from fasc.model.options import LayersConfig
from fasc.statistics.accumulators import Covariance
from fasc.statistics.collect import collect_moments
from fasc.statistics.narrowing import narrowed, narrowed_group
from tests.conftest import PARALLEL, tiny_model


def mlps(model):
    return find_channels(model, find_groups(model, LayersConfig()))


def test_gradients_on_the_outputs_of_the_producers_are_carried_over(measured):
    """A channel that stays is read in place of those that go: its gradient is Tᵀ h."""
    model, statistics = tiny_model(), measured()
    narrowing = choose_channels(model, statistics, mlps(model)[0], 20, 1e-2)
    producers = statistics.groups[narrowing.coupling.group.name]
    h = torch.randn(200, 96, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    name = producers.group.name
    gradient = replace(
        producers.gradients[name], side="output", covariance=Covariance(h.mean(0).float(), torch.cov(h.T).float()), cross=None
    )
    given = replace(statistics, groups={**statistics.groups, name: replace(producers, gradients={name: gradient})})
    left = narrowed(given, narrowing).groups[name].gradients[name]
    fewer = torch.cat([h[:, :48] @ narrowing.estimate, h[:, 48:] @ narrowing.estimate], 1)
    torch.testing.assert_close(left.covariance.matrix, torch.cov(fewer.T).float(), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(left.covariance.mean, fewer.mean(0).float(), rtol=1e-4, atol=1e-5)


def test_the_consumers_inputs_are_those_that_stay(measured):
    model, statistics = tiny_model(), measured()
    narrowing = choose_channels(model, statistics, mlps(model)[0], 20, 1e-2)
    name = narrowing.coupling.consumer.name
    before, after = statistics.groups[name], narrowed(statistics, narrowing).groups[name]
    stay = narrowing.channels
    assert narrowing.width == len(stay) == 20
    assert torch.equal(after.input.mean, before.input.mean[stay])
    assert torch.equal(after.input.matrix, before.input.matrix[stay][:, stay])
    assert after.tokens == before.tokens


def test_other_groups_stay_as_they_are(measured):
    model, statistics = tiny_model(), measured()
    narrowing = choose_channels(model, statistics, mlps(model)[0], 20, 1e-2)
    changed = {narrowing.coupling.group.name, narrowing.coupling.consumer.name}
    after = narrowed(statistics, narrowing)
    assert all((after.groups[name] is group) == (name not in changed) for name, group in statistics.groups.items())


@pytest.mark.parametrize("name", PARALLEL)
def test_beside_an_attention_every_gradient_fits_its_layer(name, tokens):
    model = tiny_model(name)
    moments = collect_moments(model, tokens, METHODS["fasc"].needs_in(("group", "layer")))
    coupling = mlps(model)[0]
    others = [layer for layer in coupling.group.layers if layer not in coupling.producers]
    narrow = narrowed(moments, choose_channels(model, moments, coupling, 24, 1e-2)).groups[coupling.group.name]
    assert [layer for layer in narrow.group.layers if layer in others] == others
    for layer in narrow.group.layers:
        gradient = narrow.gradients[layer.name]
        assert len(gradient.covariance.mean) == (layer.d_out if gradient.side == "output" else layer.d_in)


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "phi3"])
def test_narrow_groups_have_the_parameters_that_stay(architecture):
    """The consumer gains a bias for the mean of the others."""
    for one in mlps(tiny_model(architecture)):
        left = [layer for group in (one.group, one.consumer) for layer in narrowed_group(group, one, 20).layers]
        gained = 0 if one.consumer.layers[0].bias else one.consumer.d_out
        assert sum(layer.parameters for layer in left) == one.parameters(20) + gained
