"""A second family for the forecasts: a small Gemma 3 trained here, then planned, compressed and measured as SmolLM2 was.

Norms before and after every sublayer, norms of queries and keys, windowed attention, four query heads for one key-value head, and
an embedding that is the head as well: what the Llama family has not. It is trained from nothing for a quarter of an hour of one core,
so it knows little; its weights are trained ones all the same, and its forecasts are judged like those of any model.

    FASC_DATA=DATA OMP_NUM_THREADS=1 python benchmarks/second_family.py --folder runs/gemma

A folder that holds the trained model already is not trained again.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator, Sequence
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor
from torch.nn import functional as F
from transformers import (
    AutoModelForCausalLM,
    Gemma3TextConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    get_cosine_schedule_with_warmup,
)

from fasc.progress import progress
from fasc.provenance import provenance
from fasc.storage import read_json, write_json
from fasc.text.corpus import TextRequest, load_corpus
from fasc.text.documents import Chat
from fasc.text.sources import find_source

CORPORA = ("wikitext2", "c4", "calib_exllamav2/wiki.txt", "calib_exllamav2/code.txt")
"""Of the named ones, the half that calibrates; what evaluates is not read."""

ROWS = "params 0.9;params 0.8;params 0.6;bits 5.25 alone;bits 4.25 alone;bits 3.25 alone;bits 5.25 joint;bits 4.25 joint;bits 3.25 joint"
WITHIN = 0.25
"""Of what was measured: so far may a forecast lie from it, either way."""

HELD_OUT = 20
"""Every so many-th sequence is never trained on."""


def made_tokenizer(size: int, texts: Iterable[str]) -> PreTrainedTokenizerFast:
    """Byte-level BPE of these texts."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    special = ["<pad>", "<eos>", "<bos>"]
    trainer = trainers.BpeTrainer(vocab_size=size, special_tokens=special, initial_alphabet=sorted(alphabet), show_progress=False)
    backend.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="<pad>", eos_token="<eos>", bos_token="<bos>")


def small_gemma(vocabulary: int, *, width: int = 256, blocks: int = 6) -> PreTrainedModel:
    """A Gemma 3 of some million block parameters, not trained."""
    config = Gemma3TextConfig(
        vocab_size=vocabulary,
        hidden_size=width,
        intermediate_size=4 * width,
        num_hidden_layers=blocks,
        num_attention_heads=4,
        num_key_value_heads=1,
        head_dim=width // 4,
        query_pre_attn_scalar=width // 4,
        sliding_window=128,
        layer_types=["full_attention" if block % 3 == 2 else "sliding_attention" for block in range(blocks)],
        max_position_embeddings=2048,
        pad_token_id=0,
        eos_token_id=1,
        bos_token_id=2,
        tie_word_embeddings=True,
    )
    return AutoModelForCausalLM.from_config(config, dtype=torch.float32)


def texts_of(corpora: Iterable[str]) -> Iterator[str]:
    """Documents that may be trained on, as text."""
    for document in chain.from_iterable(find_source(corpus, "calibration", None).documents() for corpus in corpora):
        yield document.plain if isinstance(document, Chat) else document.text


def sequences_of(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, length: int) -> tuple[Tensor, Tensor]:
    """All sequences of all corpora, int64 [sequences, length]: those to train on, and those held out."""
    parts = []
    for corpus in CORPORA:
        request = TextRequest(corpus=corpus, sequences=None, sequence_length=length, seed=0, role="calibration")
        parts.append(load_corpus(model, tokenizer, request).tokens)
    tokens = torch.cat(parts)
    held = torch.arange(len(tokens)) % HELD_OUT == HELD_OUT - 1
    return tokens[~held], tokens[held]


def loss(model: PreTrainedModel, ids: Tensor) -> Tensor:
    """Of the next token, nats; products in bfloat16."""
    with torch.autocast(ids.device.type, dtype=torch.bfloat16):
        logits = model(input_ids=ids, use_cache=False).logits
    return F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), ids[:, 1:].flatten())


def train(model: PreTrainedModel, texts: Tensor, held_out: Tensor, asked: argparse.Namespace) -> list[dict[str, float]]:
    """AdamW for so many tokens, in place. Gives the loss at each tenth of the way and, last, that of the held-out sequences."""
    rows = max(1, asked.batch_tokens // texts.shape[1])
    steps = max(1, asked.tokens // (rows * texts.shape[1]))
    optimizer = torch.optim.AdamW(model.parameters(), lr=asked.learning_rate, betas=(0.9, 0.95), weight_decay=0.05)
    schedule = get_cosine_schedule_with_warmup(optimizer, -(-steps // 20), steps)
    generator = torch.Generator().manual_seed(asked.seed)
    order = torch.cat([torch.randperm(len(texts), generator=generator) for _ in range(-(-rows * steps // len(texts)))])
    said: list[dict[str, float]] = []
    model.train()
    with progress("training a Gemma", steps * rows * texts.shape[1], "tokens") as advance:
        for step in range(steps):
            found = loss(model, texts[order[step * rows : (step + 1) * rows]])
            found.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
            advance(rows * texts.shape[1])
            if step % max(1, steps // 10) == 0:
                said.append({"step": step, "nll": found.item()})
                print(json.dumps(said[-1]), flush=True)
    model.eval()
    with torch.no_grad():
        values = [loss(model, part) for part in held_out.split(rows)]
    said.append({"step": steps, "held_out_nll": float(torch.stack(values).mean())})
    return said


def made(asked: argparse.Namespace) -> dict[str, Any]:
    """Train the model into its folder; gives what is to be known of it."""
    torch.manual_seed(asked.seed)
    tokenizer = made_tokenizer(asked.vocabulary, texts_of(CORPORA))
    model = small_gemma(len(tokenizer))
    texts, held_out = sequences_of(model, tokenizer, asked.length)
    started = time.perf_counter()
    steps = train(model, texts, held_out, asked)
    notes: dict[str, Any] = {key: value for key, value in vars(asked).items() if not isinstance(value, Path)}
    notes |= {"corpora": CORPORA, "sequences": len(texts), "steps": steps, "seconds": time.perf_counter() - started}
    embedding = model.get_input_embeddings().weight.numel()
    notes |= {"parameters": model.num_parameters(), "outside_of_the_embedding": model.num_parameters() - embedding}
    model.save_pretrained(asked.folder)
    tokenizer.save_pretrained(asked.folder)
    write_json(asked.folder / "training.json", notes)
    return notes


def budget_rows(asked: argparse.Namespace) -> dict[str, Any]:
    """What `benchmarks/budget.py` finds on the model."""
    script = Path(__file__).with_name("budget.py")
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "budget.json"
        command = [sys.executable, str(script), "--model", str(asked.folder), "--rows", ROWS, "--out", str(out)]
        command += ["--sequences", str(asked.sequences), "--sequence-length", str(asked.length), "--context", str(asked.length)]
        command += ["--windows", str(asked.windows)]
        subprocess.run(command, check=True, env=os.environ)
        found: dict[str, Any] = read_json(out)
    return found


def verdict(found: dict[str, Any], texts: Sequence[str] = ("wikitext2", "c4")) -> dict[str, Any]:
    """Forecast ÷ measured of each row, as it stands and corrected by the other rows of its kind; the mean over texts."""
    table = {}
    for name, row in found["rows"].items():
        kl = sum(row["scores"][text]["kl"] for text in texts) / len(texts)
        expected = found["expected"].get(name)
        ratios = {"forecast": row["predicted_loss"] / kl, "corrected": expected["kl"] / kl if expected else None}
        within = {key: ratio is not None and abs(ratio - 1) <= WITHIN for key, ratio in ratios.items()}
        table[name] = {"forecast": row["predicted_loss"], "measured": kl, "over_measured": ratios, "within": within}
    return table


def main() -> None:
    """Train if need be, run the rows, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, required=True, help="of the model; trained there if it holds none")
    parser.add_argument("--tokens", type=int, default=1_500_000, help="to train on")
    parser.add_argument("--length", type=int, default=256, help="tokens of a sequence, in training, calibration and windows")
    parser.add_argument("--batch-tokens", type=int, default=2048)
    parser.add_argument("--learning-rate", type=float, default=2e-3)
    parser.add_argument("--vocabulary", type=int, default=8192)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--sequences", type=int, default=256, help="that calibrate")
    parser.add_argument("--windows", type=int, default=24, help="of each text, to measure")
    parser.add_argument("--train-only", action="store_true")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "second-family.json")
    asked = parser.parse_args()
    notes = asked.folder / "training.json"
    training = read_json(notes) if notes.is_file() else made(asked)
    if asked.train_only:
        return
    found = budget_rows(asked)
    results = {"provenance": provenance(), "training": training, "table": verdict(found)}
    write_json(asked.out, results | {key: found[key] for key in ("rows", "expected")})
    print(json.dumps(results["table"], indent=1))


if __name__ == "__main__":
    main()
