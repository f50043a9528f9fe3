"""The moments of a model on a GPU are those of the same model on the processor."""

import pytest
import torch

from fasc.methods import METHODS
from fasc.statistics.collect import collect_moments
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
