"""What measuring moments costs, against the plain forward and backward pass it rides on.

Prints, on one run and on the same tokens: seconds of a plain forward and backward pass (gradients of activations only), seconds
of ``collect`` for ``fasc`` and ``svd``, their ratio (the passes alternate, and the median of the pairs is taken), and the peak
resident memory of a whole ``fasc compress`` over the bytes of the model.
"""

import argparse
import contextlib
import json
import statistics as stats
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import psutil
import torch
from transformers import PreTrainedModel

from fasc.methods import METHODS
from fasc.model.load import load_model
from fasc.provenance import provenance
from fasc.statistics.collect import collect_moments
from fasc.statistics.objective import summed_nll
from fasc.statistics.options import CalibrationConfig
from fasc.storage import write_json


def plain_pass(model: PreTrainedModel, tokens: torch.Tensor, batch_tokens: int) -> float:
    """Seconds of forward and backward over all tokens, in the same batches as ``collect``."""
    model.requires_grad_(False)  # noqa: FBT003
    handle = model.get_input_embeddings().register_forward_hook(lambda _m, _a, output: output.requires_grad_())
    rows = max(1, batch_tokens // tokens.shape[1])
    start = time.perf_counter()
    for batch in tokens.split(rows):
        summed_nll(model(input_ids=batch, use_cache=False).logits, batch, None, "corpus").backward()
    seconds = time.perf_counter() - start
    handle.remove()
    return seconds


def peak_memory(command: list[str]) -> int:
    """Peak resident bytes of a process, from the operating system's own account where there is one."""
    with contextlib.suppress(FileNotFoundError), tempfile.NamedTemporaryFile("r") as report:
        timed = ["/usr/bin/time", "-f", "%M", "-o", report.name, *command]
        subprocess.run(timed, check=True, stdout=subprocess.DEVNULL)
        return int(report.read().split()[-1]) * 1024
    process = psutil.Popen(command, stdout=subprocess.DEVNULL)
    peak = 0
    while process.poll() is None:
        with contextlib.suppress(psutil.NoSuchProcess):
            peak = max(peak, process.memory_info().rss)
        time.sleep(0.02)
    return peak


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--sequences", type=int, default=64)
    parser.add_argument("--sequence-length", type=int, default=128)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--batch-tokens", type=int, default=CalibrationConfig().batch_tokens)
    parser.add_argument("--no-memory", action="store_true", help="skip the run that measures peak memory")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()

    model = load_model(options.model, device="cpu").model
    model_bytes = sum(p.numel() * p.element_size() for p in model.parameters())
    generator = torch.Generator().manual_seed(0)
    shape = (options.sequences, options.sequence_length)
    tokens = torch.randint(model.config.vocab_size, shape, generator=generator)
    calibration = CalibrationConfig(batch_tokens=options.batch_tokens)
    needs = METHODS["fasc"].needs | METHODS["svd"].needs
    plain_pass(model, tokens[:4], options.batch_tokens)  # warm-up
    plain, full = [], []
    for _ in range(options.repeats):
        plain.append(plain_pass(model, tokens, options.batch_tokens))
        start = time.perf_counter()
        collect_moments(model, tokens, needs, calibration=calibration)
        full.append(time.perf_counter() - start)
    result = {
        "plain_seconds": stats.median(plain),
        "collect_seconds": stats.median(full),
        "ratio": stats.median(f / p for f, p in zip(full, plain, strict=True)),
        "tokens": tokens.numel(),
        "threads": torch.get_num_threads(),
        "model": options.model,
        "model_bytes": model_bytes,
    }
    if not options.no_memory:
        with tempfile.TemporaryDirectory() as folder:
            text = Path(folder) / "text.txt"
            text.write_text("The quick brown fox jumps over the lazy dog. " * 4000, encoding="utf-8")
            command = [
                sys.executable,
                "-m",
                "fasc",
                "compress",
                options.model,
                "--method",
                "fasc",
                "--rank-fraction",
                "0.5",
            ]
            command += ["--corpus", str(text), "--sequences", str(options.sequences), "--sequence-length"]
            command += [str(options.sequence_length), "--damping", "1e-3", "--out", f"{folder}/out"]
            result["peak_bytes"] = peak_memory(command)
        result["peak_over_model"] = result["peak_bytes"] / model_bytes
    print(json.dumps(result, indent=2))
    if options.json:
        write_json(options.json, result | {"provenance": provenance()})


if __name__ == "__main__":
    main()
