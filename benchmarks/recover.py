"""Time of a recovery step, by part and by precision, and of the parts as autograd would do them, in turn.

On the CPU. A ratio above 1 says how many times longer autograd's way takes than ours, or float32 than bfloat16.
"""

import argparse
import json
import statistics as stats
import time
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

from fasc.edits.structure import edited_layers
from fasc.linalg.divergence import kl_divergence
from fasc.model.load import load_model
from fasc.provenance import provenance
from fasc.storage import write_json


def autograd_divergence(found: Tensor, target: Tensor) -> Tensor:
    """KL(target ‖ found) of logits, of torch's own parts."""
    p, q = (F.log_softmax(logits.float(), dim=-1) for logits in (target, found))
    return F.kl_div(q, p, log_target=True, reduction="batchmean")


def own_divergence(logits: Tensor, target: Tensor) -> Tensor:
    """The same by fasc."""
    return kl_divergence(logits, target).mean()


def seconds(work: Callable[[], object]) -> float:
    """Of one call."""
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


PAIRS = (
    ("divergence, autograd", "divergence"),
    ("step in float32, divergence by autograd", "step in float32"),
    ("step in bfloat16, divergence by autograd", "step in bfloat16"),
    ("step in float32", "step in bfloat16"),
)


def works_of(checkpoint: str, dense_model: str, tokens: int, length: int) -> dict[str, Callable[[], None]]:
    """What is timed, by name."""
    model = load_model(checkpoint, dtype="float32", device="cpu").model
    dense = load_model(dense_model, dtype="float32", device="cpu").model
    model.requires_grad_(requires_grad=False)
    for name in edited_layers(model):
        model.get_submodule(name).requires_grad_()
    ids = torch.randint(0, model.config.vocab_size, (tokens // length, length))
    logits = torch.randn(2, tokens, model.config.vocab_size).bfloat16()

    def apart(function: Callable[[Tensor, Tensor], Tensor]) -> None:
        function(logits[0].detach().requires_grad_(), logits[1]).backward()

    def step(function: Callable[[Tensor, Tensor], Tensor], *, mixed: bool) -> None:
        with torch.autocast("cpu", dtype=torch.bfloat16) if mixed else nullcontext():
            with torch.no_grad():
                target = dense(input_ids=ids, use_cache=False).logits
            logits = model(input_ids=ids, use_cache=False).logits
            loss = function(logits.flatten(0, 1), target.flatten(0, 1))
        loss.backward()

    return {
        "divergence, autograd": lambda: apart(autograd_divergence),
        "divergence": lambda: apart(own_divergence),
        "step in float32, divergence by autograd": lambda: step(autograd_divergence, mixed=False),
        "step in float32": lambda: step(own_divergence, mixed=False),
        "step in bfloat16, divergence by autograd": lambda: step(autograd_divergence, mixed=True),
        "step in bfloat16": lambda: step(own_divergence, mixed=True),
    }


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("checkpoint", help="a compressed checkpoint")
    parser.add_argument("--dense", default="smollm2-135m")
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    works = works_of(options.checkpoint, options.dense, options.tokens, options.length)
    times: dict[str, list[float]] = {name: [] for name in works}
    for turn in range(options.repeats + 1):
        for name, work in works.items():
            taken = seconds(work)
            if turn:  # the first makes what is kept between steps
                times[name].append(taken)
    medians = {name: stats.median(taken) for name, taken in times.items()}
    rows = [{"of": slow, "over": fast, "ratio": round(medians[slow] / medians[fast], 2)} for slow, fast in PAIRS]
    for row in rows:
        print(json.dumps(row))
    if options.json:
        sizes = {"tokens": options.tokens, "length": options.length, "threads": torch.get_num_threads()}
        write_json(options.json, {"rows": rows, **sizes, "provenance": provenance()})


if __name__ == "__main__":
    main()
