"""Time of one dense layer over that of the layouts that stand for it, by shape, share of the parameters and number of tokens.

Every layer is one of many copies that are called in turn, so that weights come from memory as they do in a model. Layouts and
dense are timed in turn; a ratio above 1 is faster than dense, and 1/share is the ideal.
"""

import argparse
import json
import statistics as stats
import time
from itertools import product
from pathlib import Path

import torch
from torch import Tensor, nn

from fasc.layouts import LAYOUTS, FactoredLayout
from fasc.model.groups import Unit
from fasc.model.layers import Layer
from fasc.provenance import provenance
from fasc.storage import write_json

COMPARED = ("dense", "factors", "pivoted", "pivoted-columns")

SHAPES = ((576, 1536), (1536, 576), (576, 576))
"""d_in, d_out: gate and up, down, and q or o of a 135M model."""


def layers_of(name: str, d_in: int, d_out: int, share: float, copies: int) -> nn.ModuleList:
    """Layers with random weights and the largest rank at which the layout holds a share of the dense parameters."""
    layout, unit = LAYOUTS[name], Unit("layer", (Layer("layer", d_in, d_out, bias=False),))
    if not isinstance(layout, FactoredLayout):
        return nn.ModuleList(nn.Linear(d_in, d_out, bias=False) for _ in range(copies))
    limit = share * unit.parameters
    rank = max(rank for rank in range(8, min(d_in, d_out), 8) if layout.parameters(unit, rank) <= limit)
    layers = nn.ModuleList(layout.build(unit, rank, {"pivots": [rank]})[0] for _ in range(copies))
    for buffer_name, order in layers.named_buffers():
        if buffer_name.endswith("order"):
            order.copy_(torch.randperm(len(order)))
    return layers


def seconds(layers: nn.ModuleList, x: Tensor) -> float:
    """Of one call of each layer."""
    start = time.perf_counter()
    for layer in layers:
        layer(x)
    return time.perf_counter() - start


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tokens", type=int, nargs="+", default=[1, 4, 8, 16, 512])
    parser.add_argument("--shares", type=float, nargs="+", default=[0.8, 0.6])
    parser.add_argument("--copies", type=int, default=30)
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    rows = []
    with torch.no_grad():
        for (d_in, d_out), share in product(SHAPES, options.shares):
            layers = {
                name: layers_of(name, d_in, d_out, share, options.copies)
                for name in ("dense", "factors", "pivoted", "pivoted-columns")
            }
            for tokens in options.tokens:
                x = torch.randn(tokens, d_in)
                times: dict[str, list[float]] = {name: [] for name in layers}
                for _ in range(options.repeats):
                    for name, some in layers.items():
                        times[name].append(seconds(some, x))
                medians = {name: stats.median(taken) for name, taken in times.items()}
                ratios = {name: round(medians["dense"] / medians[name], 3) for name in layers if name != "dense"}
                rows.append({"d_in": d_in, "d_out": d_out, "share": share, "tokens": tokens, "dense_over": ratios})
                print(json.dumps(rows[-1]))
    if options.json:
        write_json(options.json, {"rows": rows, "threads": torch.get_num_threads(), "provenance": provenance()})


if __name__ == "__main__":
    main()
