"""What a run needs in memory, from a model's config alone: no weight is loaded, and none is made."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from transformers import PreTrainedModel

from fasc.edits.narrow import Narrow
from fasc.errors import UsageError
from fasc.model.coupling import most_channels
from fasc.model.groups import InputGroup
from fasc.planning.memory import bytes_to_choose
from fasc.planning.plan import Plan
from fasc.pruning import PRUNINGS
from fasc.statistics.memory import memory_forecast
from fasc.statistics.moments import Need
from fasc.statistics.options import CalibrationConfig
from fasc.statistics.passes import PROGRAM, plan_passes

_LOGITS = 3
"""Copies of a batch's logits in float32 that comparing two models holds: both models', and one that is worked on."""


class Requirement(NamedTuple):
    """What one stage holds at the same time."""

    stage: str
    parts: Mapping[str, int]
    """Bytes."""

    @property
    def total(self) -> int:
        """Bytes."""
        return sum(self.parts.values())


class Requirements(NamedTuple):
    """Of a whole run."""

    stages: tuple[Requirement, ...]
    limit: int
    """Bytes of memory that there are."""

    passes: int | None
    """Over the text, to measure within the limit; ``None`` where that does not hold one block."""

    why: str
    """Why there are none."""

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        stages = {one.stage: {"total": one.total, "parts": dict(one.parts)} for one in self.stages}
        return {"stages": stages, "limit": self.limit, "passes": self.passes, "why": self.why}


def requirements(
    model: PreTrainedModel,
    groups: Sequence[InputGroup],
    needs: frozenset[Need],
    plan: Plan,
    calibration: CalibrationConfig,
    limit: int,
    *,
    compared_tokens: int,
) -> Requirements:
    """What each stage holds in memory at the same time.

    Args:
        model: of the config, on the meta device.
        groups: its input groups.
        needs: the moments.
        plan: what is left of the model, with its forecast of memory.
        calibration: size of the text and of a batch.
        limit: bytes that there are.
        compared_tokens: of a batch in which two models are compared.
    """
    memory = dict(plan.forecast_memory or {}) | memory_forecast(model, groups, needs, calibration.batch_tokens)
    layouts = plan.options.layouts
    if plan.options.name not in PRUNINGS and (layouts is None or Narrow.word in layouts):  # a plan by forecasts may narrow MLPs
        memory["decomposition"] = max(memory.get("decomposition", 0), bytes_to_choose(most_channels(groups)))
    small = int(plan.totals["bytes"] or 0)
    logits = 4 * compared_tokens * model.get_input_embeddings().num_embeddings
    try:
        passes, why = len(plan_passes(model, groups, needs, calibration, limit)), ""
    except UsageError as problem:
        passes, why = None, problem.message
    stages = {
        "collect, in one pass": ("model", "moments", "totals", "batch"),
        "plan by forecasts, with moments on disk": ("model", "decomposition"),
        "compress, with moments on disk": ("model", "decomposition", "channels", "compressed"),
    }
    rows = [Requirement(stage, _parts(memory, names)) for stage, names in stages.items()]
    both = {"model": memory["model"], "compressed": small, "batch": _LOGITS * logits}
    rows.append(Requirement("evaluate beside the dense model", {"program": PROGRAM, **both}))
    rows.append(Requirement("load the result", {"program": PROGRAM, "compressed": small}))
    return Requirements(tuple(rows), limit, passes, why)


def _parts(memory: Mapping[str, int], names: Sequence[str]) -> dict[str, int]:
    return {"program": PROGRAM, **{name: memory[name] for name in names if memory.get(name)}}
