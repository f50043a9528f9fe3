"""One budget, many ways to spend it: rank, channels, heads, values, sublayers and bits from one set of statistics.

For every way: what was forecast, the KL divergence to the dense model on three texts with its interval, and the bytes of the file.

    python benchmarks/budget.py --device cuda
"""

import argparse
import copy
import json
import os
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fasc.compression.compress import carry_out
from fasc.evaluation.likelihood import finite_logits
from fasc.evaluation.score import mean_interval
from fasc.linalg.divergence import kl_divergence
from fasc.model.load import LoadedModel, load_model
from fasc.model.options import LayersConfig
from fasc.planning.correction import Correction, Measured
from fasc.planning.frontier import MENU
from fasc.planning.options import BudgetConfig, MethodConfig
from fasc.planning.plan import Plan, layers_in
from fasc.planning.table import composition
from fasc.provenance import provenance
from fasc.serving.checkpoint import header_bytes
from fasc.serving.quantizer import attach
from fasc.stages.calibrate import calibrate
from fasc.stages.compress import needs_of
from fasc.stages.plan import fitted_statistics, groups_of, make_plan
from fasc.statistics.moments import Statistics
from fasc.statistics.options import CalibrationConfig
from fasc.storage import write_json
from fasc.text.corpus import TextRequest, load_corpus

BITS = (2, *MENU)
WITHOUT_PRODUCTS = ("dense", "channels", "heads", "values", "skip")
WIDTHS = (5.25, 4.25, 3.75, 3.25, 2.75, 2.25)


@dataclass(frozen=True)
class Row:
    """One way to spend a budget."""

    name: str
    options: dict[str, Any]
    budget: dict[str, float]
    bits_per_weight: float | None = None
    """Of the block linears, instead of a budget."""


def rows() -> Iterator[Row]:
    """All of the table."""
    for share in (0.9, 0.8, 0.6):
        yield Row(f"params {share}", {}, {"param_fraction": share})
    yield Row("flops 0.8, channels", {"layouts": ("dense", "channels")}, {"flop_fraction": 0.8})
    for word in ("heads", "values", "skip"):
        yield Row(f"flops 0.95, {word}", {"layouts": ("dense", word)}, {"flop_fraction": 0.95})
    yield Row("flops 0.8, channels, heads, values, skip", {"layouts": WITHOUT_PRODUCTS}, {"flop_fraction": 0.8})
    every = ("dense", "factors", "shared", "pivoted", "pivoted-columns", *WITHOUT_PRODUCTS[1:])
    yield Row("params 0.8, everything", {"layouts": every}, {"param_fraction": 0.8})
    yield Row("params 0.6, everything", {"layouts": every}, {"param_fraction": 0.6})
    for bits in WIDTHS:
        yield Row(f"bits {bits} alone", {"layouts": ("dense",), "bits": BITS}, {}, bits)
    for bits in WIDTHS:
        yield Row(f"bits {bits} joint", {"bits": BITS}, {}, bits)
    for bits in WIDTHS[3:]:
        yield Row(f"bits {bits} joint, everything", {"bits": BITS, "layouts": every}, {}, bits)
    for bits in WIDTHS:
        yield Row(f"file of bits {bits} joint, embedding and head too", {"bits": BITS, "bits_vocabulary": True}, {}, bits)


def budget_of(row: Row, loaded: LoadedModel, layers: int, most: int) -> BudgetConfig:
    """The row's own, or the bytes of so many bits a weight."""
    if row.bits_per_weight is None:
        return BudgetConfig(**row.budget)
    outside = (loaded.model.num_parameters() - layers) * loaded.model.dtype.itemsize
    return BudgetConfig(max_bytes=int(outside + most + row.bits_per_weight / 8 * layers), overhead=0)


def divergences(dense: Any, small: Any, tokens: Tensor) -> Tensor:
    """Mean KL of each window, nats per token."""
    found = []
    for ids in tokens.split(1):
        target, logits = finite_logits(dense, ids, "the dense model"), finite_logits(small, ids, "the small model")
        found.append(kl_divergence(logits.flatten(0, 1), target.flatten(0, 1)).double().mean().cpu())
    return torch.stack(found)


def file_bytes(model: Any) -> int:
    """Of the weights on disk."""
    attach(model)
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        return sum(file.stat().st_size for file in Path(folder).glob("*.safetensors"))


def measured(loaded: LoadedModel, statistics: Statistics, made: Plan, texts: dict[str, Tensor]) -> dict[str, Any]:
    """A plan carried out on a copy of the model."""
    small = copy.deepcopy(loaded.model)
    started = time.perf_counter()
    carry_out(small, statistics, made)
    spent = time.perf_counter() - started
    scores = {}
    for name, tokens in texts.items():
        values = divergences(loaded.model, small, tokens)
        low, high = mean_interval(values.numpy())
        scores[name] = {"kl": float(values.mean()), "low": low, "high": high, "windows": len(values)}
    return {"scores": scores, "file_bytes": file_bytes(small), "seconds_to_compress": spent}


def main() -> None:
    """Parse, measure row after row, write after each."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--corpus", default="wikitext2,c4")
    parser.add_argument("--sequences", type=int, default=256)
    parser.add_argument("--sequence-length", type=int, default=128)
    parser.add_argument("--statistics", type=Path, help="a file of moments to use instead of measuring; made if it is not there")
    parser.add_argument("--windows", type=int, default=12)
    parser.add_argument("--context", type=int, default=512)
    parser.add_argument("--rows", default="", help="only rows whose name begins with one of these, split by `;`")
    parser.add_argument("--plan-only", action="store_true")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "budget.json")
    asked = parser.parse_args()
    loaded = load_model(asked.model, dtype="float32", device=asked.device)
    statistics = _statistics(asked, loaded)
    groups = groups_of(loaded.model, statistics, LayersConfig())
    layers = sum(layer.parameters for layer in layers_in(groups))
    code = Path(os.environ.get("FASC_DATA", ".")) / "calib_exllamav2" / "code.txt"
    corpora = {"wikitext2": "wikitext2", "c4": "c4", **({"program code": str(code)} if code.is_file() else {})}
    texts = {name: _windows(loaded, corpus, asked) for name, corpus in corpora.items()}
    known: dict[str, Any] = {}
    results: dict[str, Any] = {"provenance": provenance(model=asked.model, device=asked.device), "rows": {}}
    wanted = tuple(part.strip() for part in asked.rows.split(";") if part.strip())
    for row in rows():
        if wanted and not row.name.startswith(wanted):
            continue
        options = MethodConfig(name="fasc", **row.options)
        started = time.perf_counter()
        most = header_bytes(loaded.model, groups, tensors=9 if options.bits else 5)
        made = make_plan(loaded.model, groups, options, budget_of(row, loaded, layers, most), statistics, known=known)
        entry: dict[str, Any] = {"seconds_to_plan": time.perf_counter() - started, "made_of": composition(made), **made.totals}
        if not asked.plan_only:
            entry |= measured(loaded, statistics, made, texts)
        results["rows"][row.name] = entry
        write_json(asked.out, results)
        print(_line(row.name, entry), flush=True)
    if not asked.plan_only:
        results["expected"] = left_out(results["rows"])
        write_json(asked.out, results)
        print(json.dumps(results["expected"], indent=1))


def left_out(entries: dict[str, Any]) -> dict[str, Any]:
    """What the other plans say to expect of each, against what was measured on WikiText-2 and C4; bits and the rest apart."""

    def measured_of(entry: dict[str, Any]) -> float:
        return sum(entry["scores"][text]["kl"] for text in ("wikitext2", "c4")) / 2

    found = {}
    for kind in ("bits", "params"):
        rows = {name: one for name, one in entries.items() if name.startswith(kind) and one["predicted_loss"]}
        for name, one in rows.items():
            others = [Measured(other["predicted_loss"], measured_of(other), 0.0) for key, other in rows.items() if key != name]
            if len(others) > 1:
                expected = Correction(others).of(one["predicted_loss"])
                kl = measured_of(one)
                found[name] = {**expected.model_dump(), "measured": kl, "ratio": kl / expected.kl}
    return found


def _statistics(asked: argparse.Namespace, loaded: LoadedModel) -> Statistics:
    if asked.statistics is not None and asked.statistics.is_file():
        return fitted_statistics(Statistics.load(asked.statistics), loaded.model)
    calibration = CalibrationConfig(
        corpus=asked.corpus, sequences=asked.sequences, sequence_length=asked.sequence_length, labels="sampled"
    )
    methods = (MethodConfig(name="fasc", bits=BITS, bits_vocabulary=True), MethodConfig(name="fasc"))
    found = calibrate(loaded, needs_of(methods), calibration, LayersConfig())
    if asked.statistics is not None:
        found.save(asked.statistics)
    return fitted_statistics(found, loaded.model)


def _windows(loaded: LoadedModel, corpus: str, asked: argparse.Namespace) -> Tensor:
    request = TextRequest(
        corpus=corpus, sequences=asked.windows, sequence_length=asked.context, seed=0, role="evaluation", data_dir=None
    )
    return load_corpus(loaded.model, loaded.tokenizer, request).tokens


def _line(name: str, entry: dict[str, Any]) -> str:
    forecast = entry["predicted_loss"]
    scores = {key: f"{one['kl']:.4f} [{one['low']:.4f}, {one['high']:.4f}]" for key, one in entry.get("scores", {}).items()}
    return json.dumps({"row": name, "forecast": round(forecast, 4), **scores, "made of": entry["made_of"]}, ensure_ascii=False)


if __name__ == "__main__":
    main()
