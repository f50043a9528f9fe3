"""BIG-Bench Hard: reasoning, answered directly."""

import re
from collections.abc import Sequence

from fasc.errors import CorpusError
from fasc.evaluation.choices import ChoiceItem, score_choices, score_continuations
from fasc.evaluation.files import benchmark_rows
from fasc.evaluation.limits import limited
from fasc.evaluation.options import EvaluationConfig
from fasc.evaluation.outcome import Outcome
from fasc.evaluation.registry import Subject, benchmark
from fasc.evaluation.score import Score, grouped_accuracy

FILE, PROMPTS = "bbh/bbh.jsonl.gz", "bbh/cot_prompts.jsonl.gz"
_MOST_CHOICES = 20
"""Tasks with more different answers are of free text."""

_WORKED = re.compile(r"^Q: (.*?)\nA: .*?So the answer is (.*?)\.?$", re.DOTALL | re.MULTILINE)


def answers_only(prompt: str, shots: int) -> str:
    """The worked examples of a chain-of-thought prompt without the thoughts.

    Raises:
        CorpusError: fewer examples than asked for.
    """
    task = prompt.split("\n\n", 1)[0].strip()
    found = _WORKED.findall(prompt)
    if len(found) < shots:
        raise CorpusError(f"`{PROMPTS}`: {len(found)} worked examples of {shots} in a prompt", f"pass --shots {len(found)}")
    return f"{task}\n\n" + "".join(f"Q: {question}\nA: {answer}\n\n" for question, answer in found[:shots])


@benchmark("bbh", reference="arXiv:2210.09261 (BIG-Bench Hard), answers without chains of thought", files=(FILE, PROMPTS))
def bbh(subject: Subject, config: EvaluationConfig) -> Sequence[Score]:
    """BIG-Bench Hard: 27 tasks of reasoning, answered directly behind --shots examples (default 3); needs --data-dir."""
    shots = 3 if config.shots is None else config.shots
    before = {row["task"]: answers_only(row["prompt"], shots) for row in benchmark_rows("bbh", PROMPTS, config, _PROMPT)}
    rows = limited("bbh", list(benchmark_rows("bbh", FILE, config, _ROW)), config)
    without = next((row["task"] for row in rows if row["task"] not in before), None)
    if without is not None and shots:
        raise CorpusError(f"`{PROMPTS}` has no worked examples of `{without}`", "add them, or pass --shots 0")
    targets: dict[str, dict[str, None]] = {}
    for row in benchmark_rows("bbh", FILE, config, _ROW):
        targets.setdefault(row["task"], {})[row["target"]] = None
    choices, free = [], []
    for row in rows:
        context = f"{before.get(row['task'], '')}Q: {row['input']}\nA:"
        answers = list(targets[row["task"]])
        if len(answers) <= _MOST_CHOICES:
            choices.append(ChoiceItem.of(context, [f" {one}" for one in answers], answers.index(row["target"]), row["task"]))
        else:
            free.append((context, f" {row['target']}", row["task"]))
    outcomes: list[Outcome] = []
    inner = Subject(subject.model, subject.tokenizer, None, outcomes={})
    if choices:
        score_choices("bbh", inner, choices, config.model_copy(update={"limit": None}), "")
        outcomes += (inner.outcomes or {})["bbh"]
    if free:
        scored = score_continuations(
            subject, [(c, t) for c, t, _ in free], [task for *_, task in free], "bbh", config.batch_tokens
        )
        outcomes += [
            Outcome(f"{task}: {context}{target}", task, "", "", one.greedy, one.log_probability)
            for (context, target, task), one in zip(free, scored, strict=True)
        ]
    subject.keep("bbh", outcomes)
    protocol = (
        f"{shots} examples without thoughts; tasks of at most {_MOST_CHOICES} answers by log-probability among them, "
        "the others by greedy decoding"
    )
    return grouped_accuracy("bbh", [one.right for one in outcomes], [{"task": one.relation} for one in outcomes], protocol)


_ROW = {"task": str, "input": str, "target": str}
_PROMPT = {"task": str, "prompt": str}
