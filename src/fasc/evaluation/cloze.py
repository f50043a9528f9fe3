"""Which candidate completes a prompt best, by the log-probability of the whole answer.

Exact, and cheaper than scoring every candidate: log-probabilities only fall as an answer gets longer, so a prefix that is
already below the best complete answer can be dropped (branch and bound over a trie of the candidates' tokens). Each prompt is
run once; what may follow it runs on its cache.
"""

from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from fasc.errors import CorpusError
from fasc.evaluation.limits import limited
from fasc.evaluation.options import EvaluationConfig
from fasc.evaluation.outcome import Outcome
from fasc.evaluation.prompts import Header, Prompts
from fasc.evaluation.registry import Subject
from fasc.evaluation.score import Score, grouped_accuracy
from fasc.processes import current
from fasc.progress import progress

_BRANCHES = 8
"""Prefixes expanded per item and round, most probable first."""

_LONGEST = 256
"""Tokens of an answer."""

Prefix = tuple[int, ...]


@dataclass(frozen=True, slots=True)
class ClozeItem:
    """A prompt, the candidates, and which of them is right."""

    prompt: str
    candidates: tuple[str, ...]
    answer: int
    relation: str
    type: str
    others: tuple[int, ...] = ()
    """More candidates that are right."""

    subject: str = ""
    """What is asked about."""

    space: bool = True
    """Whether a space stands between prompt and answer."""

    suffix: str = ""
    """What follows the answer and is scored with it, as in languages whose verb comes last."""

    @property
    def right(self) -> frozenset[int]:
        """Every right candidate."""
        return frozenset((self.answer, *self.others))


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


def candidate_tokens(tokenizer: PreTrainedTokenizerBase, candidates: Iterable[str], *, space: bool = True) -> list[list[int]]:
    """Tokens of each candidate as they follow a word: what `a word` + space + candidate adds to `a word`.

    Args:
        tokenizer: the model's own.
        candidates: at least one character each.
        space: whether the language puts a space there; without one, what `:` + candidate adds to `:`.
    """
    word = "is" if space else ":"
    left = tokenizer(word, add_special_tokens=False)["input_ids"]
    result = []
    for candidate in candidates:
        follows = f" {candidate}" if space else candidate
        both = tokenizer(f"{word}{follows}", add_special_tokens=False)["input_ids"]
        fits = both[: len(left)] == left
        result.append(both[len(left) :] if fits else tokenizer(follows, add_special_tokens=False)["input_ids"])
    return result


@dataclass(slots=True)
class _Search:
    """Branch and bound on one item. The branches of right answers are followed to their end: their probability is asked."""

    trie: Trie
    right: frozenset[int]
    follow: frozenset[Prefix]
    """Prefixes of the right answers."""

    open: dict[Prefix, float] = field(default_factory=lambda: {(): 0.0})
    best: float = float("-inf")
    choice: int = -1
    right_score: float = float("-inf")

    def next(self) -> list[Prefix]:
        """Prefixes to expand in this round; what cannot win any more is forgotten."""
        self.open = {prefix: score for prefix, score in self.open.items() if score > self.best or prefix in self.follow}
        return sorted(self.open, key=self.open.__getitem__, reverse=True)[:_BRANCHES]

    def expand(self, prefix: Prefix, scores: Sequence[float]) -> None:
        """Take the log-probabilities of the node's next tokens, in the node's order."""
        so_far = self.open.pop(prefix)
        node = self.trie[prefix]
        for token, score in zip(node.tokens, scores, strict=True):
            total = so_far + score
            candidate = node.complete.get(token)
            if candidate is not None and total > self.best:
                self.best, self.choice = total, candidate
            if candidate in self.right:
                self.right_score = max(self.right_score, total)
            if (*prefix, token) in self.trie:
                self.open[*prefix, token] = total


def searched(subject: Subject, items: Sequence[ClozeItem], what: str, batch_tokens: int) -> list[tuple[int, float]]:
    """The index of the most probable candidate of every item, and the log-probability of the most probable right one, in nats.

    Args:
        subject: the model and its tokenizer.
        items: prompts and candidates.
        what: name for the progress bar and for errors.
        batch_tokens: tokens per forward pass.

    Raises:
        CorpusError: an answer is too long to be one.
        NonFiniteError: the model produced NaN or infinity; names the items.
    """
    known: dict[tuple[tuple[str, ...], bool, str], tuple[Trie, list[list[int]]]] = {}
    searches: list[_Search] = []
    for item in items:
        key = (item.candidates, item.space, item.suffix)
        if key not in known:
            whole = [f"{candidate}{item.suffix}" for candidate in item.candidates]
            tokens = candidate_tokens(subject.tokenizer, whole, space=item.space)
            _require_short(what, whole, tokens)
            known[key] = (build_trie(tokens), tokens)
        trie, tokens = known[key]
        follow = frozenset(tuple(tokens[one][:end]) for one in item.right for end in range(len(tokens[one])))
        right = frozenset(trie[tuple(tokens[one][:-1])].complete[tokens[one][-1]] for one in item.right)
        searches.append(_Search(trie, right, follow))
    prompts = [subject.tokenizer(item.prompt)["input_ids"] for item in items]
    header = Header(subject.model, (), f"`{what}`")
    with progress(what, len(items), "items") as advance:
        for part in header.batches([len(prompt) for prompt in prompts], batch_tokens):
            _search_together(header, [prompts[i] for i in part], [searches[i] for i in part], batch_tokens)
            advance(len(part))
    return [(search.choice, search.right_score) for search in searches]


def _require_short(what: str, candidates: Sequence[str], tokens: Sequence[Sequence[int]]) -> None:
    longest = max(range(len(tokens)), key=lambda one: len(tokens[one]))
    if len(tokens[longest]) > _LONGEST:
        raise CorpusError(
            f"`{what}`: the answer `{candidates[longest][:40]}…` has {len(tokens[longest]):,} tokens",
            f"an answer has {_LONGEST} at most, because they are read one by one: take it out of the file",
        )


def _search_together(header: Header, prompts: list[list[int]], searches: list[_Search], batch_tokens: int) -> None:
    run = Prompts(header, prompts)
    _expand([(search, ()) for search in searches], run.next)
    longest = max(map(len, prompts))
    while work := [(row, prefix) for row, search in enumerate(searches) for prefix in search.next()]:
        work.sort(key=lambda pair: len(pair[1]))
        rows = max(1, batch_tokens // (longest + len(work[-1][1])))
        for start in range(0, len(work), rows):
            part = work[start : start + rows]
            scores = run.after([row for row, _ in part], [prefix for _, prefix in part], last=True)[:, 0]
            _expand([(searches[row], prefix) for row, prefix in part], scores)


def _expand(work: Sequence[tuple[_Search, Prefix]], scores: Tensor) -> None:
    """Give each search what it asks of its row of ``scores``, [rows, vocabulary]; nothing else leaves the device."""
    nodes = [search.trie[prefix].tokens for search, prefix in work]
    rows = torch.tensor([row for row, tokens in enumerate(nodes) for _ in tokens], device=scores.device)
    columns = torch.tensor([token for tokens in nodes for token in tokens], device=scores.device)
    found = iter(scores[rows, columns].tolist())
    for (search, prefix), tokens in zip(work, nodes, strict=True):
        search.expand(prefix, [next(found) for _ in tokens])


def best_candidates(subject: Subject, items: Sequence[ClozeItem], what: str, batch_tokens: int) -> list[int]:
    """The index of the most probable candidate of every item; see :func:`searched`."""
    return [choice for choice, _ in searched(subject, items, what, batch_tokens)]


def _shared(subject: Subject, items: Sequence[ClozeItem], what: str, batch_tokens: int) -> list[tuple[int, float]]:
    """:func:`searched`, each process a share of the items."""

    def work(own: range) -> Tensor:
        return torch.tensor(searched(subject, [items[one] for one in own], what, batch_tokens), dtype=torch.float64).view(-1, 2)

    return [(int(choice), score) for choice, score in current().shared(len(items), work).tolist()]


PROTOCOL = "top-1 among the relation's candidate objects, log-probability of the whole answer"


def score_items(
    name: str,
    subject: Subject,
    items: Sequence[ClozeItem],
    config: EvaluationConfig,
    *,
    protocol: str = PROTOCOL,
    group: Callable[[ClozeItem], dict[str, str]] = lambda item: {"type": item.type, "relation": item.relation},
) -> list[Score]:
    """Accuracy over all items first, then by group, each with Wilson's interval.

    Args:
        name: of the benchmark.
        subject: the model.
        items: all of them; ``config.limit`` draws from them.
        config: limit, seed, batch.
        protocol: in words.
        group: kinds of groups that an item is in.

    Raises:
        CorpusError: there are no items.
        NonFiniteError: the model produced NaN or infinity; names the items' batch.
    """
    items = limited(name, items, config)
    found = _shared(subject, items, name, config.batch_tokens)
    outcomes = [
        Outcome(
            item=f"{item.relation}: {item.prompt} → {item.candidates[item.answer]}",
            relation=item.relation,
            subject=item.subject,
            type=item.type,
            right=choice in item.right,
            log_probability=score,
        )
        for (choice, score), item in zip(found, items, strict=True)
    ]
    subject.keep(name, outcomes)
    return grouped_accuracy(name, [one.right for one in outcomes], [group(item) for item in items], protocol)
