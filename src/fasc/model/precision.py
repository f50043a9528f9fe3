"""Processors without 16-bit arithmetic multiply in it many times slower than in float32: measured, and avoided in calibration."""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from statistics import median
from time import perf_counter

import torch
from transformers import PreTrainedModel

from fasc.model.offload import is_offloaded
from fasc.progress import say

_SLOW = 2.0
"""Times slower than float32 from which the model works in float32."""

_ROWS, _WIDTH, _ROUNDS = 64, 768, 5


@cache
def slowdown(dtype: torch.dtype) -> float:
    """Time of a matrix product in this precision on the CPU ÷ that in float32, the median of a few rounds."""

    def seconds(kind: torch.dtype) -> float:
        a, b = torch.ones(_ROWS, _WIDTH, dtype=kind), torch.ones(_WIDTH, _WIDTH, dtype=kind)
        start = perf_counter()
        a @ b
        return perf_counter() - start

    with torch.no_grad():
        rounds = [(seconds(dtype), seconds(torch.float32)) for _ in range(_ROUNDS + 1)][1:]
    return median(one for one, _ in rounds) / max(median(two for _, two in rounds), 1e-9)


@contextmanager
def working_precision(model: PreTrainedModel) -> Iterator[None]:
    """Let a 16-bit model work in float32 where that is much faster; its weights are exactly as before afterwards.

    Every float16 and bfloat16 number is a float32 number, so nothing is lost on the way back. Takes twice the model's memory.
    """
    if is_offloaded(model):  # what is fetched has the precision in which it lies there
        yield
        return
    dtypes = {name: tensor.dtype for name, tensor in (*model.named_parameters(), *model.named_buffers())}
    halves = {dtype for dtype in dtypes.values() if dtype in (torch.bfloat16, torch.float16)}
    slow = {dtype: ratio for dtype in halves if model.device.type == "cpu" and (ratio := slowdown(dtype)) > _SLOW}
    if not slow:
        yield
        return
    dtype, ratio = max(slow.items(), key=lambda item: item[1])
    say(f"this processor multiplies {str(dtype).removeprefix('torch.')} {ratio:.0f} × slower than float32: working in float32")
    changed = [name for name, kind in dtypes.items() if kind in slow]
    _convert(model, dict.fromkeys(changed, torch.float32))
    try:
        yield
    finally:
        _convert(model, {name: dtypes[name] for name in changed})


def _convert(model: PreTrainedModel, dtypes: dict[str, torch.dtype]) -> None:
    tensors = dict((*model.named_parameters(), *model.named_buffers()))
    with torch.no_grad():
        for name, dtype in dtypes.items():
            tensors[name].data = tensors[name].data.to(dtype)
