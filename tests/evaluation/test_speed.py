"""Two models are timed in turn, by the same work, and compared by the median of the rounds."""

import json
import time

import pytest
import torch
from torch import nn

from fasc.errors import UsageError
from fasc.evaluation.comparison import Comparison
from fasc.evaluation.options import SpeedConfig
from fasc.evaluation.speed import _time_in_turn, _Timed, compare_speed
from tests.conftest import tiny_model

SMALL = SpeedConfig(prefill=32, prompt=4, decode=3, batches=(1, 2), repeats=3)
SPEEDS = ["prefill, 1 × 32", "prefill, blocks alone", "decode, batch 1", "decode, batch 2"]


def test_the_ratio_is_the_median_of_the_rounds_and_not_of_the_medians():
    one = Comparison.of("x", "s", [(1.0, 2.0), (10.0, 10.0), (4.0, 2.0)])
    assert (one.dense, one.compressed) == (4, 2)
    assert (one.ratio, one.low, one.high) == (1, 0.5, 2)


def test_both_models_do_the_same_work_in_turn():
    """Token by token, with a warm-up that does not count."""
    models, calls = [tiny_model(seed=0), tiny_model(seed=1)], []
    pair = [_Timed(model) for model in models]
    for index, model in enumerate(models):
        model.register_forward_pre_hook(
            lambda _, args, kwargs, index=index: calls.append((index, tuple(kwargs["input_ids"].shape))), with_kwargs=True
        )
    assert [one.what for one in _time_in_turn(pair, SMALL)] == SPEEDS
    prefill = [(0, (1, 32)), (1, (1, 32))]
    decode = {b: [(index, shape) for index in (0, 1) for shape in [(b, 4), *[(b, 1)] * 3]] for b in (1, 2)}
    assert calls == 4 * prefill + 4 * decode[1] + 4 * decode[2]
    assert not any(module._forward_hooks for model in models for module in model.modules())


def test_a_model_that_is_slower_has_a_ratio_below_one():
    dense, slow = tiny_model(), tiny_model()
    for block in slow.model.layers:
        block.register_forward_pre_hook(lambda *_: time.sleep(0.01))
    for one in _time_in_turn([_Timed(dense), _Timed(slow)], SMALL):
        assert one.ratio < 0.9, one
        assert one.unit == "tokens/s"


def test_products_and_parameters_of_the_blocks_are_counted(architecture):
    """A layer in two parts is one product more; what lies outside the blocks is not counted."""
    dense, factored = tiny_model(architecture), tiny_model(architecture)
    name, layer = next(
        (n, m) for n, m in factored.named_modules() if ".0." in n and getattr(m, "weight", torch.zeros(1)).dim() == 2
    )
    parent, _, leaf = name.rpartition(".")
    d_in, d_out = layer.weight.shape[::-1] if isinstance(layer, nn.Linear) else layer.weight.shape
    parts = nn.Sequential(nn.Linear(d_in, 2, bias=False), nn.Linear(2, d_out, bias=layer.bias is not None))
    setattr(factored.get_submodule(parent), leaf, parts)
    pair = _Timed(dense), _Timed(factored)
    assert pair[1].products - pair[0].products == 1
    assert pair[0].parameters_of_blocks - pair[1].parameters_of_blocks == d_in * d_out - 2 * (d_in + d_out)
    assert pair[0].parameters_of_blocks < dense.num_parameters()


def test_bench_says_everything_of_two_checkpoints_and_is_json(model_folder, tmp_path):
    report = compare_speed(str(model_folder), model_folder, SMALL)
    names = [one.what for one in report.comparisons]
    assert names == [*SPEEDS, "load time", "resident memory when loaded", "peak memory of a prefill", "weights on disk"]
    assert report.ideal == 1
    assert report.comparisons[-1].ratio == 1
    assert report.comparisons[-2].dense > 50, "a process with torch in it, in MB"
    assert json.loads(json.dumps(report.to_dict(), allow_nan=False))["comparisons"][0]["unit"] == "tokens/s"


def test_more_positions_than_a_model_has_are_refused_before_anything_is_timed(model_folder):
    with pytest.raises(UsageError, match="the model has 128 positions, and 512 are asked for"):
        compare_speed(model_folder, model_folder)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_bench_on_a_gpu(model_folder):
    report = compare_speed(model_folder, model_folder, SMALL, device="cuda")
    memory = next(one for one in report.comparisons if one.what == "resident memory when loaded")
    assert 0 < memory.dense < 10, "what is allocated on the GPU, in MB"
