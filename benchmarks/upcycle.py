"""Make a small real mixture of experts: a dense Llama's MLPs, each copied into several experts and trained on several corpora.

The result is an ordinary Mixtral checkpoint with the dense model's attention. Before the training it says exactly what the dense
model says: equal experts whose gates sum to 1 are one MLP. Experts and routers alone are trained, on the next token; beside that
each router learns which corpus a token comes from, so that every expert hears mostly a corpus of its own.

    FASC_DATA=DATA python benchmarks/upcycle.py --device cuda --out runs/upcycled

Then `benchmarks/upcycle_costs.py` measures what compressing it costs.
"""

import argparse
import json
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, LlamaForCausalLM, MixtralConfig, PreTrainedModel, get_cosine_schedule_with_warmup

from fasc.model.load import LoadedModel, load_model
from fasc.progress import progress
from fasc.text.corpus import TextRequest, load_corpus

CORPORA = (
    "wikitext2",
    "c4",
    "calib_exllamav2/code.txt",
    "calib_exllamav2/technical.txt;calib_exllamav2/multilingual.txt",
)
"""One for each expert; one of several files has them one after the other."""

HELD_OUT = 5
"""Every so many-th sequence of a corpus is never trained on."""

_SHARED = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "hidden_act",
    "max_position_embeddings",
    "initializer_range",
    "rms_norm_eps",
    "rope_parameters",
    "tie_word_embeddings",
    "bos_token_id",
    "eos_token_id",
    "pad_token_id",
)
"""Settings that Llama and Mixtral understand alike."""


def upcycled(dense: LlamaForCausalLM, experts: int, of_a_token: int) -> PreTrainedModel:
    """A Mixtral whose experts all are the dense model's MLP: it computes the same.

    Args:
        dense: a Llama without biases.
        experts: in each block.
        of_a_token: how many of them a token goes to.

    Raises:
        ValueError: layers have biases, which Mixtral has no place for.
    """
    given = dense.config
    if given.attention_bias or given.mlp_bias:
        raise ValueError("Mixtral has no biases, and this Llama has")
    settings = {name: getattr(given, name) for name in _SHARED}
    config = MixtralConfig(**settings, num_local_experts=experts, num_experts_per_tok=of_a_token, sliding_window=None)
    state = dict(dense.state_dict())
    for block in range(given.num_hidden_layers):
        mlp = f"model.layers.{block}.mlp"
        gate, up, down = (state.pop(f"{mlp}.{name}_proj.weight") for name in ("gate", "up", "down"))
        state[f"{mlp}.experts.gate_up_proj"] = torch.cat([gate, up]).expand(experts, -1, -1)
        state[f"{mlp}.experts.down_proj"] = down.expand(experts, -1, -1)
    model = AutoModelForCausalLM.from_config(config, experts_implementation="eager", dtype=dense.dtype)
    absent, strange = model.to(dense.device).load_state_dict(state, strict=False)
    assert not strange and all(name.endswith("mlp.gate.weight") for name in absent), (absent, strange)  # noqa: S101
    return model.eval()


def sequences_of(loaded: LoadedModel, corpus: str, length: int) -> tuple[Tensor, Tensor]:
    """All sequences of a corpus, int64 [sequences, length]: those to train on, and those held out."""
    parts = []
    for name in corpus.split(";"):
        request = TextRequest(corpus=name, sequences=None, sequence_length=length, seed=0, role="calibration")
        parts.append(load_corpus(loaded.model, loaded.tokenizer, request).tokens)
    tokens = torch.cat(parts)
    held = torch.arange(len(tokens)) % HELD_OUT == HELD_OUT - 1
    return tokens[~held], tokens[held]


def trained(model: PreTrainedModel, texts: list[Tensor], asked: argparse.Namespace) -> list[dict[str, float]]:
    """Train experts and routers, in place: as many sequences of each corpus in every batch. Gives what each tenth step said."""
    device, experts = model.device, len(texts)
    model.requires_grad_(requires_grad=False)
    routers = [one.requires_grad_() for name, one in model.named_parameters() if name.endswith("mlp.gate.weight")]
    others = [one.requires_grad_() for name, one in model.named_parameters() if ".experts." in name]
    groups = [{"params": others, "lr": asked.learning_rate}, {"params": routers, "lr": 10 * asked.learning_rate}]
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.95), weight_decay=0.0)
    rows = max(1, asked.batch_tokens // asked.length // experts)
    steps = max(1, asked.tokens // (rows * experts * asked.length))
    schedule = get_cosine_schedule_with_warmup(optimizer, -(-steps // 10), steps)
    generator = torch.Generator().manual_seed(asked.seed)
    orders = [
        torch.cat([torch.randperm(len(text), generator=generator) for _ in range(-(-rows * steps // len(text)))])
        for text in texts
    ]
    origin = torch.arange(experts).repeat_interleave(rows * asked.length).to(device)
    said = []
    with progress("training the experts", steps * rows * experts * asked.length, "tokens") as advance:
        for step in range(steps):
            taken = slice(step * rows, (step + 1) * rows)
            ids = torch.cat([text[order[taken]] for text, order in zip(texts, orders, strict=True)]).to(device)
            with torch.autocast(device.type, dtype=torch.bfloat16):
                out = model(input_ids=ids, output_router_logits=True, use_cache=False)
            nll = F.cross_entropy(out.logits[:, :-1].flatten(0, 1).float(), ids[:, 1:].flatten())
            routed = torch.stack([F.cross_entropy(one.float(), origin) for one in out.router_logits]).mean()
            (nll + asked.routing * routed).backward()
            torch.nn.utils.clip_grad_norm_([*others, *routers], 1.0)
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()
            advance(ids.numel())
            if step % max(1, steps // 10) == 0 or step == steps - 1:
                said.append({"step": step, "nll": nll.item(), "routing": routed.item()})
                print(json.dumps(said[-1]), flush=True)
    return said


def main() -> None:
    """Parse, copy, train, save."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m", help="a Llama: alias or folder")
    parser.add_argument("--out", type=Path, required=True, help="folder of the checkpoint")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--of-a-token", type=int, default=2, help="experts that a token goes to")
    parser.add_argument("--tokens", type=int, default=800_000, help="to train on, of all corpora together")
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--batch-tokens", type=int, default=8192)
    parser.add_argument("--learning-rate", type=float, default=1e-4)
    parser.add_argument("--routing", type=float, default=0.1, help="weight of the routers' own loss")
    parser.add_argument("--seed", type=int, default=0)
    asked = parser.parse_args()
    torch.manual_seed(asked.seed)
    dense = load_model(asked.model, dtype="float32", device=asked.device)
    texts = [sequences_of(dense, corpus, asked.length)[0] for corpus in CORPORA]
    model = upcycled(dense.model, len(CORPORA), asked.of_a_token)
    started = time.perf_counter()
    said = trained(model, texts, asked)
    notes: dict[str, Any] = {key: str(value) if isinstance(value, Path) else value for key, value in vars(asked).items()}
    notes |= {"corpora": CORPORA, "sequences": [len(text) for text in texts], "steps": said}
    notes |= {"seconds": time.perf_counter() - started, "parameters": model.num_parameters()}
    model.to(torch.bfloat16).save_pretrained(asked.out)
    dense.tokenizer.save_pretrained(asked.out)
    (asked.out / "upcycle.json").write_text(json.dumps(notes, indent=1), encoding="utf-8")
    print(f"{model.num_parameters():,} parameters in {asked.out}, {notes['seconds']:.0f} s of training")


if __name__ == "__main__":
    main()
