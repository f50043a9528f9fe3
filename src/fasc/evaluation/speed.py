"""Speed and memory of two models on this machine, in turn: A B A B.

Not a benchmark of the registry: it compares two models in one run, because absolute times mean nothing on a shared machine.
"""

import multiprocessing
import resource
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import psutil
import torch
from torch import nn
from transformers import PreTrainedModel

from fasc.evaluation.options import SpeedConfig
from fasc.options import DType
from fasc.planning.options import BudgetConfig
from fasc.model.blocks import block_names
from fasc.model.embedded import EMBEDDED, cache_folder
from fasc.model.load import load_model
from fasc.layouts.lowrank import LowRankLinear
from fasc.progress import progress

_FASTER = 1.02
"""A ratio below it is not called faster."""

_OVERHEAD, _CHANNEL_MULTIPLE = 65536, 256
"""What made small models faster where they were not (docs/results.md, Speed)."""


@dataclass(frozen=True, slots=True)
class Comparison:
    """One quantity of both models."""

    what: str
    unit: str
    dense: float
    """Median over the repeats."""

    compressed: float
    ratio: float
    """Median over the repeats of compressed ÷ dense, of the speed (or of the size)."""

    low: float
    """Smallest ratio of a repeat."""

    high: float
    """Largest."""

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        return asdict(self)


@dataclass(frozen=True, slots=True)
class SpeedReport:
    """All comparisons, the ideal, and what is to be said about them."""

    comparisons: tuple[Comparison, ...]
    ideal: float
    """Parameters read by the dense model's compressed layers ÷ those of the compressed model: the best speed-up of these."""

    remarks: tuple[str, ...]


def compare_speed(
    checkpoint: str,
    dense: str,
    config: SpeedConfig,
    *,
    budget: BudgetConfig | None = None,
    dtype: DType = "auto",
    device: str = "auto",
) -> SpeedReport:
    """Time two models in turn, and look at each alone in a process of its own for its memory.

    Args:
        checkpoint: the compressed model.
        dense: what it was compressed from.
        config: sizes and repeats.
        budget: the checkpoint's, if known: what it already asked for is not advised.
        dtype: precision of both.
        device: of both.

    Raises:
        ModelError: one of them cannot be loaded.
    """
    models = [load_model(spec, dtype=dtype, device=device).model for spec in (dense, checkpoint)]
    batches = config.batches
    jobs: list[tuple[str, Callable[[PreTrainedModel], tuple[float, ...]], tuple[str, ...]]] = [
        ("prefill", lambda model: _prefill(model, 1, config.prefill), (f"prefill, 1 × {config.prefill}", "prefill, blocks alone"))
    ]
    for batch in batches:
        name = f"decode, batch {batch}"
        jobs.append((name, lambda model, batch=batch: (_decode(model, batch, config),), (name,)))
    found: list[Comparison] = []
    with progress("timing in turn", len(jobs) * (config.repeats + 1), "rounds") as advance, torch.no_grad():
        for _, job, names in jobs:
            for model in models:
                job(model)
            advance()
            rounds = []
            for _ in range(config.repeats):
                rounds.append([job(model) for model in models])
                advance()
            for index, name in enumerate(names):
                pairs = [(one[0][index], one[1][index]) for one in rounds]
                found.append(_compare(name, "tokens/s", pairs))
    ideal = _weights_of_blocks(models[0]) / _weights_of_blocks(models[1])
    low_rank = sum(isinstance(module, LowRankLinear) for module in models[1].modules())
    devices = {model.device.type for model in models}
    del models
    sizes = _sizes(dense, checkpoint, config, dtype=dtype, device=device)
    return SpeedReport((*found, *sizes), ideal, tuple(remarks(found, ideal, low_rank, devices, budget)))


def _compare(what: str, unit: str, pairs: Sequence[tuple[float, float]]) -> Comparison:
    ratios = [b / a for a, b in pairs]
    dense, compressed = (statistics.median(values) for values in zip(*pairs, strict=True))
    return Comparison(what, unit, dense, compressed, statistics.median(ratios), min(ratios), max(ratios))


def _now(model: PreTrainedModel) -> float:
    if model.device.type == "cuda":
        torch.cuda.synchronize(model.device)
    return time.perf_counter()


def _tokens(model: PreTrainedModel, batch: int, length: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    vocabulary = model.get_input_embeddings().num_embeddings
    return torch.randint(vocabulary, (batch, length), generator=generator).to(model.device)


def _prefill(model: PreTrainedModel, batch: int, length: int) -> tuple[float, float]:
    """Tokens per second of one forward pass, and of its blocks alone."""
    tokens = _tokens(model, batch, length)
    blocks = block_names(
        model, [name for name, module in model.named_modules() if isinstance(module, (nn.Linear, LowRankLinear))]
    )
    marks: list[float] = []
    with ExitStack() as stack:
        first, last = model.get_submodule(blocks[0]), model.get_submodule(blocks[-1])
        stack.callback(first.register_forward_pre_hook(lambda *_: marks.append(_now(model))).remove)
        stack.callback(last.register_forward_hook(lambda *_: marks.append(_now(model))).remove)
        start = _now(model)
        model(input_ids=tokens, use_cache=False)
        end = _now(model)
    return tokens.numel() / (end - start), tokens.numel() / (marks[-1] - marks[0])


def _decode(model: PreTrainedModel, batch: int, config: SpeedConfig) -> float:
    """Tokens per second, greedy, after a prompt."""
    tokens = _tokens(model, batch, config.prompt)
    outputs = model(input_ids=tokens, use_cache=True)
    cache, token = outputs.past_key_values, outputs.logits[:, -1:].argmax(-1)
    start = _now(model)
    for _ in range(config.decode):
        outputs = model(input_ids=token, past_key_values=cache, use_cache=True)
        token = outputs.logits[:, -1:].argmax(-1)
    return batch * config.decode / (_now(model) - start)


def _weights_of_blocks(model: PreTrainedModel) -> int:
    names = block_names(model, [name for name, _ in model.named_modules()])
    return sum(p.numel() for name in names for p in model.get_submodule(name).parameters())


def _sizes(dense: str, checkpoint: str, config: SpeedConfig, *, dtype: DType, device: str) -> list[Comparison]:
    alone = [_alone(spec, config, dtype, device) for spec in (dense, checkpoint)]
    rows = [("load time", "s"), ("resident memory when loaded", "MB"), ("peak memory of a prefill", "MB")]
    found = [_compare(what, unit, [(alone[0][index], alone[1][index])]) for index, (what, unit) in enumerate(rows)]
    disk = [_bytes_on_disk(spec) for spec in (dense, checkpoint)]
    if all(disk):
        found.append(_compare("weights on disk", "MB", [(disk[0] / 1e6, disk[1] / 1e6)]))
    return found


def _bytes_on_disk(spec: str) -> int:
    folder = cache_folder(spec) if spec in EMBEDDED and not Path(spec).exists() else Path(spec)
    return sum(file.stat().st_size for file in folder.glob("*.safetensors")) if folder.is_dir() else 0


def _alone(spec: str, config: SpeedConfig, dtype: DType, device: str) -> tuple[float, float, float]:
    """Load time, resident memory and peak memory of a model in a process of its own."""
    context = multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_look, args=(spec, config.prefill, dtype, device, sender))
    process.start()
    sender.close()
    try:
        found: tuple[float, float, float] = receiver.recv()
    finally:
        process.join()
    return found


def _look(spec: str, length: int, dtype: DType, device: str, sender: Any) -> None:
    before = psutil.Process().memory_info().rss
    start = time.perf_counter()
    model = load_model(spec, dtype=dtype, device=device).model
    seconds = time.perf_counter() - start
    for parameter in model.parameters():  # weights mapped from a file count only once they have been read
        parameter.data.view(-1)[:: max(1, parameter.numel() // 1000)].sum()
    if model.device.type == "cuda":
        loaded = float(torch.cuda.memory_allocated(model.device))
    else:
        loaded = float(psutil.Process().memory_info().rss - before)
    with torch.no_grad():
        model(input_ids=_tokens(model, 1, length), use_cache=False)
    peak = torch.cuda.max_memory_allocated(model.device) if model.device.type == "cuda" else peak_memory()
    sender.send((seconds, loaded / 1e6, peak / 1e6))
    sender.close()


def peak_memory() -> int:
    """The most bytes this process had resident so far.

    On Linux not ``getrusage``'s: a spawned process inherits that of its parent.
    """
    if _STATUS.exists():
        line = next(line for line in _STATUS.read_text().splitlines() if line.startswith("VmHWM:"))
        return int(line.split()[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


_STATUS = Path("/proc/self/status")
"""Where Linux tells of a process's memory, in kB."""


def remarks(
    found: Sequence[Comparison], ideal: float, low_rank: int, devices: set[str], budget: BudgetConfig | None = None
) -> list[str]:
    """Why something is not faster, in plain words, and which options might make it so.

    Args:
        found: what was compared.
        ideal: parameters of the dense blocks ÷ those of the compressed ones.
        low_rank: how many layers are factored.
        devices: types of the devices they lie on.
        budget: the checkpoint's, if known.
    """
    calls = "kernel launches" if "cuda" in devices else "calls of small operations"
    one_token = (
        f"a step reads every weight once, {ideal:.2f} × fewer in the blocks, but {low_rank} layers make two to four {calls} "
        "where a dense one makes one; with larger layers the reading wins"
    )
    if budget is None or budget.overhead < _OVERHEAD:
        one_token += f", and `fasc compress --overhead {_OVERHEAD}` factors fewer"
    many = (
        f"it is bound by arithmetic, of which the blocks have {ideal:.2f} × less, and two thin products run at a lower rate than "
        "one square product; larger batches or layers gain more"
    )
    if budget is None or (budget.channel_multiple or 1) % _CHANNEL_MULTIPLE:
        many += f", and so may `fasc compress --channel-multiple {_CHANNEL_MULTIPLE}`"
    slower = [one for one in found if one.ratio < _FASTER]
    return [
        f"{one.what} is not faster ({one.ratio:.2f} ×): {one_token if one.what == 'decode, batch 1' else many}" for one in slower
    ]
