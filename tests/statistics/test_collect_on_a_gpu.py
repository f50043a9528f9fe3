"""The moments of a model on a GPU are those of the same model on the processor."""

import pytest
import torch

from fasc.methods import METHODS
from fasc.statistics.collect import collect_moments
from fasc.statistics.options import CalibrationConfig
from fasc.statistics.replay import replay_moments
from tests.conftest import tiny_model


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_a_gpu_measures_what_the_processor_measures(tokens):
    needs = frozenset().union(*(method.needs_in(method.scopes) for method in METHODS.values()))
    torch.backends.cuda.matmul.allow_tf32 = False
    here, there = collect_moments(tiny_model(), tokens, needs), collect_moments(tiny_model().cuda(), tokens, needs)
    assert here.groups.keys() == there.groups.keys()

    def close(one, other):
        assert other.device.type == "cpu"
        torch.testing.assert_close(other, one, rtol=1e-2, atol=1e-3 * float(one.abs().max()))

    for name, group in here.groups.items():
        close(group.input.matrix, there.groups[name].input.matrix)
        for unit, gradient in group.gradients.items():
            close(gradient.covariance.matrix, there.groups[name].gradients[unit].covariance.matrix)
        for key, extra in group.extras.items():
            close(extra, there.groups[name].extras[key])


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_blocks_that_are_replayed_on_a_gpu_wait_on_the_host(tokens):
    needs, parts = METHODS["fasc"].needs, {}
    once = collect_moments(tiny_model().cuda(), tokens, needs)
    replay_moments(tiny_model().cuda(), tokens, needs, parts.__setitem__, calibration=CalibrationConfig())
    for name, group in once.groups.items():
        twin = parts[group.group.block].groups[name]
        torch.testing.assert_close(twin.input.matrix, group.input.matrix, rtol=1e-4, atol=1e-6)
        for unit, gradient in group.gradients.items():
            torch.testing.assert_close(twin.gradients[unit].covariance.matrix, gradient.covariance.matrix, rtol=1e-3, atol=1e-6)
