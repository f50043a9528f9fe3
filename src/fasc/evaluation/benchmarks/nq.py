"""Natural Questions, open: short answers from memory."""

import re
import string
from collections import Counter
from collections.abc import Sequence

import numpy as np

from fasc.errors import CorpusError
from fasc.evaluation.choices import score_continuations
from fasc.evaluation.files import benchmark_rows
from fasc.evaluation.limits import limited
from fasc.evaluation.options import EvaluationConfig
from fasc.evaluation.outcome import Outcome
from fasc.evaluation.prompts import Header, Prompts
from fasc.evaluation.registry import Subject, benchmark
from fasc.evaluation.score import Score, accuracy, clustered_proportion_interval
from fasc.progress import progress

FILE = "nq_open/dev.jsonl.gz"
_LONGEST = 16
"""Tokens of an answer at most."""

_ARTICLES = re.compile(r"\b(a|an|the)\b")


def normalised(answer: str) -> str:
    """Lower case, without punctuation, articles and double spaces (SQuAD's rule, arXiv:1606.05250)."""
    bare = "".join(character for character in answer.lower() if character not in string.punctuation)
    return " ".join(_ARTICLES.sub(" ", bare).split())


def f1(answer: str, gold: str) -> float:
    """Overlap of the words of two answers, after :func:`normalised`: harmonic mean of precision and recall."""
    given, wanted = normalised(answer).split(), normalised(gold).split()
    common = sum((Counter(given) & Counter(wanted)).values())
    return 2 * common / (len(given) + len(wanted)) if common else 0.0


def greedy_lines(subject: Subject, header: str, prompts: Sequence[str], what: str, batch_tokens: int) -> list[str]:
    """What the model writes behind each prompt up to the end of the line.

    Args:
        subject: the model and its tokenizer.
        header: what comes before all prompts; run once.
        prompts: all of them.
        what: for the progress bar.
        batch_tokens: tokens per forward pass.
    """
    tokenizer = subject.tokenizer
    before = tokenizer(header)["input_ids"] if header else []
    whole = [tokenizer(header + prompt)["input_ids"] for prompt in prompts]
    shared = before if before and all(one[: len(before)] == before for one in whole) else []
    start = Header(subject.model, shared, f"`{what}`")
    answers = [""] * len(prompts)
    with progress(what, len(prompts), "answers") as advance:
        for part in start.batches([len(tokens) - len(shared) + _LONGEST for tokens in whole], batch_tokens):
            for index, text in zip(part, _continue(subject, start, [whole[i][len(shared) :] for i in part]), strict=True):
                answers[index] = text
            advance(len(part))
    return answers


def _continue(subject: Subject, header: Header, prompts: list[list[int]]) -> list[str]:
    run = Prompts(header, prompts)
    written: list[list[int]] = [[token] for token in run.next.argmax(-1).tolist()]
    texts = [subject.tokenizer.decode(tokens) for tokens in written]
    stop = subject.tokenizer.eos_token_id
    for _ in range(_LONGEST - 1):
        going = [i for i, tokens in enumerate(written) if "\n" not in texts[i].lstrip() and tokens[-1] != stop]
        if not going:
            break
        following = run.after(going, [written[i] for i in going], last=True)[:, 0].argmax(-1).tolist()
        for i, token in zip(going, following, strict=True):
            written[i].append(token)
            texts[i] = subject.tokenizer.decode(written[i], skip_special_tokens=True)
    return [text.strip().split("\n")[0] for text in texts]


@benchmark("nq_open", reference="arXiv:1906.00300 (open-domain Natural Questions)", files=(FILE,))
def nq_open(subject: Subject, config: EvaluationConfig) -> Sequence[Score]:
    """Natural Questions, open: exact match and F1 of a greedy answer behind --shots examples (default 5); needs --data-dir."""
    shots = 5 if config.shots is None else config.shots
    rows = list(benchmark_rows("nq_open", FILE, config, {"question": str, "answers": list}))
    if len(rows) <= shots:
        raise CorpusError(
            f"`{FILE}` has {len(rows)} rows, and the first {shots} are examples", "pass --shots 0, or give more rows"
        )
    header = "Answer these questions:\n\n" + "".join(f"Q: {row['question']}?\nA: {row['answers'][0]}\n\n" for row in rows[:shots])
    rows = list(limited("nq_open", rows[shots:], config))
    prompts = [f"Q: {row['question']}?\nA:" for row in rows]
    answers = greedy_lines(subject, header, prompts, "nq_open", config.batch_tokens)
    matches = [
        any(normalised(text) == normalised(gold) for gold in row["answers"]) for text, row in zip(answers, rows, strict=True)
    ]
    overlap = [max(f1(text, gold) for gold in row["answers"]) for text, row in zip(answers, rows, strict=True)]
    pairs = [(header + prompt, f" {row['answers'][0]}") for prompt, row in zip(prompts, rows, strict=True)]
    scored = score_continuations(subject, pairs, ["nq"] * len(pairs), "nq_open", config.batch_tokens)
    outcomes = [
        Outcome(row["question"], "nq_open", "", "", right, one.log_probability)
        for row, right, one in zip(rows, matches, scored, strict=True)
    ]
    subject.keep("nq_open", outcomes)
    protocol = f"the file's first {shots} questions as examples, greedy decoding of a line, SQuAD's normalisation"
    mean = sum(overlap) / len(overlap)
    return [
        accuracy("nq_open", "exact match", matches, protocol),
        Score("nq_open", "F1", mean, *clustered_proportion_interval(np.array(overlap)[:, None]), len(overlap), protocol),
    ]
