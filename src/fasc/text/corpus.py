"""A named corpus, a file, a data set of the hub, or text sampled from the model → sequences of tokens of one length.

A named corpus has two disjoint parts: what calibrates is never what evaluates.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import islice
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from fasc.errors import CorpusError, UnknownNameError
from fasc.processes import current
from fasc.progress import say
from fasc.provenance import digest
from fasc.text.block import TokenBlock
from fasc.text.chats import rendered
from fasc.text.hub import HubSet
from fasc.text.limits import require_length, require_tokens, warn_of_length
from fasc.text.roles import Role
from fasc.text.sampling import sample_text
from fasc.text.sources import SELF, find_source, names_of
from fasc.text.stream import STAGE, TokenStream

__all__ = ["Role", "TextRequest", "TokenBlock", "load_corpus"]

_HUB_DOCUMENTS = 20_000
"""Documents of a data set of the hub that are read where all of it is asked for."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TextRequest:
    """Which text, and how it is cut."""

    corpus: str
    """``self``, a named corpus, a file or a folder of files, or an id of the hub; several are separated by commas. A relative
    path may also lie in the data folder."""

    sequences: int | None
    """How many (at most so many, for evaluation); ``None`` takes all, in order."""

    sequence_length: int
    """Tokens in each."""

    seed: int
    """Of the draw, and of the sampling of ``self``."""

    role: Role
    """Which part of a named corpus."""

    data_dir: Path | None = None
    """Folder of the named corpora; the hub is asked if neither this nor FASC_DATA is set."""

    chat_template: bool | None = None
    """Whether chats are read through the tokenizer's template; ``None``: if it has one."""


def load_corpus(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, request: TextRequest) -> TokenBlock:
    """Text of a corpus packed into sequences of one length.

    Documents are joined (with the end-of-text token where the corpus has several), cut into windows that do not overlap,
    and ``sequences`` of them are drawn without replacement. A tokenizer that begins every text with a beginning-of-text
    token has it at the head of each sequence.

    The corpus is read and tokenised piece by piece. A draw is from its first 8 million characters, so from all of most
    corpora; a draw of more sequences than those hold has all of them in mixed order, then some of the next 8 million, and so
    on. A longer draw with the same seed therefore always begins with a shorter one, and what ``--skip`` passes over never
    comes again.

    Args:
        model: samples the text of the corpus ``self``; must have embeddings and positions for what is drawn.
        tokenizer: the model's own.
        request: which text, and how it is cut.

    Raises:
        UnknownNameError: not a corpus we know, not a path that exists, not an id of the hub.
        CorpusError: empty, too short, no text, not UTF-8 (names the file and the line); or tokens or lengths that the model
            cannot read.
    """
    require_length(model, request.sequence_length)
    warn_of_length(model, request.sequence_length)
    names = names_of(request.corpus)
    if not names:
        raise UnknownNameError("corpus", request.corpus, [SELF])
    return _mixture(model, tokenizer, request, names) if len(names) > 1 else _load(model, tokenizer, request)


def _load(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, request: TextRequest) -> TokenBlock:
    """One corpus."""
    if request.corpus == SELF:
        sampled = partial(sample_text, model, tokenizer, request.sequences or 64, request.sequence_length, request.seed)
        tokens = current().from_first(sampled)
        return TokenBlock(tokens, request.corpus, digest([tokens.numpy().tobytes()]))
    source = find_source(request.corpus, request.role, request.data_dir)
    documents = source.documents()
    some = isinstance(source, HubSet) and request.sequences is None
    documents = islice(documents, _HUB_DOCUMENTS) if some else documents
    stream = TokenStream(tokenizer, rendered(documents, tokenizer, request.corpus, chat_template=request.chat_template))
    head = _prefix(tokenizer)
    body = request.sequence_length - len(head)
    windows = _drawn(stream, request, body)
    tokens = torch.cat([torch.tensor(head, dtype=torch.long).expand(len(windows), -1), windows.long()], dim=1)
    require_tokens(model, tokens, tokenizer)
    whole = stream.whole and not (some and stream.documents == _HUB_DOCUMENTS)
    if not whole:
        say(f"`{request.corpus}`: {len(tokens)} sequences from its first {stream.characters:,} characters")
    return TokenBlock(tokens, request.corpus, stream.digest, stream.characters, whole=whole)


def _drawn(stream: TokenStream, request: TextRequest, body: int) -> Tensor:
    """Windows of ``body`` tokens, int32 [sequences, body]: all in order, or those that the seed draws."""
    generator = torch.Generator().manual_seed(request.seed)
    order: list[int] = []
    wanted = request.sequences
    while not stream.whole and (wanted is None or len(order) < wanted):
        stream.read(None if wanted is None else stream.characters + STAGE)
        before, available = len(order), len(stream) // body if body > 0 else 0
        order += (before + torch.randperm(available - before, generator=generator)).tolist()
    if stream.blank:
        raise CorpusError(f"the corpus `{request.corpus}` is empty", "give a file with some text in it")
    required = wanted or 1
    if request.role == "evaluation":  # a limit says how many at most; calibration gets what it asked for or an error
        required = max(1, min(required, len(order)))
    if len(order) < required:
        raise CorpusError(
            f"corpus `{request.corpus}` is too short: {len(stream):,} tokens, {required} sequences of {request.sequence_length}"
            f" need {required * body:,}",
            "give more text, or lower " + ("--sequences or --sequence-length" if request.role == "calibration" else "--context"),
        )
    windows = stream.tokens()[: len(order) * body].view(-1, body)
    return windows if wanted is None else windows[torch.tensor(order[:wanted])]


def _mixture(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, request: TextRequest, names: Sequence[str]
) -> TokenBlock:
    """Sequences of several corpora in turn, so that a longer draw begins with a shorter one.

    A corpus that is named twice has two turns in each round and is drawn from once, so none of its sequences comes twice.
    """
    if request.sequences is None or request.sequences < len(names):
        raise CorpusError(
            f"{request.sequences or 'all'} sequences cannot be shared out among {len(names)} corpora", "raise --sequences"
        )
    turns = [names[position % len(names)] for position in range(request.sequences)]
    blocks = {
        name: _load(model, tokenizer, replace(request, corpus=name, sequences=turns.count(name))) for name in dict.fromkeys(names)
    }
    drawn = {name: iter(block.tokens) for name, block in blocks.items()}
    rows = [row for name in turns for row in islice(drawn[name], 1)]  # evaluation takes what there is of a short one
    return TokenBlock(
        torch.stack(rows),
        request.corpus,
        digest(block.text_digest.encode() for block in blocks.values()),
        sum(block.characters for block in blocks.values()),
        whole=all(block.whole for block in blocks.values()),
    )


def _prefix(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The beginning-of-text token, if this tokenizer begins every text with it."""
    first = tokenizer("a")["input_ids"][0]
    return [first] if first == tokenizer.bos_token_id else []
