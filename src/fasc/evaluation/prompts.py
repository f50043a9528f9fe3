"""Prompts that are run once, and what may follow them on their cache.

A benchmark asks many continuations of one prompt, and many prompts behind one header (the examples that are shown first). Each
part is run once: the header by itself, prompts side by side on its cache, continuations side by side on the prompts' caches.
Prompts of several lengths are padded on the left and the padding is masked, as in ``generate``. Two kinds of models are run
otherwise, with the same numbers: those that see a window count its slots, so that their prompts must be of one length to share a
cache; and those whose cache cannot be repeated (recurrent ones) are run on the whole sequence.
"""

import copy
import inspect
from collections import defaultdict
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import PreTrainedModel
from transformers.cache_utils import DynamicCache, DynamicLayer, DynamicSlidingWindowLayer

from fasc.errors import NonFiniteError

Tokens = Sequence[int]


class Header:
    """Tokens that many prompts begin with, run once.

    Args:
        model: in evaluation mode.
        tokens: may be empty.
        where: for errors.
    """

    def __init__(self, model: PreTrainedModel, tokens: Tokens, where: str) -> None:
        self.model, self.tokens, self.where = model, list(tokens), where
        probe = torch.tensor([self.tokens or [0, 0]], device=model.device)
        with torch.no_grad():
            made = _forward(model, probe, where, use_cache=True, keep=[0])[1]
        layers = {type(layer) for layer in made.layers} if isinstance(made, DynamicCache) else {None}
        self.shares = layers <= {DynamicLayer, DynamicSlidingWindowLayer}
        """Whether the cache holds keys and values row by row, and nothing else."""
        self.pads = layers == {DynamicLayer}
        """Whether padding may be masked: no layer counts the slots of a window."""
        self._cache: DynamicCache | None = made if self.shares and self.tokens else None

    def cache(self, rows: int) -> DynamicCache | None:
        """A cache of the header for so many rows; ``None`` where there is none."""
        if self._cache is None:
            return None
        made = copy.deepcopy(self._cache)
        made.batch_repeat_interleave(rows)
        return made

    def batches(self, lengths: Sequence[int], batch_tokens: int) -> Iterator[list[int]]:
        """Indices of prompts that are run side by side, the shortest first: as many as a pass takes, of lengths that it can."""
        groups: dict[int, list[int]] = defaultdict(list)
        for index, length in sorted(enumerate(lengths), key=lambda pair: pair[1]):
            groups[0 if self.pads else length].append(index)
        for group in groups.values():
            part: list[int] = []
            for index in group:
                if part and (len(part) + 1) * lengths[index] > batch_tokens:
                    yield part
                    part = []
                part.append(index)
            yield part


class Prompts:
    """Prompts behind one header, each run once.

    Args:
        header: what all of them begin with.
        prompts: the tokens after it, at least one each.
    """

    def __init__(self, header: Header, prompts: Sequence[Tokens]) -> None:
        self._header, self._prompts = header, [list(prompt) for prompt in prompts]
        self._lengths = torch.tensor([len(prompt) for prompt in prompts], device=header.model.device)
        alike = len(set(map(len, prompts))) == 1
        self._cached = header.shares and (alike or header.pads)
        self._cache: DynamicCache | None = None
        if self._cached:
            longest = max(map(len, prompts))
            ids = padded(self._prompts, to_the_left=True)
            filled = torch.arange(longest, device=self._lengths.device) >= longest - self._lengths[:, None]
            before = torch.ones(len(prompts), len(header.tokens), dtype=torch.bool, device=filled.device)
            self._mask = torch.cat([before, filled], dim=1)
            start = header.cache(len(prompts))
            with torch.no_grad():
                logits, self._cache = _forward(
                    header.model,
                    ids.to(header.model.device),
                    header.where,
                    cache=start,
                    use_cache=True,
                    keep=[longest - 1],
                    mask=None if alike else self._mask,
                )
            logits = logits[:, 0]
        else:
            logits = self._whole(range(len(prompts)), [[]] * len(prompts))[:, 0]
        self.next: Tensor = F.log_softmax(logits, -1, dtype=torch.float32)
        """Log-probabilities of the token after each prompt, float32 [prompts, vocabulary]."""

    def after(self, rows: Sequence[int], followed: Sequence[Tokens], *, last: bool = False) -> Tensor:
        """Log-probabilities after each token of what follows the prompts, float32 [rows, longest (1 if ``last``), vocabulary].

        Args:
            rows: of the prompts; one may be asked several times.
            followed: the tokens behind each, at least one; the numbers behind the end of a shorter one mean nothing.
            last: only what comes after the last token of each.
        """
        if not self._cached:
            logits = self._whole(rows, followed)[:, 1:]
            ends = torch.tensor([len(tokens) - 1 for tokens in followed], device=logits.device)
            logits = _at(logits, ends) if last else logits
        else:
            logits = self._on_cache(rows, followed, last=last)
        return F.log_softmax(logits, -1, dtype=torch.float32)

    def _on_cache(self, rows: Sequence[int], followed: Sequence[Tokens], *, last: bool) -> Tensor:
        model, lengths = self._header.model, [len(tokens) for tokens in followed]
        longest = max(lengths)
        chosen = torch.tensor(list(rows), device=model.device)
        cache = copy.deepcopy(self._cache)
        assert cache is not None  # noqa: S101 - `_cached` says so
        cache.batch_select_indices(chosen)
        to_the_left = last and self._header.pads  # all ends stand in one column, and the head is applied to no other
        more = torch.ones(len(rows), longest, dtype=torch.bool)
        if to_the_left:
            more = torch.arange(longest) >= longest - torch.tensor(lengths)[:, None]
        mask = torch.cat([self._mask[chosen], more.to(model.device)], dim=1)
        keep = [longest - 1] if to_the_left else sorted({length - 1 for length in lengths}) if last else list(range(longest))
        ids = padded(followed, to_the_left=to_the_left).to(model.device)
        with torch.no_grad():
            logits, _ = _forward(model, ids, self._header.where, cache=cache, keep=keep, mask=None if bool(mask.all()) else mask)
        if not last or to_the_left:
            return logits
        return _at(logits, torch.tensor([keep.index(length - 1) for length in lengths], device=logits.device))

    def _whole(self, rows: Sequence[int], followed: Sequence[Tokens]) -> Tensor:
        """Logits after the prompt and after each token behind it, from the whole sequence, [rows, 1 + longest, vocabulary]."""
        start, longest = self._header.tokens, max(map(len, followed))
        whole = [[*start, *self._prompts[row], *tokens] for row, tokens in zip(rows, followed, strict=True)]
        firsts = [len(start) + len(self._prompts[row]) - 1 for row in rows]
        wanted = [
            [min(first + step, len(one) - 1) for step in range(1 + longest)] for first, one in zip(firsts, whole, strict=True)
        ]
        keep = sorted({position for steps in wanted for position in steps})
        model = self._header.model
        with torch.no_grad():
            logits, _ = _forward(model, padded(whole).to(model.device), self._header.where, keep=keep)
        index = torch.tensor([[keep.index(position) for position in steps] for steps in wanted], device=logits.device)
        return logits[torch.arange(len(rows), device=logits.device)[:, None], index]


def _at(logits: Tensor, positions: Tensor) -> Tensor:
    """Of each row the logits at its position, [rows, 1, vocabulary]."""
    return logits[torch.arange(len(logits), device=logits.device), positions][:, None]


def padded(rows: Sequence[Tokens], *, to_the_left: bool = False) -> Tensor:
    """int64 [rows, longest], filled up on the right with each row's last token, which nothing before it sees; or on the left."""
    longest = max(map(len, rows))
    fill = [[row[-1]] * (longest - len(row)) for row in rows]
    return torch.tensor([[*some, *row] if to_the_left else [*row, *some] for row, some in zip(rows, fill, strict=True)])


def _forward(
    model: PreTrainedModel,
    ids: Tensor,
    where: str,
    *,
    keep: Sequence[int],
    cache: DynamicCache | None = None,
    use_cache: bool = False,
    mask: Tensor | None = None,
) -> tuple[Tensor, Any]:
    """Logits at the kept positions, [rows, kept, vocabulary], and the cache.

    Raises:
        NonFiniteError: the model produced NaN or infinity.
    """
    given: dict[str, Any] = {"use_cache": use_cache or cache is not None}
    takes = inspect.signature(model.forward).parameters
    if cache is not None:
        given["past_key_values"] = cache
    if mask is not None:
        given["attention_mask"] = mask.long()
        if "position_ids" in takes:
            given["position_ids"] = (mask.long().cumsum(-1) - 1).clamp(min=0)[:, -ids.shape[1] :]
    positions = torch.tensor(list(keep), device=ids.device)
    if "logits_to_keep" in takes and len(keep) < ids.shape[1]:
        given["logits_to_keep"] = positions
    made = model(input_ids=ids, **given)
    logits: Tensor = made.logits
    if logits.shape[1] != len(keep):
        logits = logits[:, positions]
    if not bool(torch.isfinite(torch.stack(torch.aminmax(logits))).all()):
        raise NonFiniteError(f"the logits of {where}", "the model is damaged or overflows: load it as --dtype float32")
    return logits, getattr(made, "past_key_values", None)
