"""Which architectures of transformers does fasc compress? Walks every causal class, tiny, and writes docs/architectures.md.

    make zoo                              # all, about half an hour on one core
    python benchmarks/zoo.py --only llama,mamba2

Each model is made in a process of its own, with a limit of memory and of time: measured, planned at 70 %, compressed, saved, loaded in
another process by plain ``from_pretrained``, compared logit by logit, and asked to write with a cache.
"""

import argparse
import json
import multiprocessing
import resource
import signal
import sys
import tempfile
import traceback
import warnings
from collections import Counter
from importlib.metadata import version
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM
from transformers.utils import logging as transformers_logging

import fasc
from fasc.errors import FascError
from fasc.model.untouched import in_words

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))
from tests.zoo.tiny import causal_types, tiny_config  # noqa: E402

PAGE, RESULTS = ROOT / "docs" / "architectures.md", ROOT / "benchmarks" / "results" / "zoo.json"
MEMORY, SECONDS, WRITTEN = 8 * 2**30, 180, 4
SEQUENCES, LENGTH, LARGEST = 24, 16, 50_000_000


def build(model_type: str) -> Any:
    """A random model whose weights are large enough to matter."""
    torch.manual_seed(0)
    config = tiny_config(model_type)
    with torch.device("meta"):  # before it takes memory
        size = sum(parameter.numel() for parameter in AutoModelForCausalLM.from_config(config).parameters())
    if size > LARGEST:
        raise ValueError(f"the tiny config has {size:,} parameters")
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.is_floating_point():
                parameter.add_(0.05 * torch.randn_like(parameter))
    return model


def tokens_for(model: Any) -> torch.Tensor:
    """Token ids, none of them special."""
    size = model.get_input_embeddings().weight.shape[0]
    return torch.randint(5, min(size, 250), (SEQUENCES, LENGTH), generator=torch.Generator().manual_seed(1))


def compress(model_type: str, folder: Path) -> dict[str, Any]:
    """Build, measure, plan, compress, save; what the model in memory says is written beside it."""
    stage = "build"
    try:
        model = build(model_type)
        ids = tokens_for(model)
        with torch.no_grad():
            model(input_ids=ids[:2], use_cache=False)
        writes = can_write(model, ids)
        stage = "collect"
        statistics = fasc.collect(model, corpus=ids, sequences=SEQUENCES, sequence_length=LENGTH)
        stage = "plan"
        plan = fasc.plan(model, statistics, param_fraction=0.7, overhead=0, rank_multiple=1, damping=1e-2)
        whole = model.num_parameters()
        stage = "compress"
        small = fasc.compress(model, statistics, plan)
        stage = "save"
        small.save(folder / "small")
        with torch.no_grad():
            logits = small.model(input_ids=ids[:2], use_cache=False).logits
        said = {"logits": logits, "written": write(small.model, ids) if writes else None}
        torch.save(said, folder / "said.pt")
    except FascError as problem:
        return {"outcome": "refused", "stage": stage, "line": str(problem).splitlines()[0]}
    except Exception as problem:  # noqa: BLE001 - what went wrong is the result
        outcome = "not built" if stage == "build" else "failed"
        return {
            "outcome": outcome,
            "stage": stage,
            "line": f"{type(problem).__name__}: {problem}"[:300],
            "trace": traceback.format_exc(),
        }
    return {
        "reached": plan.dense_parameters / whole,
        "dense": in_words(plan.outside or {}, whole),
        "writes": writes,
    }


def can_write(model: Any, ids: torch.Tensor) -> bool:
    """Whether the dense class generates at all: decoders that want an encoder do not."""
    try:
        return bool(model.can_generate()) and len(write(model, ids)) == WRITTEN
    except Exception:  # noqa: BLE001 - whatever it is, it is not ours
        return False


def write(model: Any, ids: torch.Tensor) -> list[int]:
    """Tokens written with a cache."""
    with torch.no_grad():
        done = model.generate(ids[:1], max_new_tokens=WRITTEN, min_new_tokens=WRITTEN, do_sample=False)
    return done[0, -WRITTEN:].tolist()


def load(folder: Path) -> dict[str, Any]:
    """In another process: plain transformers."""
    stage = "load"
    try:
        said = torch.load(folder / "said.pt")
        model = AutoModelForCausalLM.from_pretrained(folder / "small").eval()
        ids = tokens_for(model)
        with torch.no_grad():
            difference = float((model(input_ids=ids[:2], use_cache=False).logits - said["logits"]).abs().max())
        stage = "generate"
        if said["written"] is not None and write(model, ids) != said["written"]:
            return {"outcome": "failed", "stage": stage, "line": "the loaded model writes other tokens"}
    except Exception as problem:  # noqa: BLE001 - as above
        return {
            "outcome": "failed",
            "stage": stage,
            "line": f"{type(problem).__name__}: {problem}"[:300],
            "trace": traceback.format_exc(),
        }
    if difference > 0:
        return {"outcome": "failed", "stage": "load", "line": f"logits differ by {difference:.2g} after loading"}
    return {"outcome": "works"}


def apart(work: Any, *arguments: Any) -> dict[str, Any]:
    """Run a step in a process of its own."""

    def child(end: Connection) -> None:
        resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
        signal.alarm(SECONDS)
        warnings.simplefilter("ignore")
        transformers_logging.set_verbosity_error()
        end.send(work(*arguments))

    here, there = multiprocessing.Pipe()
    process = multiprocessing.get_context("fork").Process(target=child, args=(there,))
    process.start()
    there.close()
    try:
        result: dict[str, Any] = here.recv()
    except EOFError:
        process.join()
        result = {
            "outcome": "failed",
            "stage": "run",
            "line": f"the process ended with {process.exitcode}: memory or {SECONDS} s",
        }
    process.join()
    return result


def keep_dense(model_type: str, folder: Path) -> dict[str, Any]:
    """Save the dense model as plain transformers does."""
    model = build(model_type)
    model.save_pretrained(folder / "small")
    with torch.no_grad():
        torch.save({"logits": model(input_ids=tokens_for(model)[:2], use_cache=False).logits, "written": None}, folder / "said.pt")
    return {}


def try_out(model_type: str) -> dict[str, Any]:
    """The whole way of one architecture; where loading fails, whether transformers loads what it has written itself."""
    with tempfile.TemporaryDirectory() as folder:
        result = apart(compress, model_type, Path(folder))
        result = result if "outcome" in result else result | apart(load, Path(folder))
    if result["outcome"] == "failed" and result["stage"] == "load":
        with tempfile.TemporaryDirectory() as folder:
            dense = apart(keep_dense, model_type, Path(folder))
            dense = dense if "outcome" in dense else apart(load, Path(folder))
        if dense["outcome"] != "works":
            line = f"transformers does not load the dense model that it saved either: {dense['line']}"
            return result | {"outcome": "not loaded", "line": line}
    return result


def page(rows: dict[str, dict[str, Any]], of: str) -> str:
    """The table in Markdown."""
    counts = Counter(row["outcome"] for row in rows.values())
    tried = len(rows) - counts["not built"] - counts["not loaded"]
    lines = [
        "# Architectures",
        "",
        f"Every causal class of transformers {of}, as a tiny random model at 70 % of the parameters: measured, planned, compressed, saved, loaded in",
        "another process by plain `from_pretrained`, the same logits, the same tokens written with a cache. `make zoo` writes this page.",
        "",
        f"**{counts['works']} of {tried} work.** {counts['refused']} are refused in one line, {counts['failed']} fail, "
        f"{counts['not built']} could not be built tiny, and {counts['not loaded']} are not loaded by transformers when dense: they say nothing.",
        "",
        "| architecture | | parameters reached | what stays dense, or the reason |",
        "|---|---|--:|---|",
    ]
    for name, row in sorted(rows.items()):
        reached = f"{row['reached']:.0%}" if "reached" in row and row["outcome"] == "works" else ""
        reason = row["dense"] if row["outcome"] == "works" else f"{row['stage']}: {row['line']}"
        lines.append(f"| `{name}` | {row['outcome']} | {reached} | {reason.replace('|', '/').replace(chr(10), ' ')[:160]} |")
    lines += [
        "",
        "*Parameters reached* are those of layers that a plan may touch; in a tiny model the embeddings weigh more than in a real one.",
        "",
    ]
    return "\n".join(lines)


def main() -> None:
    """Walk, write the page and the numbers."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", help="architectures, separated by commas; the page is not written")
    parser.add_argument("--debug", action="store_true", help="print tracebacks")
    options = parser.parse_args()
    torch.set_num_threads(1)
    rows: dict[str, dict[str, Any]] = {}
    for name in options.only.split(",") if options.only else causal_types():
        rows[name] = try_out(name)
        row = rows[name]
        print(f"{name:28} {row['outcome']:10} {row.get('stage', ''):9} {row.get('line', '')[:150]}", flush=True)
        if options.debug and "trace" in row:
            print(row["trace"], flush=True)
        row.pop("trace", None)
    print(dict(Counter(row["outcome"] for row in rows.values())))
    if not options.only:
        versions = {name: version(name) for name in ("transformers", "torch", "fasc")}
        RESULTS.write_text(json.dumps({"versions": versions, "architectures": rows}, indent=1) + "\n", encoding="utf-8")
        PAGE.write_text(page(rows, versions["transformers"]), encoding="utf-8")


if __name__ == "__main__":
    main()
