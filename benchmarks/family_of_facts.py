"""A second family for the forecasts, on facts: a small Gemma 3 that knows made biographies by heart, planned, compressed and measured.

A Gemma that is trained on a million tokens of real text (`second_family.py`) learns which word follows which, most of it through its
embedding, and loses nothing when its blocks are cut. Biographies are learnt by heart in minutes, in the blocks. Calibration and
measurement draw other sentences about the same people.

    OMP_NUM_THREADS=1 python benchmarks/family_of_facts.py --folder runs/gemma-of-facts

A folder that holds the trained model already is not trained again.
"""

import argparse
import json
import tempfile
import time
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, PreTrainedModel, get_cosine_schedule_with_warmup

from budget import BITS, budget_of, left_out, measured, rows, windows_of
from fasc.diagnosis.emergence import World, make_world, recall, sequences
from fasc.model.load import LoadedModel
from fasc.model.options import LayersConfig
from fasc.planning.options import MethodConfig
from fasc.planning.plan import layers_in
from fasc.planning.table import composition
from fasc.progress import progress
from fasc.provenance import provenance
from fasc.serving.checkpoint import header_bytes
from fasc.stages.calibrate import collect
from fasc.stages.compress import needs_of
from fasc.stages.plan import groups_of, make_plan
from fasc.storage import read_json, write_json
from second_family import ROWS, small_gemma, verdict

TEXT = "biographies"
LENGTH = 64
CALIBRATION, HELD_OUT = 10, 20
"""Seeds of text; those of training begin at 1,000."""


def text(world: World, count: int, seed: int) -> Tensor:
    """Sequences of the world, int64 [count, 64]."""
    return sequences(world, count, LENGTH, seed, shuffled=False)


def trained(world: World, asked: argparse.Namespace) -> tuple[PreTrainedModel, dict[str, Any]]:
    """The model, and how it was trained."""
    notes = asked.folder / "training.json"
    if notes.is_file():
        return AutoModelForCausalLM.from_pretrained(asked.folder).eval(), read_json(notes)
    torch.manual_seed(asked.seed)
    model = small_gemma(len(world.words), width=128, blocks=4)
    optimizer = torch.optim.AdamW(model.parameters(), lr=asked.learning_rate, betas=(0.9, 0.98), weight_decay=0.01)
    schedule = get_cosine_schedule_with_warmup(optimizer, asked.steps // 10, asked.steps)
    started = time.perf_counter()
    model.train()
    with progress("training a Gemma", asked.steps, "steps") as advance:
        for step in range(asked.steps):
            ids = text(world, 32, 1000 + step)
            loss = F.cross_entropy(model(input_ids=ids, use_cache=False).logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
            advance()
    model.eval()
    made = {"steps": asked.steps, "people": asked.people, "seconds": time.perf_counter() - started}
    made |= {"loss": float(loss.detach()), "facts": recall(model, world), "parameters": model.num_parameters()}
    model.save_pretrained(asked.folder)
    write_json(notes, made)
    return model, made


def main() -> None:
    """Train if need be, run the rows, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, required=True, help="of the model; trained there if it holds none")
    parser.add_argument("--people", type=int, default=60, help="with four facts each")
    parser.add_argument("--steps", type=int, default=800, help="of training, on 32 new sequences of 64 words each")
    parser.add_argument("--learning-rate", type=float, default=2e-3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--sequences", type=int, default=1024, help="that calibrate")
    parser.add_argument("--windows", type=int, default=64, help="held-out sequences, to measure")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "family-of-facts.json")
    asked = parser.parse_args()
    world = make_world(asked.people, asked.seed)
    model, training = trained(world, asked)
    print(json.dumps(training), flush=True)
    methods = (MethodConfig(name="fasc", bits=BITS, bits_vocabulary=True), MethodConfig(name="fasc"))
    tokens = text(world, asked.sequences, CALIBRATION)
    statistics = collect(model, corpus=tokens, needs=needs_of(methods), labels="sampled", batch_tokens=2048)
    groups = groups_of(model, statistics, LayersConfig())
    layers = sum(layer.parameters for layer in layers_in(groups))
    found: dict[str, Any] = {"rows": {}}
    known: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        windows = {TEXT: windows_of(model, text(world, asked.windows, HELD_OUT), Path(folder) / TEXT)}
        for row in (row for row in rows() if any(fnmatch(row.name, name) for name in ROWS.split(";"))):
            options = MethodConfig(name="fasc", **row.options)
            loaded = LoadedModel(model, None)
            most = header_bytes(model, groups, tensors=9 if options.bits else 5)
            made = make_plan(model, groups, options, budget_of(row, loaded, layers, most), statistics, known=known)
            entry = {"made_of": composition(made), **made.totals, **measured(loaded, statistics, made, windows, [])}
            found["rows"][row.name] = entry
            print(row.name, f"{made.predicted_loss:.4f}", entry["scores"][TEXT], flush=True)
    found["expected"] = left_out(found["rows"], (TEXT,))
    table = verdict(found, (TEXT,))
    write_json(asked.out, {"provenance": provenance(), "training": training, "table": table, **found})
    print(json.dumps(table, indent=1))


if __name__ == "__main__":
    main()
