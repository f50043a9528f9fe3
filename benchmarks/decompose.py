"""Time of each method's decomposition against the width of a layer, as ratios to ``svd`` in the same run.

Square layers with spectra that decay like those of a language model; exact methods, and ``fasc`` from a sketch at rank d/8 with
the share of the dropped energy that it lost. With ``--model`` and ``--statistics`` also a whole model: every group decomposed
with ``fasc`` and with ``svd``.
"""

import argparse
import json
import resource
import statistics as stats
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import TypeVar

import torch

from fasc.methods import solver
from fasc.model.groups import stacked_weight
from fasc.model.load import load_model
from fasc.provenance import provenance
from fasc.statistics.accumulators import Covariance
from fasc.statistics.moments import GradientMoment, Statistics, UnitStatistics
from fasc.storage import write_json

Result = TypeVar("Result")

EXACT = ("svd", "whitened", "two-sided", "fasc", "fasc-eq6")


def unit_of_width(d: int) -> tuple[torch.Tensor, UnitStatistics]:
    """A layer d → d whose input and gradient spectra fall like 1/j."""
    generator = torch.Generator().manual_seed(0)

    def covariance() -> torch.Tensor:
        root = torch.randn(d, d, generator=generator, dtype=torch.float64) / torch.arange(1, d + 1, dtype=torch.float64).sqrt()
        return root @ root.mT / d

    xx, gg = covariance(), covariance()
    cross = 0.01 * torch.randn(d, d, generator=generator, dtype=torch.float64)
    weight = torch.randn(d, d, generator=generator, dtype=torch.float64) / d**0.5
    mean = torch.zeros(d, dtype=torch.float64)
    return weight, UnitStatistics("layer", 10 * d, Covariance(mean, xx), GradientMoment("input", Covariance(mean, gg), cross))


def timed(work: Callable[[], Result], repeats: int) -> tuple[float, Result]:
    """Median seconds over repeats, and the last result."""
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        result = work()
        times.append(time.perf_counter() - start)
    return stats.median(times), result


def of_width(d: int, repeats: int, methods: Sequence[str]) -> dict[str, object]:
    """Ratios to svd, and what the sketch lost."""
    weight, unit = unit_of_width(d)
    rank = d // 8
    times: dict[str, float] = {}
    energies: dict[str, torch.Tensor] = {}
    for name in methods:
        times[name], full = timed(partial(solver(name).decompose, weight, unit), repeats)
        energies[name] = full.energies
        del full
    sketches = {"fasc": solver("fasc-sketch", {"tolerance": 1e9})}
    sketches["fasc-eq6"] = solver("fasc-eq6", {"tolerance": 1e9, "sketch": True})
    sketched = {}
    for name in set(methods) & set(sketches):
        times[f"{name}, sketch"], sketched[name] = timed(partial(sketches[name].at_rank, weight, unit, rank), repeats)
    row: dict[str, object] = {
        "d": d,
        "svd_seconds": times["svd"],
        "ratio_to_svd": {name: value / times["svd"] for name, value in times.items()},
        "peak_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
    }
    if "fasc" in sketched:
        exact, largest = energies["fasc"], sketched["fasc"].decomposition.energies[:rank].sum()
        lost = float((exact[:rank].sum() - largest) / (exact.sum() - largest))
        row["sketch"] = {"rank": rank, "lost": lost, **sketched["fasc"].notes}
    return row


def of_model(model_name: str, file: Path) -> dict[str, float]:
    """Seconds of decomposing every group of a model with svd and with fasc, in turn."""
    model, statistics = load_model(model_name, device="cpu").model, Statistics.load(file)
    units = [group.group.unit() for group in statistics.groups.values()]
    times = {"svd": 0.0, "fasc": 0.0}
    for unit in units:
        for name in times:
            start = time.perf_counter()
            solver(name).decompose(stacked_weight(model, unit), statistics.unit(unit))
            times[name] += time.perf_counter() - start
    return times | {"ratio": times["fasc"] / times["svd"]}


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--widths", type=int, nargs="+", default=[512, 1024, 2048, 4096, 8192])
    parser.add_argument("--methods", nargs="+", default=list(EXACT), help="with svd among them")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--model")
    parser.add_argument("--statistics", type=Path)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    result: dict[str, object] = {"widths": [of_width(d, options.repeats, options.methods) for d in options.widths]}
    if options.model and options.statistics:
        result["model"] = {"name": options.model, **of_model(options.model, options.statistics)}
    result["threads"] = torch.get_num_threads()
    print(json.dumps(result, indent=2))
    if options.json:
        write_json(options.json, result | {"provenance": provenance()})


if __name__ == "__main__":
    main()
