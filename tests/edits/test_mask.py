"""A mask writes zeros where its method scores lowest, and nowhere else."""

import pytest
import torch

from fasc.edits import read_edit
from fasc.errors import ModelError, UsageError
from tests.conftest import tiny_model
from tests.pruning.pruned import pruned
from tests.reference import moments_by_hand


@pytest.mark.parametrize("fraction", [0.3, 0.5, 0.8, 1.0])
def test_magnitude_keeps_the_largest_weights_of_each_layer(tokens, fraction):
    dense, model = tiny_model(), tiny_model()
    _, made, _ = pruned(model, tokens, "magnitude", param_fraction=fraction)
    assert len(made.edits) == len(made.layers)
    for edit in made.edits:
        before, after = (m.get_submodule(edit.layer).weight.detach() for m in (dense, model))
        largest = sorted(before.abs().flatten().tolist(), reverse=True)[: int(fraction * before.numel())]
        assert int((after != 0).sum()) == len(largest) == edit.weights
        assert torch.equal(after, torch.where(before.abs() >= largest[-1], before, 0.0))


def test_wanda_compares_within_a_row_by_the_norm_of_the_inputs(tokens):
    dense, model = tiny_model("qwen2"), tiny_model("qwen2")
    _, made, _ = pruned(model, tokens, "wanda", param_fraction=0.5)
    x, _ = moments_by_hand(dense, tokens, [edit.layer for edit in made.edits])
    for edit in made.edits:
        before, after = (m.get_submodule(edit.layer).weight.detach() for m in (dense, model))
        norms = x[edit.layer].square().sum(0).sqrt()
        keep = edit.weights // edit.d_out
        for row, pruned_row in zip(before, after, strict=True):
            largest = (row.abs() * norms).argsort(descending=True)[:keep]
            assert set(pruned_row.nonzero().flatten().tolist()) == set(largest.tolist())


def test_biases_stay(tokens):
    dense, model = tiny_model("qwen2"), tiny_model("qwen2")
    _, made, _ = pruned(model, tokens, "magnitude", param_fraction=0.4)
    with_bias = [edit.layer for edit in made.edits if edit.bias]
    assert with_bias
    for name in with_bias:
        assert torch.equal(model.get_submodule(name).bias, dense.get_submodule(name).bias)


def test_a_mask_that_does_not_fit_is_refused_before_anything_is_changed(tokens):
    dense, model = tiny_model(), tiny_model()
    statistics, made, _ = pruned(tiny_model(), tokens, "magnitude", param_fraction=0.5)
    raw = made.edits[-1].to_dict()
    changes = {
        "more weights than there are": ({"weights": 10**9}, "1,000,000,000 weights of"),
        "another shape": ({"d_in": 31}, "is 32×48.* here and 32×31.* in the plan"),
        "no such layer": ({"layer": "model.layers.7.mlp.down_proj"}, "no linear layer of this model"),
    }
    for change, words in changes.values():
        broken = made.with_edits([*made.edits[:-1], read_edit(raw | change, "plan")])
        with pytest.raises(ModelError, match=words):
            broken.check(model)
    with pytest.raises(UsageError, match="weights"):
        read_edit(raw | {"weights": -1}, "plan")
    assert all(torch.equal(value, model.state_dict()[name]) for name, value in dense.state_dict().items())
