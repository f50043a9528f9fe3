"""What a model can read: tokens that it has vectors for, sequences that it has positions for."""

import re

from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from fasc.errors import CorpusError
from fasc.progress import say

_POSITIONS = re.compile(r"(^|\.)(wpe|positions?_embed\w*|embed_positions?|pos_embed\w*|pos_encoding|position_encoding\w*)$")
"""Names of tables with a vector for each position."""


def require_tokens(model: PreTrainedModel, tokens: Tensor, tokenizer: PreTrainedTokenizerBase | None = None) -> None:
    """Refuse tokens that the model has no embedding for.

    Args:
        model: any causal language model.
        tokens: ids, of any shape.
        tokenizer: names the token.

    Raises:
        CorpusError: an id is out of range; names it.
    """
    if not tokens.numel():
        return
    embeddings = model.get_input_embeddings()
    known = int(getattr(embeddings, "num_embeddings", None) or embeddings.weight.shape[0])
    lowest, highest = (int(bound) for bound in tokens.aminmax())
    outside = lowest if lowest < 0 else highest
    if 0 <= outside < known:
        return
    name = f" `{tokenizer.convert_ids_to_tokens(outside)}`" if tokenizer is not None and outside >= 0 else ""
    raise CorpusError(
        f"token{name} has id {outside}, and {type(model).__name__} has embeddings for ids 0 to {known - 1}",
        "use the tokenizer that the model was trained with, or resize the model's embeddings",
    )


def require_length(model: PreTrainedModel, length: int) -> None:
    """Refuse sequences for which the model has no positions.

    Raises:
        CorpusError: the model has a table of positions, and the sequence is longer.
    """
    name, limit = _position_table(model)
    if limit is not None and length > limit:
        raise CorpusError(
            f"sequences of {length} tokens are longer than the {limit} positions of {type(model).__name__} (`{name}`)",
            f"use sequences of at most {limit} tokens",
        )


def warn_of_length(model: PreTrainedModel, length: int) -> None:
    """Say that the model was not made for such long sequences, though it can read them (rotary positions)."""
    stated = _stated_positions(model)
    if stated is not None and length > stated and _position_table(model)[1] is None:
        say(
            f"sequences of {length} tokens are longer than {type(model).__name__} was made for ({stated}): its scores may be poor"
        )


def _stated_positions(model: PreTrainedModel) -> int | None:
    """Positions that the config speaks of."""
    config = model.config.get_text_config()
    stated = [getattr(config, name, None) for name in ("max_position_embeddings", "n_positions", "max_seq_len")]
    return min((value for value in stated if isinstance(value, int) and value > 0), default=None)


def _position_table(model: PreTrainedModel) -> tuple[str, int | None]:
    """Name and length of the table of positions, learned or fixed, if the model has one."""
    tables = [
        (name, module.num_embeddings)
        for name, module in model.named_modules()
        if isinstance(module, nn.Embedding) and module is not model.get_input_embeddings()
    ]
    tables += [(name, buffer.shape[0]) for name, buffer in model.named_buffers() if buffer.dim() == 2]
    name, rows = next(((name, rows) for name, rows in tables if _POSITIONS.search(name)), ("", None))
    stated = _stated_positions(model)
    # A table may be a little longer than what it is meant for (OPT's begins at 2).
    return name, rows if rows is None or stated is None else min(rows, stated)
