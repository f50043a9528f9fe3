"""What a model writes after a prompt: not a score, but what a person looks at first."""

from collections.abc import Sequence

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from fasc.model.scopes import evaluating


def continuations(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompts: Sequence[str], tokens: int
) -> list[dict[str, str]]:
    """Greedy continuations, one prompt at a time, so that no padding changes them.

    Args:
        model: dense or compressed.
        tokenizer: its own.
        prompts: plain text; no chat template.
        tokens: of each continuation, at most.

    Returns:
        ``prompt`` and ``continuation`` of each.
    """
    rows = []
    with evaluating(model), torch.no_grad():
        for prompt in prompts:
            ids = tokenizer(prompt, return_tensors="pt")["input_ids"].to(model.device)
            written = model.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=tokens,
                do_sample=False,
                pad_token_id=tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id,
            )
            text = tokenizer.decode(written[0, ids.shape[1] :], skip_special_tokens=True)
            rows.append({"prompt": prompt, "continuation": text})
    return rows
