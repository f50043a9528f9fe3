"""The same Llama with its features in another order: what it computes does not change, and its weights lie on no grid.

Weights that were dequantised from blocks of 32 can be written back into such blocks without loss, which says nothing about rounding.
A norm without mean, as Llama's, does not mind the order of the features between the blocks. So one permutation of them goes through
the columns of the embedding and of the head, the norms, the columns of q, k, v, gate and up, and the rows of o and down.

    python benchmarks/shuffled.py smollm2-135m --out shuffled
"""

import argparse
from pathlib import Path

import torch
from torch import Tensor
from transformers import LlamaForCausalLM

from fasc.evaluation.likelihood import finite_logits
from fasc.linalg.divergence import kl_divergence
from fasc.model.load import load_model

READERS = ("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj", "lm_head", "embed_tokens")
"""A column for every feature."""

WRITERS = ("o_proj", "down_proj")
"""A row for every feature, and of a bias an entry."""

NORMS = ("input_layernorm", "post_attention_layernorm", "norm")
"""An entry for every feature."""


def permute(model: LlamaForCausalLM, order: Tensor) -> None:
    """Put the features of the residual stream into another order, in place.

    Args:
        model: a Llama; its weights stay where they are in memory, so tied ones stay tied.
        order: int64 [features], a permutation: the old feature of every new one.

    Raises:
        ValueError: a parameter is none that Llamas have, or ``order`` is no permutation of the features; nothing is changed then.
    """
    if order.sort().values.tolist() != list(range(model.config.hidden_size)):
        raise ValueError(f"this is no order of {model.config.hidden_size} features")
    axes = {}
    for name, _ in model.named_parameters():
        layer, kind = name.split(".")[-2:]
        if layer in READERS and kind == "weight":
            axes[name] = 1
        elif layer in (*WRITERS, *NORMS):
            axes[name] = 0
        elif not (layer in READERS and kind == "bias"):  # a bias of a reader is one of its outputs
            raise ValueError(f"`{name}` is no parameter of a Llama, and whether its features go by this order is not known")
    with torch.no_grad():
        for name, axis in axes.items():
            parameter = model.get_parameter(name)
            parameter.copy_(parameter.index_select(axis, order.to(parameter.device)))


def main() -> None:
    """Permute, check that nothing changed, save."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="a Llama: alias, hub id or folder")
    parser.add_argument("--out", type=Path, required=True, help="folder of the checkpoint")
    parser.add_argument("--seed", type=int, default=0)
    asked = parser.parse_args()
    model, tokenizer = load_model(asked.model, dtype="float32", device="cpu")
    if not isinstance(model, LlamaForCausalLM):
        raise SystemExit(f"`{asked.model}` is a {type(model).__name__}, and only the parameters of a Llama are known here")
    generator = torch.Generator().manual_seed(asked.seed)
    order = torch.randperm(model.config.hidden_size, generator=generator)
    ids = torch.randint(model.config.vocab_size, (2, 128), generator=generator)
    before = finite_logits(model, ids, asked.model)
    permute(model, order)
    after = finite_logits(model, ids, "the shuffled model")
    apart, scale = float((after - before).abs().max()), float(before.abs().max())
    kl = float(kl_divergence(after.flatten(0, 1), before.flatten(0, 1)).mean())
    if apart > 1e-4 * scale:  # sums in another order differ by rounding and nothing else
        raise SystemExit(f"logits differ by {apart:.2g} of {scale:.2g}: this model does not bear another order")
    model.save_pretrained(asked.out)
    tokenizer.save_pretrained(asked.out)
    print(f"{asked.out}: logits differ by at most {apart:.2g} of {scale:.2g}, KL {kl:.2g}")


if __name__ == "__main__":
    main()
