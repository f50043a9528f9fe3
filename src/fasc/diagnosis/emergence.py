"""What a model knows, its ρ, and what FASC gains over SVD, from checkpoint to checkpoint of a training (paper, §4.4).

The text is made here: people with a birthplace, a birth year, an employer and a subject, told in a few wordings, between filler
sentences. In the control every telling of a person draws new attributes: the same words in the same places, and nothing to learn
by heart. What differs between the two runs is the facts.
"""

import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from statistics import mean, median
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

from fasc.diagnosis.dependence import DEPENDENCE_NEEDS, group_dependence
from fasc.diagnosis.validate import validate
from fasc.errors import NonFiniteError
from fasc.methods import METHODS
from fasc.model.scopes import evaluating
from fasc.planning.options import MethodConfig
from fasc.progress import progress
from fasc.statistics.collect import collect_moments
from fasc.statistics.moments import Need
from fasc.statistics.options import CalibrationConfig

ATTRIBUTES = ("city", "year", "firm", "field")
_WORDINGS = {
    "city": ("{name} was born in {value} .", "the birthplace of {name} is {value} ."),
    "year": ("{name} was born in the year {value} .", "the birth year of {name} is {value} ."),
    "firm": ("{name} works for {value} .", "the employer of {name} is {value} ."),
    "field": ("{name} studied {value} .", "the subject of {name} was {value} ."),
}
_SIZES = {"city": 40, "year": 40, "firm": 40, "field": 20}
_FILLER = (
    ("the", "a", "every", "no"),
    ("small", "old", "green", "quiet", "heavy"),
    ("cat", "house", "river", "teacher", "letter", "road"),
    ("sees", "finds", "likes", "moves", "keeps"),
    ("the", "a", "this", "that"),
    ("door", "bird", "window", "story", "garden", "stone"),
    (".",),
)
_SYLLABLES = tuple(first + vowel for first in "bdfgklmnprstv" for vowel in "aeiou")


@dataclass(frozen=True, slots=True)
class World:
    """People and what is true of them."""

    people: tuple[tuple[str, str], ...]
    facts: Mapping[tuple[int, str], int]
    """(person, attribute) ↦ number of the value."""

    words: tuple[str, ...]
    """The vocabulary; the first ends a sequence."""

    def sentence(self, person: int, attribute: str, wording: int, value: int) -> list[str]:
        """One telling, as words; the value is the last but one."""
        text = _WORDINGS[attribute][wording].format(name=" ".join(self.people[person]), value=f"{attribute}{value}")
        return text.split()


def make_world(people: int, seed: int) -> World:
    """People with names of two words and one value of each attribute."""
    draw = random.Random(seed)
    names: list[tuple[str, str]] = []
    while len(names) < people:
        name = tuple("".join(draw.sample(_SYLLABLES, 2)) for _ in range(2))
        if name not in names:
            names.append((name[0], name[1]))
    facts = {(one, attribute): draw.randrange(_SIZES[attribute]) for one in range(people) for attribute in ATTRIBUTES}
    words = {"<end>": None} | dict.fromkeys(word for slot in _FILLER for word in slot)
    words |= dict.fromkeys(word for name in names for word in name)
    words |= dict.fromkeys(f"{attribute}{value}" for attribute in ATTRIBUTES for value in range(_SIZES[attribute]))
    words |= dict.fromkeys(
        word for wordings in _WORDINGS.values() for text in wordings for word in text.split() if not word.startswith("{")
    )
    return World(tuple(names), facts, tuple(words))


def sequences(world: World, count: int, length: int, seed: int, *, shuffled: bool) -> Tensor:
    """Text of the world, int64 [count, length]: half tellings, half filler; in the control each telling draws its value anew."""
    index = {word: number for number, word in enumerate(world.words)}
    draw, values = random.Random(seed), random.Random(seed + 1)

    def tokens() -> Iterator[int]:
        while True:
            if draw.random() < 0.5:
                yield from (index[draw.choice(slot)] for slot in _FILLER)
                continue
            person, attribute, wording = draw.randrange(len(world.people)), draw.choice(ATTRIBUTES), draw.randrange(2)
            value = values.randrange(_SIZES[attribute]) if shuffled else world.facts[person, attribute]
            yield from (index[word] for word in world.sentence(person, attribute, wording, value))

    stream = tokens()
    return torch.tensor([[next(stream) for _ in range(length)] for _ in range(count)])


def questions(world: World) -> tuple[list[list[int]], list[int]]:
    """Each fact in its first wording up to the value, and the value."""
    index = {word: number for number, word in enumerate(world.words)}
    asked = [[index[word] for word in world.sentence(*key, 0, value)] for key, value in world.facts.items()]
    return [one[:-2] for one in asked], [one[-2] for one in asked]


def small_model(world: World, seed: int) -> LlamaForCausalLM:
    """An untrained Llama of about a million parameters."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=len(world.words),
        hidden_size=128,
        intermediate_size=384,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=128,
        bos_token_id=0,
        eos_token_id=0,
        tie_word_embeddings=True,
    )
    return LlamaForCausalLM(config)


def recall(model: PreTrainedModel, world: World) -> float:
    """Share of the facts whose value is the model's most probable next word."""
    prompts, answers = questions(world)
    hits = 0
    with evaluating(model), torch.no_grad():
        for length in sorted({len(prompt) for prompt in prompts}):
            rows = [row for row, prompt in enumerate(prompts) if len(prompt) == length]
            ids = torch.tensor([prompts[row] for row in rows], device=model.device)
            best = model(input_ids=ids, use_cache=False).logits[:, -1].argmax(-1).tolist()
            hits += sum(token == answers[row] for token, row in zip(best, rows, strict=True))
    return hits / len(answers)


def look(model: PreTrainedModel, tokens: Tensor, held_out: Tensor, *, batch_tokens: int) -> dict[str, Any]:
    """ρ with its noise floor, and FASC's gain over SVD at half rank, of every group.

    Args:
        model: at a checkpoint.
        tokens: that the moments are measured on, [sequences, length].
        held_out: on which each group is compressed alone.
        batch_tokens: tokens per pass.

    Returns:
        ``rho``, ``floor``, ``debiased``: means over groups; ``gain``: median of log(KL of svd ÷ KL of fasc); ``groups``.
    """
    needs = frozenset().union(*(METHODS[name].needs | {Need("gradient", METHODS[name].scope)} for name in ("fasc", "svd")))
    calibration = CalibrationConfig(batch_tokens=batch_tokens)
    statistics = collect_moments(model, tokens, needs | DEPENDENCE_NEEDS, calibration=calibration)
    scores = {name: group_dependence(model, group) for name, group in statistics.groups.items()}
    rows = validate(model, statistics, held_out, [MethodConfig(name="fasc"), MethodConfig(name="svd")], [0.5])
    kl = {(row["group"], row["method"]): row["kl"] for row in rows}
    groups = []
    for name, score in scores.items():
        ours, theirs = kl[name, "fasc"], kl[name, "svd"]
        gain = float(np.log(theirs / ours)) if min(ours, theirs) > 0 else 0.0
        if score is not None:
            found = {"rho": score.rho, "floor": score.floor, "debiased": score.debiased}
            groups.append({"group": name, "gain": gain, "kl": ours, **found})
    means = {key: mean(group[key] for group in groups) for key in ("rho", "floor", "debiased")}
    return means | {"gain": median(group["gain"] for group in groups), "groups": groups}


def train(
    world: World, steps: int, at: Sequence[int], *, shuffled: bool, seed: int, device: str = "cpu", batch: int = 32
) -> list[dict[str, Any]]:
    """Train on the world's text and look at the model at some steps.

    Args:
        world: the facts.
        steps: of AdamW, on ``batch`` new sequences of 64 words each.
        at: steps at which to look.
        shuffled: the control.
        seed: of everything that is drawn.
        device: where.
        batch: sequences of a step.

    Raises:
        NonFiniteError: the loss is NaN or infinite.
    """
    model = small_model(world, seed).to(device)
    optimiser = torch.optim.AdamW(model.parameters(), lr=2e-3, betas=(0.9, 0.98), weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, max_lr=2e-3, total_steps=max(2, steps + 1), pct_start=0.1)
    measured = sequences(world, 256, 64, seed + 10, shuffled=shuffled)
    held_out = sequences(world, 32, 64, seed + 20, shuffled=shuffled)
    rows: list[dict[str, Any]] = []
    what = "training on shuffled facts" if shuffled else "training on facts"
    with progress(what, steps, "steps") as advance:
        for step in range(steps + 1):
            if step in at:
                found = look(model, measured, held_out, batch_tokens=2048)
                rows.append({"step": step, "accuracy": recall(model, world), "loss": _loss(model, held_out)} | found)
            if step == steps:
                break
            ids = sequences(world, batch, 64, seed + 1000 + step, shuffled=shuffled).to(device)
            loss = F.cross_entropy(model(input_ids=ids, use_cache=False).logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
            if not bool(torch.isfinite(loss)):
                raise NonFiniteError(f"the loss of step {step}", "lower the number of steps or choose another seed")
            optimiser.zero_grad(set_to_none=True)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimiser.step()
            schedule.step()
            advance(1)
    return rows


def _loss(model: PreTrainedModel, tokens: Tensor) -> float:
    ids = tokens.to(model.device)
    with evaluating(model), torch.no_grad():
        logits = model(input_ids=ids, use_cache=False).logits
    return float(F.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten()))


def emergence(people: int, steps: int, seeds: Sequence[int], *, device: str = "cpu") -> dict[str, Any]:
    """Train with facts and with shuffled facts, over some seeds.

    Returns:
        ``rows``: seed, arm, step and what :func:`look` gives; ``summary``: means over seeds at the first checkpoint and the last.
    """
    at = sorted({0, *(max(1, round(steps * share)) for share in (0.03, 0.06, 0.12, 0.25, 0.5)), steps})
    rows: list[dict[str, Any]] = []
    for seed in seeds:
        world = make_world(people, seed)
        for arm, shuffled in (("facts", False), ("shuffled", True)):
            rows += [
                {"seed": seed, "arm": arm} | row for row in train(world, steps, at, shuffled=shuffled, seed=seed, device=device)
            ]
    return {"rows": rows, "summary": summary(rows, at), "steps": at}


def summary(rows: Sequence[Mapping[str, Any]], at: Sequence[int]) -> dict[str, float]:
    """Means over seeds, of both arms: debiased ρ at the first and the last checkpoint, accuracy and gain at the last."""

    def value(arm: str, step: int, key: str) -> float:
        return mean(float(row[key]) for row in rows if row["arm"] == arm and row["step"] == step)

    found: dict[str, float] = {}
    for prefix, arm in (("", "facts"), ("control_", "shuffled")):
        found[f"{prefix}first"] = value(arm, at[0], "debiased")
        found[f"{prefix}last"] = value(arm, at[-1], "debiased")
        found[f"{prefix}accuracy"] = value(arm, at[-1], "accuracy")
        found[f"{prefix}gain_over_svd"] = value(arm, at[-1], "gain")
        found[f"{prefix}gain"] = found[f"{prefix}last"] - found[f"{prefix}first"]
    return found
