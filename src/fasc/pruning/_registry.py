"""The registry of pruning methods, and the lookup of any method by name."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from transformers import PreTrainedModel

from fasc.planning.plan import RankPlan, UnitPlan
from fasc.statistics.moments import Moment, Need, Statistics
from fasc.errors import UnknownNameError
from fasc.methods import METHODS, Method
from fasc.model.groups import InputGroup

MakePlan = Callable[[PreTrainedModel, Sequence[InputGroup], float, int], tuple[UnitPlan, ...]]
"""(model, its groups, parameters that may be kept, multiple of sizes) → what becomes of every layer."""

Apply = Callable[[PreTrainedModel, Statistics, RankPlan], None]
"""Prune the model in place."""


@dataclass(frozen=True, slots=True)
class Pruning:
    """A registered pruning method."""

    name: str
    moments: frozenset[Moment]
    """What it must be given of every group, beside the covariance of the inputs."""

    structured: bool
    """Whether whole heads and channels go, so that the checkpoint is smaller; otherwise zeros are written and stay stored."""

    surrogate: str
    """What it keeps, as a formula."""

    reference: str
    summary: str
    make_plan: MakePlan
    apply: Apply

    @property
    def needs(self) -> frozenset[Need]:
        """The moments it must be given."""
        return frozenset({Need("input", "group")} | {Need(moment, "group") for moment in self.moments})


PRUNINGS: dict[str, Pruning] = {}
"""Every registered pruning method by name."""


def register(pruning: Pruning) -> None:
    """Make a pruning method known."""
    PRUNINGS[pruning.name] = pruning


def find_method(name: str) -> Method | Pruning:
    """The method of that name, of either kind.

    Raises:
        UnknownNameError: there is none; suggests the nearest.
    """
    found = METHODS.get(name) or PRUNINGS.get(name)
    if found is None:
        raise UnknownNameError("method", name, [*METHODS, *PRUNINGS])
    return found
