"""A group's units, each decomposed by one method: what the table describes and what validation puts in place."""

from typing import NamedTuple

from transformers import PreTrainedModel

from fasc.edits.factor import Problem
from fasc.linalg.decomposition import Decomposition
from fasc.methods import Solver
from fasc.model.groups import InputGroup, Unit, stacked_weight
from fasc.statistics.moments import Statistics


class Solution(NamedTuple):
    """One unit, decomposed by one method."""

    unit: Unit
    solver: Solver
    problem: Problem
    full: Decomposition


def solutions_of(model: PreTrainedModel, statistics: Statistics, group: InputGroup, chosen: Solver) -> list[Solution]:
    """The group as one unit, or each of its layers, whichever is the method's own way."""
    solutions = []
    for unit in group.units(chosen.method.scope):
        problem = Problem(stacked_weight(model, unit), statistics.unit(unit))
        solutions.append(Solution(unit, chosen, problem, chosen.decompose(problem.weight, problem.statistics)))
    return solutions
