"""Which of a few continuations a model holds for most probable, every one of them scored in full.

The protocol is that of lm-evaluation-harness: the text of context and continuation is split into tokens together, and the
continuation is what the context's own tokens leave over. What the contexts of one group begin with (the examples that are shown
first) is run once, and so is each context.
"""

from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from fasc.errors import CorpusError
from fasc.evaluation.limits import limited
from fasc.evaluation.options import EvaluationConfig
from fasc.evaluation.outcome import Outcome
from fasc.evaluation.prompts import Header, Prompts, padded
from fasc.evaluation.registry import Subject
from fasc.evaluation.score import Score, grouped_accuracy
from fasc.processes import current
from fasc.progress import progress, say

_LEAST_HEADER = 16
"""Tokens that contexts must share for a run of their own to be worth it."""


@dataclass(frozen=True, slots=True)
class ChoiceItem:
    """Pairs of a context and a continuation, of which one is right."""

    pairs: tuple[tuple[str, str], ...]
    """Contexts (all alike in most tasks; empty for whole sentences) and what is scored behind them."""

    answer: int
    group: str
    """Task, subject or paradigm; the contexts of one group may begin alike."""

    type: str = ""
    """Group of groups."""

    @classmethod
    def of(cls, context: str, choices: Sequence[str], answer: int, group: str, type: str = "") -> "ChoiceItem":
        """One context for all choices."""
        return cls(tuple((context, choice) for choice in choices), answer, group, type)


class Scored(NamedTuple):
    """A continuation, scored."""

    log_probability: float
    """Of all its tokens, nats."""

    greedy: bool
    """Whether each of its tokens is the model's most probable one."""


class _Request(NamedTuple):
    context: tuple[int, ...]
    continuation: tuple[int, ...]
    group: str


def split_tokens(tokenizer: PreTrainedTokenizerBase, context: str, continuation: str) -> tuple[list[int], list[int]]:
    """Tokens of a context and of what follows it, split as one text.

    An empty context is the tokenizer's first token (or, without one, its last): what harnesses call an unconditional likelihood.
    """
    if not context:
        first = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
        if first is None:
            raise CorpusError("the tokenizer has no first and no last token to begin a sentence with", "set its bos_token")
        whole = tokenizer(continuation, add_special_tokens=False)["input_ids"]
        return [first], whole[1:] if whole and whole[0] == first else whole
    spaces = len(context) - len(context.rstrip())
    if spaces:  # a space belongs to the word behind it
        context, continuation = context[:-spaces], context[-spaces:] + continuation
    before = tokenizer(context)["input_ids"]
    return before, tokenizer(context + continuation)["input_ids"][len(before) :]


def score_continuations(
    subject: Subject, pairs: Sequence[tuple[str, str]], groups: Sequence[str], what: str, batch_tokens: int
) -> list[Scored]:
    """Score each continuation behind its context.

    Args:
        subject: the model and its tokenizer.
        pairs: contexts and continuations.
        groups: of each pair; the contexts of a group may share what they begin with.
        what: name for the progress bar and for errors.
        batch_tokens: tokens per forward pass.

    Raises:
        CorpusError: a continuation has no tokens.
        NonFiniteError: the model produced NaN or infinity.
    """
    requests, cut = [], 0
    positions = getattr(subject.model.config.get_text_config(), "max_position_embeddings", None)
    for (context, continuation), group in zip(pairs, groups, strict=True):
        before, after = split_tokens(subject.tokenizer, context, continuation)
        if not before or not after:
            raise CorpusError(
                f"`{what}`: {continuation!r} has no tokens behind its context", "check the file that it is read from"
            )
        if positions is not None and len(before) + len(after) - 1 > positions:
            before, cut = before[-max(1, positions - len(after) + 1) :], cut + 1
        requests.append(_Request(tuple(before), tuple(after), group))
    if cut:
        say(f"warning: {cut:,} of {len(requests):,} contexts of `{what}` are cut at the left to {positions:,} positions")

    def work(own: range) -> Tensor:
        scored = _score(subject, [requests[one] for one in own], what, batch_tokens)
        return torch.tensor([(one.log_probability, one.greedy) for one in scored], dtype=torch.float64).view(-1, 2)

    return [Scored(score, bool(greedy)) for score, greedy in current().shared(len(requests), work).tolist()]


def _score(subject: Subject, requests: Sequence[_Request], what: str, batch_tokens: int) -> list[Scored]:
    found: dict[_Request, Scored] = {}
    with progress(what, len(requests), "answers") as advance:
        for header, part in _batches(subject, requests, what, batch_tokens):
            found.update(_score_together(header, part, batch_tokens))
            advance(sum(len(followed) for followed in part.values()))
    return [found[request] for request in requests]


_Part = dict[tuple[int, ...], dict[_Request, None]]
"""Context ↦ what follows it."""


def _batches(subject: Subject, requests: Sequence[_Request], what: str, batch_tokens: int) -> Iterator[tuple[Header, _Part]]:
    """Contexts that are run side by side, behind what they share."""
    groups: dict[str, _Part] = defaultdict(dict)
    for request in requests:
        groups[request.group].setdefault(request.context, {})[request] = None
    headers: dict[tuple[int, ...], _Part] = {}
    for contexts in groups.values():
        merged = headers.setdefault(_shared(list(contexts)), {})
        for context, followed in contexts.items():
            merged.setdefault(context, {}).update(followed)
    for tokens, contexts in headers.items():
        header, order = Header(subject.model, tokens, f"`{what}`"), list(contexts)
        for part in header.batches([len(context) - len(tokens) for context in order], batch_tokens):
            yield header, {order[index]: contexts[order[index]] for index in part}


def _shared(contexts: Sequence[tuple[int, ...]]) -> tuple[int, ...]:
    """What all contexts begin with, if that is worth a run; at least one token is left of each."""
    first, last = min(contexts), max(contexts)
    most = min(map(len, contexts)) - 1
    alike = next((i for i, (a, b) in enumerate(zip(first, last, strict=False)) if a != b), len(first))
    length = min(alike, most)
    return first[:length] if len(contexts) > 1 and length >= _LEAST_HEADER else ()


def _score_together(header: Header, part: _Part, batch_tokens: int) -> dict[_Request, Scored]:
    run = Prompts(header, [context[len(header.tokens) :] for context in part])
    found: dict[_Request, Scored] = {}
    longer: list[tuple[int, _Request]] = []
    best = run.next.argmax(-1).tolist()
    rows = [row for row, followed in enumerate(part.values()) for _ in followed]
    firsts = [request.continuation[0] for followed in part.values() for request in followed]
    logs_first = iter(run.next[torch.tensor(rows), torch.tensor(firsts)].tolist())
    for row, followed in enumerate(part.values()):
        for request in followed:
            found[request] = Scored(next(logs_first), best[row] == request.continuation[0])
            if len(request.continuation) > 1:
                longer.append((row, request))
    for some in _of_like_length(longer, batch_tokens, len(next(iter(part)))):
        scores = run.after([row for row, _ in some], [request.continuation[:-1] for _, request in some])
        wanted = padded([request.continuation[1:] for _, request in some]).to(scores.device)
        logs = scores.gather(-1, wanted[:, :, None])[:, :, 0].tolist()
        most = scores.argmax(-1).eq(wanted).tolist()
        for (_, request), log, best_ones in zip(some, logs, most, strict=True):
            length, so_far = len(request.continuation) - 1, found[request]
            found[request] = Scored(so_far.log_probability + sum(log[:length]), so_far.greedy and all(best_ones[:length]))
    return found


def _of_like_length(longer: list[tuple[int, _Request]], batch_tokens: int, length: int) -> Iterator[list[tuple[int, _Request]]]:
    """What is scored in one pass: the shortest first, so that there is little padding."""
    part: list[tuple[int, _Request]] = []
    for one in sorted(longer, key=lambda pair: len(pair[1].continuation)):
        if part and (len(part) + 1) * (length + len(one[1].continuation)) > batch_tokens:
            yield part
            part = []
        part.append(one)
    if part:
        yield part


def score_choices(
    name: str,
    subject: Subject,
    items: Sequence[ChoiceItem],
    config: EvaluationConfig,
    protocol: str,
    *,
    per_character: bool = False,
    kinds: tuple[str, ...] = ("task",),
) -> list[Score]:
    """Accuracy over all items, then by group.

    Args:
        name: of the benchmark.
        subject: the model.
        items: all of them; ``config.limit`` draws from them.
        config: limit, seed, batch.
        protocol: in words.
        per_character: whether to give, as a second score, the accuracy by log-probability per character of the continuation
            (``acc_norm`` of lm-evaluation-harness).
        kinds: what groups are given: ``task`` is the item's group, ``type`` its type.

    Raises:
        CorpusError: there are no items, or an answer that is no choice.
        NonFiniteError: the model produced NaN or infinity.
    """
    items = limited(name, items, config)
    pairs = [pair for item in items for pair in item.pairs]
    groups = [item.group for item in items for _ in item.pairs]
    flat = iter(score_continuations(subject, pairs, groups, name, config.batch_tokens))
    scored = [[next(flat).log_probability for _ in item.pairs] for item in items]
    outcomes = [_outcome(item, scores) for item, scores in zip(items, scored, strict=True)]
    subject.keep(name, outcomes)
    named = [{"task": item.group, "type": item.type} for item in items]
    chosen = [{kind: one[kind] for kind in kinds} for one in named]
    scores = grouped_accuracy(name, [one.right for one in outcomes], chosen, protocol)
    if per_character:
        right = [_best(item, values, per_character=True) == item.answer for item, values in zip(items, scored, strict=True)]
        normal = grouped_accuracy(name, right, [{}] * len(right), f"{protocol}, per character of the answer")[0]
        scores.insert(1, Score(name, "accuracy per character", normal.value, normal.low, normal.high, normal.n, normal.protocol))
    return scores


def _best(item: ChoiceItem, scores: Sequence[float], *, per_character: bool) -> int:
    sizes = [max(1, len(continuation.removeprefix(" "))) if per_character else 1 for _, continuation in item.pairs]
    return max(range(len(scores)), key=lambda i: scores[i] / sizes[i])


def _outcome(item: ChoiceItem, scores: Sequence[float]) -> Outcome:
    others = [score for index, score in enumerate(scores) if index != item.answer]
    context, continuation = item.pairs[item.answer]
    margin = scores[item.answer] - max(others) if others else None
    return Outcome(
        item=f"{item.group}: {context}{continuation}",
        relation=item.group,
        subject="",
        type=item.type,
        right=_best(item, scores, per_character=False) == item.answer,
        log_probability=scores[item.answer] if context or margin is None else margin,  # a sentence's own is no knowledge
        margin=margin,
    )
