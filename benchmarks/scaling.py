"""What several processes do to the time of ``collect`` on this machine, and what they send.

Each number of processes measures the same tokens for ``fasc`` and ``svd``, started by torchrun's launcher, one thread each, so
that the processes alone make the difference. The median of the repeats is taken.
Then one and two processes at other widths, depths and numbers of tokens, for the model of cost

    seconds of the processor, in the busiest process = a (F + M) n / P + c B (P − 1) / P

with F multiply-adds of the model per token (forward, and backward to the activations), M those of the moments, n tokens, P
processes and B bytes that each of them gives to the sums; a and c are fitted to all runs, by least squares of the relative
errors. F and M grow together with the width, so that one a serves both. Seconds of the processor, unlike those of the clock, are
the same on a machine that others use, and beyond as many processes as cores.
"""

import argparse
import json
import os
import statistics as stats
import time
from pathlib import Path
from typing import Any

import torch
from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs
from torch.distributed.launcher.api import LaunchConfig, elastic_launch
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedModel

from fasc.methods import METHODS
from fasc.model.groups import find_groups
from fasc.model.load import load_model
from fasc.model.options import LayersConfig
from fasc.processes import Processes, joined
from fasc.provenance import provenance
from fasc.statistics.collect import collect_moments
from fasc.statistics.memory import memory_forecast
from fasc.storage import write_json

NEEDS = METHODS["fasc"].needs | METHODS["svd"].needs
LENGTH = 128
MADE = [(256, 2, 32, 1), (256, 6, 32, 1), (512, 2, 32, 1), (512, 2, 64, 1), (512, 2, 64, 2), (1024, 2, 16, 1), (1024, 2, 16, 2)]
"""Width, blocks, sequences and processes of the runs on random Llamas."""


def made(width: int, depth: int) -> PreTrainedModel:
    """A random Llama with an MLP four times as wide."""
    torch.manual_seed(0)
    shape = {"hidden_size": width, "intermediate_size": 4 * width, "num_hidden_layers": depth, "vocab_size": 8192}
    model: PreTrainedModel = AutoModelForCausalLM.from_config(LlamaConfig(**shape, num_attention_heads=8, num_key_value_heads=8))
    return model.eval()


def share(spec: str | tuple[int, int], sequences: int, repeats: int) -> dict[str, Any]:
    """What one process does; all give what the slowest took."""
    torch.set_num_threads(1)
    model = load_model(spec, device="cpu").model if isinstance(spec, str) else made(*spec)
    tokens = torch.randint(3, model.config.vocab_size, (sequences, LENGTH), generator=torch.Generator().manual_seed(0))
    with joined() as processes:
        waited = time_of_sums()
        collect_moments(model, tokens[: 2 * processes.count], NEEDS)  # warm-up
        rows = []
        for _ in range(repeats):
            processes.sent, waited[0] = 0, 0.0
            start, busy = time.perf_counter(), time.process_time()
            collect_moments(model, tokens, NEEDS)
            rows.append([time.perf_counter() - start, time.process_time() - busy, waited[0], float(processes.sent)])
        every = processes.gathered(torch.tensor([rows], dtype=torch.float64)).amax(0)
    groups = find_groups(model, LayersConfig())
    weights = sum(layer.d_in * layer.d_out for group in groups for layer in group.layers)
    seconds, busy, sums, sent = (stats.median(column) for column in every.mT.tolist())
    return {
        "processes": processes.count,
        "tokens": tokens.numel(),
        "seconds": seconds,
        "processor_seconds": busy,
        "tokens_per_second": tokens.numel() / seconds,
        "seconds_of_sums": sums,
        "sent_bytes": int(sent),
        "multiply_adds": 2 * (weights + model.get_output_embeddings().weight.numel()),
        "moment_multiply_adds": memory_forecast(model, groups, NEEDS)["moments"] // 8,  # half of a symmetric matrix is formed
    }


def time_of_sums() -> list[float]:
    """Seconds that this process spends in sums from now on, its wait for slower processes included."""
    spent, plain = [0.0], Processes.to_first

    def timed(self: Processes, own: torch.Tensor) -> torch.Tensor:
        start = time.perf_counter()
        try:
            return plain(self, own)
        finally:
            spent[0] += time.perf_counter() - start

    Processes.to_first = timed  # type: ignore[method-assign]
    return spent


def measure(processes: int, *arguments: Any) -> dict[str, Any]:
    """The same work in so many processes."""
    config = LaunchConfig(
        min_nodes=1,
        run_id="scaling",
        max_nodes=1,
        nproc_per_node=processes,
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
        local_addr="localhost",
        max_restarts=0,
        logs_specs=DefaultLogsSpecs(log_dir=os.devnull),
    )
    result: dict[str, Any] = elastic_launch(config, share)(*arguments)[0]
    print(json.dumps(result), flush=True)
    return result


def fitted(rows: list[dict[str, Any]]) -> dict[str, float]:
    """Seconds per multiply-add (a) and per byte (c), and the largest relative error."""
    terms = [
        [(row["multiply_adds"] + row["moment_multiply_adds"]) * row["tokens"], row["sent_bytes"] * (row["processes"] - 1)]
        for row in rows
    ]
    shared = torch.tensor([[row["processes"] * row["processor_seconds"]] for row in rows], dtype=torch.float64)
    design = torch.tensor(terms, dtype=torch.float64) / shared
    scale = design.norm(dim=0)
    solution = torch.linalg.lstsq(design / scale, torch.ones_like(shared), driver="gelsd").solution[:, 0] / scale
    a, c = solution.tolist()
    return {"a": a, "c": c, "largest_relative_error": float((design @ solution - 1).abs().max())}


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="instead of a random Llama of width 512 and 6 blocks, which each process holds whole")
    parser.add_argument("--sequences", type=int, default=32)
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--json", type=Path, default=Path(__file__).parent / "results" / "scaling.json")
    options = parser.parse_args()
    made_by = provenance()
    cores = made_by["machine"]["cores"]
    real = [measure(count, options.model or (512, 6), options.sequences, options.repeats) for count in (1, 2, 4)]
    others = [measure(count, (width, depth), sequences, 1) for width, depth, sequences, count in MADE]
    result = {
        "model": options.model or "random Llama, width 512, 6 blocks",
        "cores": cores,
        "processes": real,
        "made": others,
        "cost": fitted(real + others),
        "load": os.getloadavg()[0],
    }
    print(json.dumps(result["cost"] | {"load": result["load"]}, indent=2))
    write_json(options.json, result | {"provenance": made_by})


if __name__ == "__main__":
    main()
