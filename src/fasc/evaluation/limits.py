"""Which items of a benchmark are asked."""

import random
from collections.abc import Sequence
from typing import TypeVar

from fasc.errors import CorpusError
from fasc.evaluation.options import EvaluationConfig
from fasc.evaluation.score import FEW
from fasc.progress import say

Item = TypeVar("Item")


def limited(name: str, items: Sequence[Item], config: EvaluationConfig) -> Sequence[Item]:
    """All items, or as many as ``config.limit`` says, drawn by its seed: the same for every model.

    Raises:
        CorpusError: there are none.
    """
    if not items:
        raise CorpusError(f"`{name}` has no items", "check the file that it is read from")
    if config.limit is not None and config.limit < len(items):
        items = random.Random(config.seed).sample(list(items), config.limit)
    if len(items) < FEW:
        say(f"warning: `{name}` asks {len(items)} items; of fewer than {FEW} the interval says nothing of use")
    return items
