"""Which mixtures of experts fasc compresses, and what share of their parameters lies in the experts: writes the table of docs/howto-experts.md.

    python benchmarks/mixtures.py           # prints the table
    python benchmarks/mixtures.py --write   # puts it into the page
    python benchmarks/mixtures.py --check   # fails where the page differs

Every model is built on the meta device from its config in the installed transformers, with the sizes that are given here where its
defaults are not those of the model. No weight is made or fetched.
"""

import argparse
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.utils import logging as transformers_logging

from fasc.model.experts import fused_sizes, unknown_experts

PAGE = Path(__file__).parents[1] / "docs" / "howto-experts.md"
START, END = "<!-- mixtures: written by benchmarks/mixtures.py -->", "<!-- end of mixtures -->"

MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "Mixtral-8x7B": ("mixtral", {}),
    "Qwen1.5-MoE-A2.7B": ("qwen2_moe", {}),
    "Qwen3-30B-A3B": ("qwen3_moe", {"num_hidden_layers": 48, "num_key_value_heads": 4, "head_dim": 128}),
    "OLMoE-1B-7B": ("olmoe", {"intermediate_size": 1024}),
    "DeepSeek-V2-Lite": (
        "deepseek_v2",
        {
            "hidden_size": 2048,
            "intermediate_size": 10944,
            "moe_intermediate_size": 1408,
            "num_hidden_layers": 27,
            "num_attention_heads": 16,
            "num_key_value_heads": 16,
            "n_routed_experts": 64,
            "n_shared_experts": 2,
            "num_experts_per_tok": 6,
            "first_k_dense_replace": 1,
            "q_lora_rank": None,
            "vocab_size": 102400,
        },
    ),
    "DeepSeek-V3": ("deepseek_v3", {}),
    "gpt-oss-120b": ("gpt_oss", {}),
    "Granite-3.0-3B-A800M": (
        "granitemoe",
        {
            "hidden_size": 1536,
            "intermediate_size": 512,
            "num_hidden_layers": 32,
            "num_attention_heads": 24,
            "num_key_value_heads": 8,
            "num_local_experts": 40,
            "num_experts_per_tok": 8,
            "vocab_size": 49155,
            "tie_word_embeddings": True,
        },
    ),
    "Phi-3.5-MoE": ("phimoe", {}),
    "Llama-4-Scout, its text model": ("llama4_text", {}),
    "DBRX": (
        "dbrx",
        {
            "d_model": 6144,
            "n_heads": 48,
            "n_layers": 40,
            "vocab_size": 100352,
            "attn_config": {"kv_n_heads": 8, "rope_theta": 500000.0, "clip_qkv": 8.0},
            "ffn_config": {"ffn_hidden_size": 10752, "moe_num_experts": 16, "moe_top_k": 4},
        },
    ),
    "JetMoE-8B": ("jetmoe", {"num_hidden_layers": 24}),
}
"""Model type, and what its published config has beside the defaults. That the sizes are right shows in the numbers of parameters."""


def row_of(name: str, model_type: str, given: dict[str, Any]) -> str:
    """One line of the table."""
    config = CONFIG_MAPPING[model_type](**given)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    whole = sum(parameter.numel() for parameter in model.parameters())
    known = {holder: _parameters(model.get_submodule(holder)) for holder in fused_sizes(model)}
    experts = next((sizes["experts"] for sizes in fused_sizes(model).values()), 0)
    others = unknown_experts(model)
    inside = sum(known.values()) + sum(others.values())
    compressed = "no, they stay dense" if others else "yes"
    of = f"{len(known)} blocks × {experts}" if known else f"held by `{', '.join(others)}`"
    return f"| {name} | `{model_type}` | {compressed} | {of} | {whole / 1e9:,.1f} B | {inside / whole:.1%} |"


def _parameters(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def table() -> str:
    """The table in Markdown."""
    rows = [row_of(name, model_type, given) for name, (model_type, given) in MODELS.items()]
    titles = "| sizes of | architecture | experts compressed | routed experts | parameters | of them in routed experts |"
    head = [titles, "|---|---|---|---|--:|--:|"]
    note = f"\nBuilt from configs on the meta device, transformers {version('transformers')}: `python benchmarks/mixtures.py --write`."
    return "\n".join([*head, *rows, note])


def main() -> None:
    """Print, write or check the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true")
    parser.add_argument("--check", action="store_true")
    asked = parser.parse_args()
    transformers_logging.set_verbosity_error()
    made = table()
    if not (asked.write or asked.check):
        print(made)
        return
    text = PAGE.read_text(encoding="utf-8")
    before, rest = text.split(START)
    new = f"{before}{START}\n{made}\n{END}{rest.split(END)[1]}"
    if asked.check:
        sys.exit(0 if new == text else f"{PAGE} is not what benchmarks/mixtures.py makes: run it with --write")
    PAGE.write_text(new, encoding="utf-8")


if __name__ == "__main__":
    main()
