"""What compressing a mixture made by `benchmarks/upcycle.py` costs, beside what its dense model pays at the same share.

KL divergence of each compressed model from the model that it was made from, on sequences that nothing was trained or measured on,
of every corpus that an expert was trained on; nats per token, with the interval over sequences.

    FASC_DATA=DATA python benchmarks/upcycle_costs.py runs/upcycled --device cuda
"""

import argparse
import copy
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fasc.evaluation.likelihood import finite_logits
from fasc.evaluation.score import mean_interval
from fasc.linalg.divergence import kl_divergence
from fasc.model.experts import expert_layers
from fasc.model.load import LoadedModel, load_model
from fasc.model.options import LayersConfig
from fasc.planning.needs import needs_for
from fasc.planning.options import BudgetConfig, MethodConfig
from fasc.planning.plan import Plan
from fasc.planning.table import composition
from fasc.provenance import provenance
from fasc.stages.compress import compress
from fasc.stages.plan import groups_of, make_plan
from fasc.statistics.collect import collect_moments
from fasc.statistics.moments import Statistics
from fasc.statistics.options import CalibrationConfig
from fasc.storage import write_json
from upcycle import CORPORA, sequences_of

WAYS: dict[str, dict[str, Any]] = {
    "fasc": {"method": "fasc"},
    "fasc, no penalty of products": {"method": "fasc", "overhead": 0},
    "whitened": {"method": "whitened"},
    "llm-pruner": {"method": "llm-pruner"},
}


def measured_on(model: Any, tokens: Tensor) -> Statistics:
    """The moments of every way, by one pass."""
    needs = frozenset().union(*(needs_for(MethodConfig(name=way["method"]), None) for way in WAYS.values()))
    calibration = CalibrationConfig(labels="sampled", batch_tokens=4096 if model.device.type == "cuda" else 512)
    with expert_layers(model):
        return collect_moments(model, tokens, needs, calibration=calibration)


def divergences(dense: Any, small: Any, tokens: Tensor) -> list[float]:
    """Mean KL(dense ‖ small) of each sequence, nats per token."""
    found = []
    for ids in tokens.to(dense.device).split(4):
        logits = [finite_logits(one, ids, "a model") for one in (dense, small)]
        values = kl_divergence(logits[1].flatten(0, 1), logits[0].flatten(0, 1)).view(len(ids), -1)
        found += values.double().mean(1).tolist()
    return found


def planned(model: Any, statistics: Statistics, share: float, way: dict[str, Any], known: dict[str, Any]) -> Plan:
    """One way at one share; ways of one method share their forecasts."""
    options = MethodConfig(name=way["method"])
    budget = BudgetConfig(param_fraction=share, **{key: value for key, value in way.items() if key != "method"})
    with expert_layers(model):
        return make_plan(model, groups_of(model, statistics, LayersConfig()), options, budget, statistics, known=known)


def costs(loaded: LoadedModel, statistics: Statistics, texts: dict[str, Tensor], made: Plan) -> dict[str, Any]:
    """What a plan costs, on a copy of the model."""
    started = time.perf_counter()
    small = copy.deepcopy(loaded.model)
    done = compress(small, statistics, made)
    seconds = time.perf_counter() - started
    kl: dict[str, Any] = {}
    every: list[float] = []
    for name, tokens in texts.items():
        values = divergences(loaded.model, done.model, tokens)
        low, high = mean_interval(np.array(values))
        kl[name] = {"kl": float(np.mean(values)), "low": low, "high": high, "sequences": len(values)}
        every += values
    low, high = mean_interval(np.array(every))
    kl["all"] = {"kl": float(np.mean(every)), "low": low, "high": high, "sequences": len(every)}
    return {"kl": kl, "seconds": seconds, "made_of": composition(done.plan), **done.plan.totals}


def heard(statistics: Statistics) -> list[dict[str, Any]]:
    """Tokens of every expert."""
    groups = [
        one for one in statistics.groups.values() if one.group.layers[0].expert is not None and one.group.kind != "down_proj"
    ]
    return [
        {"block": one.group.block, "expert": one.group.layers[0].expert, "tokens": one.tokens, "share": one.share}
        for one in groups
    ]


def main() -> None:
    """Parse, measure both models, write after each row."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("mixture", help="folder that benchmarks/upcycle.py has written")
    parser.add_argument("--dense", default="smollm2-135m")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--share", type=float, default=0.8, help="of the parameters of the compressed layers")
    parser.add_argument("--calibration", type=int, default=96, help="sequences of each corpus that calibrate")
    parser.add_argument("--windows", type=int, default=12, help="held-out sequences of each corpus that evaluate")
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--ways", default="", help="only these, split by `;`")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "upcycle.json")
    asked = parser.parse_args()
    chosen = {name: way for name, way in WAYS.items() if not asked.ways or name in asked.ways.split(";")}
    results: dict[str, Any] = {"provenance": provenance(device=asked.device), "share": asked.share, "models": {}}
    for name, spec in {"mixture": asked.mixture, "dense": asked.dense}.items():
        loaded = load_model(spec, dtype="float32", device=asked.device)
        parts = {corpus: sequences_of(loaded, corpus, asked.length) for corpus in CORPORA}
        spread = {corpus: _spread(trained, asked.calibration) for corpus, (trained, _) in parts.items()}
        texts = {corpus: _spread(held, asked.windows) for corpus, (_, held) in parts.items()}
        calibration = torch.stack(list(spread.values())).transpose(0, 1).flatten(0, 1)
        statistics = measured_on(loaded.model, calibration)
        entry: dict[str, Any] = {"parameters": loaded.model.num_parameters(), "calibration_tokens": calibration.numel()}
        entry |= {"nll": statistics.meta["nll"], "experts": heard(statistics), "ways": {}}
        results["models"][name] = entry
        known: dict[str, Any] = {}
        for label, way in chosen.items():
            made = planned(loaded.model, statistics, asked.share, way, known)
            row = costs(loaded, statistics, texts, made)
            entry["ways"][label] = row
            write_json(asked.out, results)
            whole = row["kl"]["all"]
            print(
                f"{name}, {label}: KL {whole['kl']:.4f} [{whole['low']:.4f}, {whole['high']:.4f}], {row['seconds']:.0f} s; {row['made_of']}",
                flush=True,
            )
        del loaded, statistics
    results["mixture_over_dense"] = {
        label: results["models"]["mixture"]["ways"][label]["kl"]["all"]["kl"]
        / results["models"]["dense"]["ways"][label]["kl"]["all"]["kl"]
        for label in chosen
    }
    write_json(asked.out, results)
    print(results["mixture_over_dense"])


def _spread(tokens: Tensor, count: int) -> Tensor:
    """So many sequences, evenly over the corpus."""
    return tokens[torch.linspace(0, len(tokens) - 1, count).long()]


if __name__ == "__main__":
    main()
