"""Time of each method's decomposition against the width of a layer, as ratios to ``svd`` in the same run.

Square layers with spectra that decay like those of a language model; exact methods, and ``fasc`` from a sketch at rank d/8 with
the share of the dropped energy that it lost. With ``--model`` and ``--statistics`` also a whole model: every group decomposed
with ``fasc`` and with ``svd``.
"""

import argparse
import json
import statistics as stats
import time
from collections.abc import Callable
from pathlib import Path

import torch

from fasc.budget.candidates import unit_of
from fasc.calibration.statistics import GradientMoment, Statistics, UnitStatistics
from fasc.config import MethodConfig
from fasc.linalg.moments import Covariance
from fasc.methods import METHODS, decompose_unit
from fasc.model.load import load_model
from fasc.provenance import provenance
from fasc.storage import write_json

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


def seconds(work: Callable[[], object], repeats: int) -> float:
    """Median over repeats."""
    found = []
    for _ in range(repeats):
        start = time.perf_counter()
        work()
        found.append(time.perf_counter() - start)
    return stats.median(found)


def of_width(d: int, repeats: int) -> dict[str, object]:
    """Ratios to svd, and what the sketch lost."""
    weight, unit = unit_of_width(d)
    rank = d // 8
    times = {
        name: seconds(lambda name=name: METHODS[name].decompose(weight, unit, MethodConfig(name=name)), repeats) for name in EXACT
    }
    loose = MethodConfig(sketch_tolerance=1e9)
    for name in ("fasc", "fasc-eq6"):
        sketch = METHODS[name].sketch
        times[f"{name}, sketch"] = seconds(lambda sketch=sketch: sketch(weight, unit, loose, rank), repeats)
    exact = METHODS["fasc"].decompose(weight, unit, MethodConfig()).energies
    sketched = METHODS["fasc"].sketch(weight, unit, loose, rank)
    found = sketched.decomposition.energies[:rank].sum()
    dropped = exact.sum() - found
    return {
        "d": d,
        "svd_seconds": times["svd"],
        "ratio_to_svd": {name: value / times["svd"] for name, value in times.items()},
        "sketch": {
            "rank": rank,
            "lost": float((exact[:rank].sum() - found) / dropped),
            "estimate": sketched.lost_estimate,
            "bound": sketched.lost_bound,
        },
    }


def of_model(model_name: str, file: Path) -> dict[str, float]:
    """Seconds of decomposing every group of a model with svd and with fasc, in turn."""
    model, statistics = load_model(model_name, device="cpu").model, Statistics.load(file)
    units = [unit_of(group.group, group.group.layers) for group in statistics.groups.values()]
    times = {"svd": 0.0, "fasc": 0.0}
    for unit in units:
        for name in times:
            start = time.perf_counter()
            decompose_unit(model, statistics, unit, MethodConfig(name=name))
            times[name] += time.perf_counter() - start
    return times | {"ratio": times["fasc"] / times["svd"]}


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--widths", type=int, nargs="+", default=[512, 1024, 2048])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--model")
    parser.add_argument("--statistics", type=Path)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    result: dict[str, object] = {"widths": [of_width(d, options.repeats) for d in options.widths]}
    if options.model and options.statistics:
        result["model"] = {"name": options.model, **of_model(options.model, options.statistics)}
    result["threads"] = torch.get_num_threads()
    print(json.dumps(result, indent=2))
    if options.json:
        write_json(options.json, result | {"provenance": provenance()})


if __name__ == "__main__":
    main()
