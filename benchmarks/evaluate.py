"""Items per second of `lama` and `mmlu` beside scoring every pair of prompt and candidate by itself, in one run; same answers.

Naive scoring runs each (prompt, candidate) pair as one sequence, sorted by length and batched to the same number of tokens: no
prefix is shared, no cache used, no candidate left out.

    FASC_DATA=DATA python benchmarks/evaluate.py smollm2-135m --items 40 --shots 5
"""

import argparse
import random
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import torch
from transformers import PreTrainedModel

from fasc.evaluation.benchmarks.lama import read_trex
from fasc.evaluation.benchmarks.mmlu import read_mmlu
from fasc.evaluation.choices import score_continuations, split_tokens
from fasc.evaluation.cloze import candidate_tokens, searched
from fasc.evaluation.likelihood import finite_logits
from fasc.evaluation.options import EvaluationConfig
from fasc.evaluation.registry import Subject
from fasc.model.load import load_model
from fasc.provenance import provenance
from fasc.storage import write_json
from fasc.text.named import data_folder
from fasc.text.statements import lama_file

Result = TypeVar("Result")


def naive(model: PreTrainedModel, pairs: list[tuple[list[int], list[int]]], batch_tokens: int) -> list[float]:
    """Log-probability of each continuation behind its context, each pair a sequence of its own."""
    order = sorted(range(len(pairs)), key=lambda i: len(pairs[i][0]) + len(pairs[i][1]))
    scores = [0.0] * len(pairs)
    part = []
    for position, index in enumerate(order):
        part.append(index)
        longest = len(pairs[index][0]) + len(pairs[index][1])
        last = position == len(order) - 1
        following = 0 if last else len(pairs[order[position + 1]][0]) + len(pairs[order[position + 1]][1])
        if last or (len(part) + 1) * max(longest, following) > batch_tokens:
            rows = [[*pairs[i][0], *pairs[i][1]] for i in part]
            ids = torch.tensor([[*row, *[row[-1]] * (longest - len(row))] for row in rows])
            log = finite_logits(model, ids, "naive").float().log_softmax(-1)
            for row, i in enumerate(part):
                before, after = pairs[i]
                scores[i] = sum(float(log[row, len(before) - 1 + step, token]) for step, token in enumerate(after))
            part = []
    return scores


def timed(work: Callable[[], Result]) -> tuple[Result, float]:
    """What it gives, and how many seconds it took."""
    start = time.perf_counter()
    return work(), time.perf_counter() - start


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", nargs="?", default="smollm2-135m")
    parser.add_argument("--items", type=int, default=40)
    parser.add_argument("--shots", type=int, default=5)
    parser.add_argument("--batch-tokens", type=int, default=2048)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--json", type=Path, default=Path(__file__).parent / "results" / "evaluate.json")
    given = parser.parse_args()
    config = EvaluationConfig(shots=given.shots)
    loaded = load_model(given.model, device=given.device)
    subject = Subject(*loaded, None)
    draw = random.Random(0)
    rows = []
    with torch.no_grad():
        lama = draw.sample(read_trex(lama_file(data_folder(None))), given.items)
        pairs = [
            (loaded.tokenizer(item.prompt)["input_ids"], tokens)
            for item in lama
            for tokens in candidate_tokens(loaded.tokenizer, item.candidates)
        ]
        slow, slow_s = timed(lambda: naive(loaded.model, pairs, given.batch_tokens))
        fast, fast_s = timed(lambda: searched(subject, lama, "lama", given.batch_tokens))
        flat = iter(slow)
        best = []
        for item in lama:
            scores = [next(flat) for _ in item.candidates]
            best.append((max(range(len(scores)), key=scores.__getitem__), scores[item.answer]))
        same = sum(a == b for (a, _), (b, _) in zip(fast, best, strict=True))
        apart = max(abs(a - b) for (_, a), (_, b) in zip(fast, best, strict=True))
        rows.append(row("lama", (len(lama), len(pairs)), (slow_s, fast_s), same, apart))

        mmlu = draw.sample(read_mmlu(config), given.items)
        texts = [pair for item in mmlu for pair in item.pairs]
        tokens = [split_tokens(loaded.tokenizer, *pair) for pair in texts]
        slow, slow_s = timed(lambda: naive(loaded.model, tokens, given.batch_tokens))
        groups = [item.group for item in mmlu for _ in item.pairs]
        found, fast_s = timed(lambda: score_continuations(subject, texts, groups, "mmlu", given.batch_tokens))
        apart = max(abs(a - b.log_probability) for a, b in zip(slow, found, strict=True))
        answers = [
            [max(range(4), key=lambda k, i=i, s=s: s[4 * i + k]) for i in range(len(mmlu))]
            for s in (slow, [one.log_probability for one in found])
        ]
        same = sum(a == b for a, b in zip(*answers, strict=True))
        rows.append(row(f"mmlu, {given.shots} shots", (len(mmlu), len(texts)), (slow_s, fast_s), same, apart))
    print("| benchmark | items | pairs | naive items/s | items/s | ratio | same answers | largest difference, nats |")
    print("|---|--:|--:|--:|--:|--:|--:|--:|")
    for one in rows:
        print(
            f"| {one['benchmark']} | {one['items']} | {one['pairs']:,} | {one['items'] / one['naive_seconds']:.2f} | "
            f"{one['items'] / one['seconds']:.2f} | {one['ratio']:.1f} | {one['same']} | {one['difference']:.1e} |"
        )
    write_json(given.json, {"rows": rows, "provenance": provenance(model=given.model)})


def row(benchmark: str, counts: tuple[int, int], seconds: tuple[float, float], same: int, difference: float) -> dict[str, Any]:
    """One benchmark, naive and ours."""
    return {
        "benchmark": benchmark,
        "items": counts[0],
        "pairs": counts[1],
        "naive_seconds": seconds[0],
        "seconds": seconds[1],
        "ratio": seconds[0] / seconds[1],
        "same": same,
        "difference": difference,
    }


if __name__ == "__main__":
    main()
