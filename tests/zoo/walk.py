"""The whole way of one architecture: measured, planned, compressed, saved, loaded, compared, asked to write."""

import traceback
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM

import fasc
from fasc.errors import FascError
from fasc.model.untouched import in_words
from tests.zoo.tiny import tiny_config

WRITTEN = 4
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


ROUNDING = 1e-6
"""Weights that are mapped from a file lie at other addresses than those in memory, and a product may round otherwise there."""


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
    if difference > ROUNDING:
        return {"outcome": "failed", "stage": "load", "line": f"logits differ by {difference:.2g} after loading"}
    return {"outcome": "works"}


def keep_dense(model_type: str, folder: Path) -> dict[str, Any]:
    """Save the dense model as plain transformers does."""
    model = build(model_type)
    model.save_pretrained(folder / "small")
    with torch.no_grad():
        torch.save(
            {"logits": model(input_ids=tokens_for(model)[:2], use_cache=False).logits, "written": None}, folder / "said.pt"
        )
    return {}
