"""Speed and memory of two models on this machine, in turn: A B A B.

Not a benchmark of the registry: it compares two models in one run, because absolute times mean nothing on a shared machine.
"""

import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn
from transformers import PreTrainedModel

from fasc.errors import UsageError
from fasc.evaluation.comparison import Comparison
from fasc.evaluation.footprint import bytes_on_disk, footprint, prompt_of
from fasc.evaluation.options import SpeedConfig
from fasc.evaluation.remarks import remarks
from fasc.model.blocks import block_names
from fasc.model.groups import try_out
from fasc.model.layers import oriented_weight
from fasc.model.load import load_model
from fasc.model.offload import DeviceMap
from fasc.options import DType
from fasc.planning.options import BudgetConfig
from fasc.progress import progress


@dataclass(frozen=True, slots=True)
class SpeedReport:
    """All comparisons, the ideal, and what is to be said about them."""

    comparisons: tuple[Comparison, ...]
    ideal: float
    """Parameters of the dense model's blocks ÷ those of the compressed model's: the best speed-up of these."""

    remarks: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        return asdict(self)


def compare_speed(
    checkpoint: str | Path,
    dense: str | Path,
    config: SpeedConfig | None = None,
    *,
    budget: BudgetConfig | None = None,
    dtype: DType = "auto",
    device: str = "auto",
    device_map: DeviceMap | None = None,
) -> SpeedReport:
    """Time two models in turn, and look at each alone in a process of its own for its memory.

    Args:
        checkpoint: the compressed model.
        dense: what it was compressed from.
        config: sizes and rounds.
        budget: the checkpoint's, if known: what it already asked for is not advised.
        dtype: precision of both.
        device: of both.
        device_map: of both, instead of a device.

    Raises:
        ModelError: one of them cannot be loaded.
        UsageError: a model has fewer positions than are asked for.
    """
    config = config or SpeedConfig()
    pair = [_Timed(load_model(spec, dtype=dtype, device=device, device_map=device_map).model) for spec in (dense, checkpoint)]
    for timed in pair:
        _require_positions(timed.model, config)
    speeds = _time_in_turn(pair, config)
    ideal = pair[0].parameters_of_blocks / pair[1].parameters_of_blocks
    more_products = pair[1].products - pair[0].products
    devices = {timed.model.device.type for timed in pair}
    del pair  # the processes that follow need the memory
    torch.cuda.empty_cache()
    sizes = _compare_sizes((dense, checkpoint), config.prefill, dtype=dtype, device=device, device_map=device_map)
    return SpeedReport((*speeds, *sizes), ideal, tuple(remarks(speeds, ideal, more_products, devices, budget)))


def speeds_in_turn(dense: PreTrainedModel, compressed: PreTrainedModel, config: SpeedConfig) -> list[Comparison]:
    """Time two loaded models in turn, without their memory.

    Raises:
        UsageError: a model has fewer positions than are asked for.
    """
    pair = [_Timed(dense), _Timed(compressed)]
    for timed in pair:
        _require_positions(timed.model, config)
    return _time_in_turn(pair, config)


class _Timed:
    """A model, and where its blocks begin and end."""

    def __init__(self, model: PreTrainedModel) -> None:
        self.model = model
        modules = dict(model.named_modules())
        blocks = [modules[name] for name in block_names(model, modules)]
        called: list[nn.Module] = []
        with ExitStack() as stack:
            for block in blocks:
                stack.callback(block.register_forward_pre_hook(lambda module, _: called.append(module)).remove)
            try_out(model)
        self.first, self.last = called[0], called[-1]
        self.parameters_of_blocks = sum(parameter.numel() for block in blocks for parameter in block.parameters())
        self.products = sum(oriented_weight(module) is not None for module in modules.values())

    def now(self) -> float:
        """Seconds, after everything that was asked of the device is done."""
        if self.model.device.type == "cuda":
            torch.cuda.synchronize(self.model.device)
        return time.perf_counter()

    def prefill(self, length: int) -> tuple[float, float]:
        """Tokens per second of one forward pass, and of its blocks alone."""
        ids = prompt_of(self.model, 1, length)
        marks: list[float] = []
        with ExitStack() as stack:
            stack.callback(self.first.register_forward_pre_hook(lambda *_: marks.append(self.now())).remove)
            stack.callback(self.last.register_forward_hook(lambda *_: marks.append(self.now())).remove)
            start = self.now()
            self.model(input_ids=ids, use_cache=False)
            end = self.now()
        return length / (end - start), length / (marks[-1] - marks[0])

    def decode(self, batch: int, prompt: int, steps: int) -> tuple[float]:
        """Tokens per second, greedy, after a prompt."""
        outputs = self.model(input_ids=prompt_of(self.model, batch, prompt), use_cache=True)
        start = self.now()
        for _ in range(steps):
            token = outputs.logits[:, -1:].argmax(-1)
            outputs = self.model(input_ids=token, past_key_values=outputs.past_key_values, use_cache=True)
        return (batch * steps / (self.now() - start),)


class _Job(NamedTuple):
    """What is timed together, and the names of its speeds."""

    names: tuple[str, ...]
    run: Callable[[_Timed], tuple[float, ...]]


def _jobs(config: SpeedConfig) -> list[_Job]:
    prefill = _Job((f"prefill, 1 × {config.prefill}", "prefill, blocks alone"), lambda timed: timed.prefill(config.prefill))
    return [prefill] + [
        _Job((f"decode, batch {batch}",), lambda timed, batch=batch: timed.decode(batch, config.prompt, config.decode))
        for batch in config.batches
    ]


def _time_in_turn(pair: Sequence[_Timed], config: SpeedConfig) -> list[Comparison]:
    """Each job on both models, one after the other, once to warm up and then in every round."""
    comparisons, jobs = [], _jobs(config)
    with progress("timing in turn", len(jobs) * (config.repeats + 1), "rounds") as advance, torch.no_grad():
        for job in jobs:
            rounds = []
            for _ in range(config.repeats + 1):
                rounds.append([job.run(timed) for timed in pair])
                advance()
            for index, name in enumerate(job.names):
                speeds = [(dense[index], compressed[index]) for dense, compressed in rounds[1:]]
                comparisons.append(Comparison.of(name, "tokens/s", speeds))
    return comparisons


def _compare_sizes(
    specs: tuple[str | Path, str | Path], prefill: int, *, dtype: DType, device: str, device_map: DeviceMap | None
) -> list[Comparison]:
    dense, compressed = (footprint(spec, prefill, dtype=dtype, device=device, device_map=device_map) for spec in specs)
    comparisons = [
        Comparison.of("load time", "s", [(dense.load_seconds, compressed.load_seconds)]),
        Comparison.of("resident memory when loaded", "MB", [(dense.resident_bytes / 1e6, compressed.resident_bytes / 1e6)]),
        Comparison.of("peak memory of a prefill", "MB", [(dense.peak_bytes / 1e6, compressed.peak_bytes / 1e6)]),
    ]
    on_disk = (bytes_on_disk(specs[0]) / 1e6, bytes_on_disk(specs[1]) / 1e6)
    return comparisons + ([Comparison.of("weights on disk", "MB", [on_disk])] if all(on_disk) else [])


def _require_positions(model: PreTrainedModel, config: SpeedConfig) -> None:
    positions = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    asked = max(config.prefill, config.prompt + config.decode)
    if positions is not None and asked > positions:
        raise UsageError(
            f"the model has {positions} positions, and {asked} are asked for", "lower --prefill, --prompt or --decode"
        )
