"""Embedding and head in the budget: bits for each of their matrices."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from transformers import PreTrainedModel

from fasc.edits.quantise import DAMPING
from fasc.edits.vocabulary import VocabularyBits
from fasc.errors import ModelError, StatisticsError
from fasc.forecast.vocabulary import ends_of, vocabulary_loss, vocabulary_noise
from fasc.layouts.quantised import quantised_bytes
from fasc.model.vocabulary import find_vocabulary
from fasc.planning.candidates import UNROUNDED, Alternative, Curves, Rules
from fasc.statistics.moments import Statistics


class VocabularyChoices(NamedTuple):
    """What may become of embedding and head."""

    choices: Sequence[Sequence[Alternative]] = ()
    """One for each matrix."""

    parameters: int = 0
    """Of the matrices, which the budget must not count as untouched."""


def vocabulary_choices(model: PreTrainedModel, statistics: Statistics, rules: Rules, known: Curves | None) -> VocabularyChoices:
    """Every number of bits of the menu for each matrix, each at its bytes.

    Args:
        model: dense.
        statistics: with the moments at both ends.
        rules: the menu and the precision.
        known: noise of earlier calls by matrix, see :func:`vocabulary_noises`.

    Raises:
        ModelError: embedding or head are no plain matrices.
        StatisticsError: the statistics lack these moments.
    """
    found = find_vocabulary(model)
    if found is None:
        raise ModelError(f"embedding and head of {type(model).__name__} are no plain matrices", "leave --bits-vocabulary out")
    if statistics.vocabulary is None:
        raise StatisticsError("the statistics hold no moments of embedding and head", "collect again with --bits-vocabulary")
    noises = vocabulary_noises(model, statistics, rules.bits_group) if known is None else known
    choices = []
    for end in ends_of(found):
        options = []
        for bits in rules.bits:
            if bits == UNROUNDED:
                options.append(Alternative((), cost=float(found.tokens * found.width * rules.bytes_per_parameter)))
                continue
            loss = vocabulary_loss(float(noises[end][0]), bits)
            like = 0 if end == "head" else rules.bytes_per_parameter
            cost = quantised_bytes(found.width, found.tokens, bits, rules.bits_group) + like
            edit = VocabularyBits.of(found, end, bits, rules.bits_group, loss)
            options.append(Alternative((), (edit,), float(cost)))
        choices.append(options)
    return VocabularyChoices(choices, found.parameters)


def vocabulary_noises(model: PreTrainedModel, statistics: Statistics, group: int) -> Curves:
    """By matrix: the forecast of rounding it to one step, one number; see :func:`~fasc.forecast.vocabulary.vocabulary_noise`."""
    found, moments = find_vocabulary(model), statistics.vocabulary
    if found is None or moments is None:
        return {}
    weights = {
        end: model.get_submodule(found.head if end == "head" else found.embedding).weight.detach() for end in ends_of(found)
    }
    return {end: np.array([vocabulary_noise(weight, moments, end, group, DAMPING)]) for end, weight in weights.items()}
