"""One budget, many ways to spend it: rank, channels, heads, values, sublayers and bits from one set of statistics.

For every way: what was forecast, the KL divergence to the dense model on three texts with its interval, and the bytes of the file;
with `--facts N` also what it answers of N facts of LAMA, item by item beside the dense model.

    python benchmarks/budget.py --device cuda
    python benchmarks/budget.py --facts 5000 --rows "params 0.8;bits*alone"
"""

import argparse
import copy
import json
import os
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fnmatch import filter as matching
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedModel

from fasc.compression.compress import carried_out, carry_out
from fasc.compression.options import RecoveryConfig
from fasc.compression.recover import recover
from fasc.edits.quantise import Quantise
from fasc.edits.vocabulary import VocabularyBits
from fasc.evaluation.evaluate import Record, evaluate
from fasc.evaluation.likelihood import finite_logits
from fasc.evaluation.options import EvaluationConfig
from fasc.evaluation.outcome import Outcome
from fasc.evaluation.paired import paired
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
from fasc.text.corpus import Role, TextRequest, load_corpus

BITS = (2, *MENU)
WITHOUT_PRODUCTS = ("dense", "channels", "heads", "values", "skip")
FACTS = "lama"
ROUNDINGS = (Quantise, VocabularyBits)
TRAINING_LENGTH, TRAINING_STEP, TRAINING_RATE = 128, 512, 1e-4
"""Tokens of a sequence and of a step, and AdamW's highest rate (docs/results.md, Recovery)."""

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
    yield Row("bits 8 alone", {"layouts": ("dense",), "bits": (8,)}, {}, 8.5)  # the same everywhere, scales and zeros included
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


class Window(NamedTuple):
    """One of a text."""

    ids: Tensor
    logits: Path
    """Of the dense model: a file, because those of all windows are gigabytes."""


def windows_of(dense: Any, tokens: Tensor, folder: Path) -> list[Window]:
    """All windows of a text, with what the dense model says of them: it is asked once for all rows."""
    folder.mkdir()
    found = []
    for number, ids in enumerate(tokens.split(1)):
        logits = finite_logits(dense, ids, "the dense model")
        torch.save(logits, folder / f"{number}.pt")
        found.append(Window(ids, folder / f"{number}.pt"))
    return found


def divergences(small: Any, windows: list[Window]) -> Tensor:
    """Mean KL of each window, nats per token."""
    found = []
    for ids, file in windows:
        target, logits = torch.load(file, weights_only=True), finite_logits(small, ids, "the small model")
        found.append(kl_divergence(logits.flatten(0, 1), target.flatten(0, 1)).double().mean().cpu())
    return torch.stack(found)


def file_bytes(model: Any) -> int:
    """Of the weights on disk."""
    attach(model)
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        return sum(file.stat().st_size for file in Path(folder).glob("*.safetensors"))


def answers(loaded: LoadedModel, count: int) -> list[Outcome]:
    """What a model makes of so many facts; of the same weights it is kept in the cache."""
    record = Record()
    evaluate(loaded.model, loaded.tokenizer, EvaluationConfig(benchmarks=(FACTS,), limit=count), record=record)
    return record.outcomes[FACTS]


def trained_before_rounding(
    small: PreTrainedModel, dense: PreTrainedModel, statistics: Statistics, made: Plan, text: Tensor
) -> dict[str, Any]:
    """A plan carried out in two steps: what has fewer weights is trained towards the dense model, then all is rounded."""
    narrower = made.with_edits([edit for edit in made.edits if not isinstance(edit, ROUNDINGS)])
    _, statistics = carried_out(small, statistics, narrower)
    done = recover(small, dense, text, RecoveryConfig(batch_tokens=TRAINING_STEP, learning_rate=TRAINING_RATE))
    for edit in made.edits:
        if isinstance(edit, ROUNDINGS):
            statistics = edit.apply(small, statistics)
    return {"tokens": text.numel(), "kl_before": done.before, "kl_after": done.after, "share": done.share}


def measured(
    loaded: LoadedModel,
    statistics: Statistics,
    made: Plan,
    texts: dict[str, list[Window]],
    facts: list[Outcome],
    training: Tensor | None = None,
) -> dict[str, Any]:
    """A plan carried out on a copy of the model.

    ``facts`` are what the dense model answered, none if none are asked; with ``training`` text the model is trained on it before
    it is rounded.
    """
    small = copy.deepcopy(loaded.model)
    started = time.perf_counter()
    trained = {}
    if training is None:
        carry_out(small, statistics, made)
    else:
        trained = {"training": trained_before_rounding(small, loaded.model, statistics, made, training)}
    spent = time.perf_counter() - started
    scores = {}
    for name, windows in texts.items():
        values = divergences(small, windows)
        low, high = mean_interval(values.numpy())
        scores[name] = {"kl": float(values.mean()), "low": low, "high": high, "windows": len(values)}
    found: dict[str, Any] = {"scores": scores, "seconds_to_compress": spent, **trained}
    if facts:
        answered = answers(LoadedModel(small, loaded.tokenizer), len(facts))
        found["facts"] = paired(FACTS, ("compressed", "dense"), answered, facts).to_dict()
    return found | {"file_bytes": file_bytes(small)}


def main() -> None:
    """Parse, measure row after row, write after each."""
    asked = _asked()
    with tempfile.TemporaryDirectory() as folder:
        measure(asked, Path(folder))


def measure(asked: argparse.Namespace, folder: Path) -> None:
    """All rows that were asked for; what the dense model says of the windows lies in a folder meanwhile."""
    loaded = load_model(asked.model, dtype="float32", device=asked.device)
    facts = answers(loaded, asked.facts) if asked.facts and not asked.plan_only else []
    statistics = _statistics(asked, loaded)
    groups = groups_of(loaded.model, statistics, LayersConfig())
    layers = sum(layer.parameters for layer in layers_in(groups))
    code = Path(os.environ.get("FASC_DATA", ".")) / "calib_exllamav2" / "code.txt"
    corpora = {"wikitext2": "wikitext2", "c4": "c4", **({"program code": str(code)} if code.is_file() else {})}
    texts = {} if asked.plan_only else {name: _windows(loaded, corpus, asked) for name, corpus in corpora.items()}
    windows = {name: windows_of(loaded.model, tokens, folder / name) for name, tokens in texts.items()}
    training = _text(loaded, asked.corpus, asked.train, TRAINING_LENGTH, "calibration") if asked.train else None
    known: dict[str, Any] = {}
    results: dict[str, Any] = {"provenance": provenance(model=asked.model, device=asked.device), "rows": {}}
    for row in asked.rows:
        options = MethodConfig(name="fasc", **row.options)
        started = time.perf_counter()
        most = header_bytes(loaded.model, groups, tensors=9 if options.bits else 5)
        made = make_plan(loaded.model, groups, options, budget_of(row, loaded, layers, most), statistics, known=known)
        entry: dict[str, Any] = {"seconds_to_plan": time.perf_counter() - started, "made_of": composition(made), **made.totals}
        if not asked.plan_only:
            entry |= measured(loaded, statistics, made, windows, facts)
        results["rows"][row.name] = entry
        write_json(asked.out, results)
        print(_line(row.name, entry), flush=True)
        if training is not None and not asked.plan_only and any(isinstance(edit, ROUNDINGS) for edit in made.edits):
            name = f"{row.name}, trained before rounding"
            results["rows"][name] = entry | measured(loaded, statistics, made, windows, facts, training)
            write_json(asked.out, results)
            print(_line(name, results["rows"][name]), flush=True)
    if not asked.plan_only:
        results["expected"] = left_out(results["rows"])
        write_json(asked.out, results)
        print(json.dumps(results["expected"], indent=1))


TEXTS = ("wikitext2", "c4")


def left_out(entries: dict[str, Any], texts: Sequence[str] = TEXTS) -> dict[str, Any]:
    """What the other plans say to expect of each, against what was measured on some texts; bits and ranks apart.

    Rows of all layouts are left aside: their plans are nearly those of the default layouts, which would be told what they are.
    """

    def measured_of(entry: dict[str, Any]) -> float:
        return sum(entry["scores"][text]["kl"] for text in texts) / len(texts)

    found = {}
    for kind in ("bits", "params"):
        rows = {name: one for name, one in entries.items() if name.startswith(kind) and not name.endswith("everything")}
        rows = {name: one for name, one in rows.items() if one["predicted_loss"]}
        for name, one in rows.items():
            others = [Measured(other["predicted_loss"], measured_of(other), 0.0) for key, other in rows.items() if key != name]
            if len(others) > 1:
                expected = Correction(others).of(one["predicted_loss"])
                kl = measured_of(one)
                found[name] = {**expected.model_dump(), "measured": kl, "ratio": kl / expected.kl}
    return found


def _asked() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--corpus", default="wikitext2,c4")
    parser.add_argument("--sequences", type=int, default=256)
    parser.add_argument("--sequence-length", type=int, default=128)
    parser.add_argument("--statistics", type=Path, help="a file of moments to use instead of measuring; made if it is not there")
    parser.add_argument("--windows", type=int, default=12)
    parser.add_argument("--context", type=int, default=512)
    parser.add_argument(
        "--facts", type=int, default=0, help="of LAMA, asked of every row and of the dense model; needs FASC_DATA"
    )
    parser.add_argument(
        "--train", type=int, default=0, help="sequences of 128 tokens on which a second row is trained before it is rounded"
    )
    parser.add_argument("--rows", default="*", help="rows of these names, in this order, split by `;`; * stands for anything")
    parser.add_argument("--plan-only", action="store_true")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "budget.json")
    asked = parser.parse_args()
    asked.rows = _named(asked.rows, parser)
    return asked


def _named(patterns: str, parser: argparse.ArgumentParser) -> list[Row]:
    known = {row.name: row for row in rows()}
    found = {pattern: matching(known, pattern.strip()) for pattern in patterns.split(";")}
    if strange := [pattern for pattern, names in found.items() if not names]:
        parser.error(f"no row is named `{strange[0].strip()}`; there are: {'; '.join(known)}")
    return [known[name] for name in dict.fromkeys(name for names in found.values() for name in names)]


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
    return _text(loaded, corpus, asked.windows, asked.context, "evaluation")


def _text(loaded: LoadedModel, corpus: str, sequences: int, length: int, role: Role) -> Tensor:
    request = TextRequest(corpus=corpus, sequences=sequences, sequence_length=length, seed=0, role=role, data_dir=None)
    return load_corpus(loaded.model, loaded.tokenizer, request).tokens


def _line(name: str, entry: dict[str, Any]) -> str:
    forecast = entry["predicted_loss"]
    scores = {key: f"{one['kl']:.4f} [{one['low']:.4f}, {one['high']:.4f}]" for key, one in entry.get("scores", {}).items()}
    line = {"row": name, "forecast": round(forecast, 4), **scores}
    if facts := entry.get("facts"):
        low, high = facts["accuracy_interval"]
        line["facts"] = f"{facts['accuracy']:.4f} of {facts['n']}, {facts['accuracy_difference']:+.4f} [{low:+.4f}, {high:+.4f}]"
    return json.dumps(line | {"made of": entry["made_of"]}, ensure_ascii=False)


if __name__ == "__main__":
    main()
