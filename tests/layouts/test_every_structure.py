"""What of a structure a file can say, every registered layout checks: what it does not refuse can be built."""

import math

import pytest
import torch

from fasc.errors import ModelError
from tests.layouts.units import FACTORED, SHAPES, empty, stored

pytestmark = pytest.mark.parametrize("name", FACTORED)

DAMAGED_RANKS = [-1, 0, 10**6, 10**12]


@pytest.mark.parametrize("shape", SHAPES)
def test_ranks_that_the_unit_cannot_have_are_refused(name, shape):
    case = stored(name, shape, 4)
    for rank in (*DAMAGED_RANKS, max(case.unit.d_in, case.unit.d_out) + 1):
        with pytest.raises(ModelError, match="rank"):
            case.layout.check(case.unit, rank, case.facts)


def ruined(facts):
    """Facts as a damaged or hostile file might hold them."""
    yield {}
    for key, value in facts.items():
        for other in (None, "x", 3, [], [0], [-1, 1], [True], ["1"], [1.5], [[1]], {}, math.nan):
            yield {**facts, key: other}
        if isinstance(value, list):
            for other in ([*value, 0], value[:-1], [10**9] * len(value), [n + 1 for n in value], [-n for n in value]):
                yield {**facts, key: other}


def outcome(case, rank, facts):
    """Whether the structure is refused; if not, its modules must map ``d_in`` to each ``d_out``."""
    try:
        case.layout.check(case.unit, rank, facts)
    except ModelError as problem:
        assert "\n" not in str(problem)
        return "refused"
    modules = empty(case.layout, case.unit, rank, facts)
    for tensor in modules.state_dict().values():
        tensor.zero_()
    x = torch.zeros(2, case.unit.d_in, dtype=torch.float64)
    assert [module(x).shape for module in modules] == [(2, layer.d_out) for layer in case.unit.layers]
    return "built"


@pytest.mark.parametrize("shape", SHAPES)
def test_a_structure_is_refused_or_can_be_built(name, shape):
    """Whatever a file says: no other error, no module of another size, no negative number of anything."""
    case = stored(name, shape, 4)
    ranks = range(1, max(case.unit.d_in, case.unit.d_out) + 1)
    outcomes = [outcome(case, rank, facts) for facts in (case.facts, *ruined(case.facts)) for rank in ranks]
    assert "built" in outcomes
    if case.facts:
        assert "refused" in outcomes
