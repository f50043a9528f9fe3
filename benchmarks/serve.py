"""How much faster is a smaller model in the engine that serves it? Dense and compressed in turn, in one process.

    python benchmarks/serve.py llama.cpp dense.gguf small.gguf [smaller.gguf …] [--json FILE]
    python benchmarks/serve.py vllm DENSE SMALL [SMALLER …]        # in an environment with vLLM and fasc

Prefill: tokens a second of a prompt of 512. Decode: tokens a second of 64 tokens after a prompt of 16, one sequence. Each round
times every model once, in turn; ratios are medians over rounds of compressed ÷ dense of the same round.
"""

import argparse
import json
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

PROMPT, START, DECODE = 512, 16, 64

Timed = tuple[Callable[[], float], Callable[[], float]]
"""Tokens a second of reading a prompt, and of writing."""


def ids(count: int) -> list[int]:
    """The same tokens for everyone."""
    return [100 + (7919 * position) % 30_000 for position in range(count)]


def in_llama_cpp(file: str, threads: int) -> Timed:
    """A model in llama.cpp."""
    import llama_cpp

    engine = llama_cpp.Llama(file, n_ctx=1024, n_batch=PROMPT, verbose=False, n_threads=threads, n_threads_batch=threads)

    def prefill() -> float:
        engine.reset()
        start = time.perf_counter()
        engine.eval(ids(PROMPT))
        return PROMPT / (time.perf_counter() - start)

    def decode() -> float:
        engine.reset()
        engine.eval(ids(START))
        start = time.perf_counter()
        for token in ids(DECODE):
            engine.eval([token])
        return DECODE / (time.perf_counter() - start)

    return prefill, decode


def in_vllm(folder: str, dtype: str, *, eager: bool) -> Timed:
    """A model in vLLM."""
    from vllm import LLM, SamplingParams

    engine = LLM(
        folder, dtype=dtype, enforce_eager=eager, max_model_len=1024, max_num_seqs=1, enable_prefix_caching=False,
        disable_log_stats=True,
    )  # fmt: skip

    def run(prompt: int, tokens: int) -> float:
        start = time.perf_counter()
        engine.generate(
            [{"prompt_token_ids": ids(prompt)}],
            SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True, detokenize=False),
            use_tqdm=False,
        )
        return time.perf_counter() - start

    def decode() -> float:
        return DECODE / (run(START, DECODE + 1) - run(START, 1))

    return lambda: PROMPT / run(PROMPT, 1), decode


def main() -> None:
    """Run the comparison."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("engine", choices=("llama.cpp", "vllm"))
    parser.add_argument("models", nargs="+", help="the dense one first")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--dtype", default="float32", help="vLLM's")
    parser.add_argument("--compiled", action="store_true", help="vLLM compiles; eager without it")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    if options.engine == "vllm":
        os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
        os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
        timed = [in_vllm(one, options.dtype, eager=not options.compiled) for one in options.models]
        import vllm as engine
    else:
        timed = [in_llama_cpp(one, options.threads) for one in options.models]
        import llama_cpp as engine
    for one in timed:
        for measure in one:
            measure()  # warm-up
    rounds = [[[measure() for measure in one] for one in timed] for _ in range(options.rounds)]
    rows = []
    for number, name in enumerate(options.models):
        row: dict[str, object] = {"model": Path(name).name}
        for kind, what in enumerate(("prefill", "decode")):
            ratios = sorted(one[number][kind] / one[0][kind] for one in rounds)
            row[what] = {
                "tokens per second": round(statistics.median(one[number][kind] for one in rounds), 1),
                "ratio": [round(statistics.median(ratios), 3), round(ratios[0], 3), round(ratios[-1], 3)],
            }
        rows.append(row)
        print(json.dumps(row), flush=True)
    if options.json:
        facts = {
            "engine": f"{options.engine} {engine.__version__}",
            "dtype": options.dtype if options.engine == "vllm" else "of the files",
            "compiled": options.compiled,
            "rounds": options.rounds,
            "cores": os.cpu_count(),
            "machine": platform.machine(),
            "python": platform.python_version(),
            "command": [Path(sys.argv[0]).name, *(Path(one).name for one in sys.argv[1:])],
        }
        options.json.write_text(json.dumps({"rows": rows, **facts}, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
