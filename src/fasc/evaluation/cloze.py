"""Which candidate completes a prompt best, by the log-probability of the whole answer.

Exact, and cheaper than scoring every candidate: log-probabilities only fall as an answer gets longer, so a prefix that is
already below the best complete answer can be dropped (branch and bound over a trie of the candidates' tokens).
"""

import random
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from itertools import chain

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from fasc.errors import CorpusError
from fasc.evaluation.likelihood import last_log_probabilities
from fasc.evaluation.options import EvaluationConfig
from fasc.evaluation.registry import Subject
from fasc.evaluation.score import FEW, Score, proportion_interval
from fasc.processes import current
from fasc.progress import progress, say

_BRANCHES = 8
"""Prefixes expanded per item and round, most probable first."""

_TOGETHER = 1_000
"""Items searched side by side: enough that prompts of one length fill a batch, few enough that progress is seen."""

Prefix = tuple[int, ...]


@dataclass(frozen=True, slots=True)
class ClozeItem:
    """A prompt, the candidates, and which of them is right."""

    prompt: str
    candidates: tuple[str, ...]
    answer: int
    relation: str
    type: str


@dataclass(slots=True)
class _Node:
    tokens: list[int] = field(default_factory=list)
    """Next tokens that some candidate has here."""

    complete: dict[int, int] = field(default_factory=dict)
    """Next token ↦ the candidate that ends with it."""


Trie = dict[Prefix, _Node]


def build_trie(sequences: Sequence[Sequence[int]]) -> Trie:
    """Prefix ↦ node, over the candidates' token sequences."""
    trie: Trie = defaultdict(_Node)
    for candidate, tokens in enumerate(sequences):
        for position, token in enumerate(tokens):
            node = trie[tuple(tokens[:position])]
            if token not in node.tokens:
                node.tokens.append(token)
            if position == len(tokens) - 1:
                node.complete.setdefault(token, candidate)
    return dict(trie)


def candidate_tokens(tokenizer: PreTrainedTokenizerBase, candidates: Iterable[str]) -> list[list[int]]:
    """Tokens of each candidate as they follow a word: what `a word` + space + candidate adds to `a word`."""
    left = tokenizer("is", add_special_tokens=False)["input_ids"]
    result = []
    for candidate in candidates:
        both = tokenizer(f"is {candidate}", add_special_tokens=False)["input_ids"]
        fits = both[: len(left)] == left
        result.append(both[len(left) :] if fits else tokenizer(f" {candidate}", add_special_tokens=False)["input_ids"])
    return result


@dataclass(slots=True)
class _Search:
    """Branch and bound on one item."""

    prompt: list[int]
    trie: Trie
    open: dict[Prefix, float] = field(default_factory=lambda: {(): 0.0})
    best: float = float("-inf")
    choice: int = -1

    def next(self) -> list[Prefix]:
        """Prefixes to expand in this round; what cannot win any more is forgotten."""
        self.open = {prefix: score for prefix, score in self.open.items() if score > self.best}
        return sorted(self.open, key=self.open.__getitem__, reverse=True)[:_BRANCHES]

    def expand(self, prefix: Prefix, scores: Sequence[float]) -> None:
        """Take the log-probabilities of the node's next tokens, in the node's order."""
        so_far = self.open.pop(prefix)
        node = self.trie[prefix]
        for token, score in zip(node.tokens, scores, strict=True):
            total = so_far + score
            if token in node.complete and total > self.best:
                self.best, self.choice = total, node.complete[token]
            if (*prefix, token) in self.trie:
                self.open[*prefix, token] = total


def best_candidates(subject: Subject, items: Sequence[ClozeItem], what: str, batch_tokens: int) -> list[int]:
    """The index of the most probable candidate of every item.

    Args:
        subject: the model and its tokenizer.
        items: prompts and candidates.
        what: name for the progress bar and for errors.
        batch_tokens: tokens per forward pass.

    Raises:
        NonFiniteError: the model produced NaN or infinity; names the item.
    """
    tries: dict[tuple[str, ...], Trie] = {}
    searches = []
    for item in items:
        if item.candidates not in tries:
            tries[item.candidates] = build_trie(candidate_tokens(subject.tokenizer, item.candidates))
        searches.append(_Search(subject.tokenizer(item.prompt)["input_ids"], tries[item.candidates]))
    with progress(what, len(items), "items") as advance:
        for start in range(0, len(searches), _TOGETHER):
            some, finished = searches[start : start + _TOGETHER], 0
            while work := [(search, prefix) for search in some for prefix in search.next()]:
                _expand_all(subject.model, work, what, batch_tokens)
                done = sum(not search.next() for search in some)
                advance(done - finished)
                finished = done
    return [search.choice for search in searches]


def _expand_all(model: PreTrainedModel, work: list[tuple[_Search, Prefix]], what: str, batch_tokens: int) -> None:
    """One round: sequences of equal length go together, so that there is no padding."""
    by_length: dict[int, list[tuple[_Search, Prefix]]] = defaultdict(list)
    for search, prefix in work:
        by_length[len(search.prompt) + len(prefix)].append((search, prefix))
    for length, same in sorted(by_length.items()):
        rows = max(1, batch_tokens // length)
        for start in range(0, len(same), rows):
            part = same[start : start + rows]
            tokens = torch.tensor([[*search.prompt, *prefix] for search, prefix in part])
            scores = last_log_probabilities(model, tokens, f"a batch of `{what}` (prompts of {length} tokens)")
            for row, (search, prefix) in zip(scores, part, strict=True):
                search.expand(prefix, row[search.trie[prefix].tokens].tolist())


def score_items(name: str, subject: Subject, items: Sequence[ClozeItem], config: EvaluationConfig) -> list[Score]:
    """Accuracy over all items first, then by type and by relation, each with Wilson's interval.

    Raises:
        CorpusError: there are no items.
        NonFiniteError: the model produced NaN or infinity; names the items' batch.
    """
    if not items:
        raise CorpusError(f"`{name}` has no items", "check the file that it is read from")
    if config.limit is not None and config.limit < len(items):
        items = random.Random(config.seed).sample(list(items), config.limit)
    if len(items) < FEW:
        say(f"warning: `{name}` asks {len(items)} items; of fewer than {FEW} the interval says nothing of use")
    own = current().shares(len(items))
    found = best_candidates(subject, [items[one] for one in own[current().rank]], name, config.batch_tokens)
    together = zip(chain(*own), current().gathered(torch.tensor(found, dtype=torch.int64)).tolist(), strict=True)
    choices = [choice for _, choice in sorted(together)]
    right = [choice == item.answer for choice, item in zip(choices, items, strict=True)]
    protocol = "top-1 among the relation's candidate objects, log-probability of the whole answer"

    def score(metric: str, chosen: Callable[[ClozeItem], bool]) -> Score:
        hits = [hit for hit, item in zip(right, items, strict=True) if chosen(item)]
        low, high = proportion_interval(sum(hits), len(hits))
        return Score(name, metric, sum(hits) / len(hits), low, high, len(hits), protocol)

    scores = [score("accuracy", lambda _: True)]
    for kind in sorted({item.type for item in items}):
        scores.append(score(f"accuracy/type={kind}", lambda item, kind=kind: item.type == kind))
    for relation in sorted({item.relation for item in items}):
        scores.append(score(f"accuracy/relation={relation}", lambda item, r=relation: item.relation == r))
    return scores
