"""Moments of one tiny model that are enough for every method, measured once for the folder."""

import pytest

from fasc.methods import METHODS
from fasc.pruning import PRUNINGS
from fasc.statistics.collect import collect_moments
from tests.conftest import tiny_model

EVERYTHING = frozenset().union(
    *(method.needs_in(method.scopes) for method in METHODS.values()),
    *(pruning.needs for pruning in PRUNINGS.values()),
)


@pytest.fixture(scope="package")
def statistics(tokens):
    return collect_moments(tiny_model(), tokens, EVERYTHING)
