"""A model of random weights through the whole way within a limit of memory: seconds and most resident bytes of each stage.

Blocks of Llama-3.2-1B's shapes in bfloat16 (16 of them make 1.2 billion parameters), each stage in a process of its own, as a user
would type it: collect with --max-memory, plan, compress, and the result loaded and run; then collect block by block, which must
give the same bits, and compress with svd. Then, also in processes of their own, each
group of one block of Llama-3-8B's shapes decomposed: what that takes beside the weight and the moments, in units of its Σ_xx.

The loss of such a model says nothing; memory and time do not depend on what the weights are. Other work on the machine makes the
seconds longer, not the bytes: the load is written beside them.

    python benchmarks/large.py --max-memory 12GB
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from fasc.evaluation.footprint import peak_memory, prompt_of
from fasc.methods import solver
from fasc.model.load import load_model
from fasc.options import bytes_of
from fasc.provenance import provenance
from fasc.statistics.accumulators import Covariance
from fasc.statistics.moments import GradientMoment, Statistics, UnitStatistics
from fasc.storage import write_json

SHAPES = {"hidden_size": 2048, "intermediate_size": 8192, "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 64}
VOCABULARY = 128_256
SEQUENCE = 128

GROUPS = {"q+k+v": (4096, 6144), "o": (4096, 4096), "gate+up": (4096, 28672), "down": (14336, 4096)}
"""d_in and Σ d_out of the groups of a block of Llama-3-8B."""


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """Bytes as tokens: any text can be read, and nothing has to be fetched."""
    vocabulary = {"<bos>": 0, "<eos>": 1, "<pad>": 2}
    vocabulary |= {character: 3 + place for place, character in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<bos>", eos_token="<eos>", pad_token="<pad>")


def make(folder: Path, blocks: int, shrink: int) -> None:
    """A Llama of random weights, its widths and vocabulary divided by ``shrink``."""
    torch.manual_seed(0)
    sizes = {name: value if name == "head_dim" else value // shrink for name, value in SHAPES.items()}
    config = LlamaConfig(
        **sizes, vocab_size=VOCABULARY // shrink, num_hidden_layers=blocks, tie_word_embeddings=True, dtype="bfloat16"
    )
    torch.set_default_dtype(torch.bfloat16)
    LlamaForCausalLM(config).save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)


def text(file: Path, tokens: int) -> None:
    """So many bytes and more, of words in random order."""
    words = [
        "the",
        "quick",
        "brown",
        "fox",
        "jumps",
        "over",
        "a",
        "lazy",
        "dog",
        "while",
        "five",
        "wizards",
        "mix",
        "jugs",
        "of",
        "black",
        "quartz",
    ]
    picks = torch.randint(len(words), (tokens,), generator=torch.Generator().manual_seed(0)).tolist()
    file.write_text(" ".join(words[one] for one in picks), encoding="utf-8")


def loaded_and_run(folder: Path) -> None:
    """Load a checkpoint and read one sequence."""
    model = load_model(folder, device="cpu").model
    with torch.no_grad():
        logits = model(input_ids=prompt_of(model, 1, SEQUENCE), use_cache=False).logits
    if not bool(torch.isfinite(logits).all()):
        raise ValueError("the loaded model gives NaN or infinity")


def same_moments(one: Path, other: Path) -> None:
    """See that two folders hold the same bits."""
    first, second = Statistics.load(one), Statistics.load(other)
    for name, group in first.groups.items():
        twin = second.groups[name]
        pairs = [(group.input.matrix, twin.input.matrix)]
        pairs += [(moment.covariance.matrix, twin.gradients[unit].covariance.matrix) for unit, moment in group.gradients.items()]
        if not all(torch.equal(*pair) for pair in pairs):
            raise ValueError(f"the moments of {name} differ")


def decomposed(d_in: int, d_out: int) -> dict[str, float]:
    """What decomposing a group takes beside its weight and its moments."""
    generator = torch.Generator().manual_seed(0)

    def covariance(size: int) -> Covariance:
        matrix = torch.full((size, size), 0.3 / size).diagonal_scatter(1 / torch.arange(1, size + 1))  # positive definite
        return Covariance(torch.zeros(size), matrix)

    weight = torch.empty(d_out, d_in, dtype=torch.float64).normal_(generator=generator)
    side = "input" if d_in <= d_out else "output"
    unit = UnitStatistics("unit", 10 * d_in, covariance(d_in), GradientMoment(side, covariance(min(d_in, d_out)), None))
    chosen = solver("fasc")
    given, start = psutil.Process().memory_info().rss, time.perf_counter()
    chosen.decompose(weight, unit)
    seconds, more = time.perf_counter() - start, peak_memory() - given
    sigma = 4 * d_in**2
    return {
        "d_in": d_in,
        "d_out": d_out,
        "seconds": seconds,
        "sigma_bytes": sigma,
        "given_bytes": given,
        "more_bytes": more,
        "more_over_sigma": more / sigma,
    }


def stage(name: str, command: list[str]) -> dict[str, Any]:
    """Seconds of a process, and the most bytes it had resident: all, and those that map no file."""
    start, load = time.perf_counter(), os.getloadavg()[0]
    process = psutil.Popen(command, stdout=subprocess.PIPE, text=True)
    peak = anonymous = 0
    status = Path(f"/proc/{process.pid}/status")
    while process.poll() is None:
        with suppress(OSError, ValueError, ProcessLookupError):
            lines = dict(line.split(":", 1) for line in status.read_text(encoding="utf-8").splitlines())
            if "VmHWM" in lines:
                peak = max(peak, 1024 * int(lines["VmHWM"].split()[0]))
                anonymous = max(anonymous, 1024 * int(lines["RssAnon"].split()[0]))
        time.sleep(0.02)
    said = process.stdout.read()
    row = {"stage": name, "seconds": time.perf_counter() - start, "peak_bytes": peak, "anonymous_bytes": anonymous, "load": load}
    print(json.dumps(row), flush=True)
    return row | {"said": said, "code": process.returncode}


def own(function: Callable[..., Any], *arguments: object) -> list[str]:
    """The command that runs a function of this file in a process of its own and prints what it returns."""
    return [sys.executable, __file__, "--call", json.dumps([function.__name__, *map(str, arguments)])]


def whole_way(options: argparse.Namespace, work: Path) -> list[dict[str, Any]]:
    """Every stage of it, in order."""
    text(work / "text.txt", options.tokens)
    dense, small, moments = work / "dense", work / "small", work / "moments"
    fasc = [sys.executable, "-m", "fasc"]
    collect = [*fasc, "collect", dense, "--methods", "fasc", "--corpus", work / "text.txt", "--sequence-length", SEQUENCE]
    collect += ["--sequences", -(-options.tokens // SEQUENCE), "--out"]
    passes = [*collect, moments, "--max-memory", options.max_memory]
    plan = ["--statistics", moments, "--param-fraction", 0.8, *(["--layouts", options.layouts] if options.layouts else [])]
    commands = {
        "make": own(make, dense, options.blocks, options.shrink),
        "collect": passes,
        "plan": [*fasc, "plan", dense, *plan, "--json", work / "plan.json"],
        "compress and save": [*fasc, "compress", dense, *plan, "--device", "cpu", "--out", small],
        "load and run": own(loaded_and_run, small),
        "collect, block by block": [*collect, work / "replayed", "--block-replay"],
        "compare the moments": own(same_moments, moments, work / "replayed"),
        "compress and save, svd": [*fasc, "compress", dense, "--method", "svd", *plan, "--device", "cpu", "--out", work / "svd"],
    }
    done, ended = work / "stages.json", work / "ended.json"
    rows = _list(done)
    for name, command in list(commands.items())[len(rows) :]:
        row = stage(name, [str(part) for part in command])
        row.pop("said")
        if row.pop("code"):  # the same call later goes on; what this one took is noted beside it
            write_json(ended, [*_list(ended), row])
            raise SystemExit(f"{name} was ended")
        rows.append(row | {"ended_before": [one for one in _list(ended) if one["stage"] == name]})
        write_json(done, rows)
    sizes = {name: sum(file.stat().st_size for file in (work / name).rglob("*.safetensors")) for name in ("dense", "small")}
    shards = [file.stat().st_size for file in sorted(moments.glob("*.safetensors"))]
    rows[0]["weights_bytes"], rows[1]["shards_bytes"], rows[3]["weights_bytes"] = sizes["dense"], shards, sizes["small"]
    return rows


def _list(file: Path) -> list[dict[str, Any]]:
    return json.loads(file.read_text(encoding="utf-8")) if file.is_file() else []


def block_of_8b(shrink: int) -> list[dict[str, Any]]:
    """Each group decomposed."""
    rows = []
    for group, (d_in, d_out) in GROUPS.items():
        row = stage(f"decompose {group}", own(decomposed, d_in // shrink, d_out // shrink))
        if row["code"]:
            raise SystemExit(f"decomposing {group} was ended")
        rows.append({"group": group, "peak_bytes": row["peak_bytes"], **json.loads(row["said"])})
    return rows


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--blocks", type=int, default=16)
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--max-memory", default="12GB", help="of collect")
    parser.add_argument("--limit", default="12GB", help="of resident memory; every stage is held against it")
    parser.add_argument("--layouts", help="of plan and compress, if not all")
    parser.add_argument(
        "--shrink", type=int, default=1, choices=(1, 2, 4, 8), help="divide all widths by this, to try the script out"
    )
    parser.add_argument("--work", type=Path, help="folder that is kept; stages that are done there are not done again")
    parser.add_argument("--skip", choices=("way", "block"), help="leave a part out; the file's own of it stays")
    parser.add_argument("--json", type=Path, default=Path(__file__).parent / "results" / "large.json")
    parser.add_argument("--call", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.call:
        called(options.call)
        return
    before = json.loads(options.json.read_text(encoding="utf-8")) if options.json.is_file() else {}
    result = {name: before[name] for name in ("way", "block") if name in before}
    if options.skip != "way":
        with tempfile.TemporaryDirectory() as scratch:
            work = options.work or Path(scratch)
            work.mkdir(parents=True, exist_ok=True)
            rows = whole_way(options, work)
        told = {name: getattr(options, name) for name in ("blocks", "tokens", "max_memory", "layouts", "shrink")}
        held = all(row["peak_bytes"] <= bytes_of(options.limit) for row in rows)
        result["way"] = {**told, "stages": rows, "limit": bytes_of(options.limit), "held": held, "provenance": provenance()}
        write_json(options.json, result)
    if options.skip != "block":
        result["block"] = {"shrink": options.shrink, "groups": block_of_8b(options.shrink), "provenance": provenance()}
    write_json(options.json, result | {"threads": torch.get_num_threads()})


def called(request: str) -> None:
    """In a process of its own: run a function of this file."""
    name, *arguments = json.loads(request)
    folders = {"make": make, "loaded_and_run": loaded_and_run}
    if name == "same_moments":
        same_moments(*map(Path, arguments))
    elif name in folders:
        folders[name](Path(arguments[0]), *map(int, arguments[1:]))  # type: ignore[operator]
    else:
        print(json.dumps(decomposed(*map(int, arguments))))


if __name__ == "__main__":
    main()
