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
import warnings
from collections import Counter
from importlib.metadata import version
from multiprocessing.connection import Connection
from pathlib import Path
from textwrap import shorten
from typing import Any

import torch
from transformers.utils import logging as transformers_logging

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))
from tests.zoo.tiny import causal_types  # noqa: E402
from tests.zoo.walk import compress, keep_dense, load  # noqa: E402

PAGE, RESULTS = ROOT / "docs" / "architectures.md", ROOT / "benchmarks" / "results" / "zoo.json"
MEMORY, SECONDS = 8 * 2**30, 180


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
        lines.append(f"| `{name}` | {row['outcome']} | {reached} | {shorten(reason.replace('|', '/'), 160, placeholder=' …')} |")
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
