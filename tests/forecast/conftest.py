"""Moments of one tiny model that are enough for every method, and those of other text, measured once for the folder."""

import pytest
import torch

from fasc.methods import METHODS
from fasc.statistics.collect import collect_moments
from tests.conftest import VOCABULARY, tiny_model

EVERYTHING = frozenset().union(*(method.needs_in(method.scopes) for method in METHODS.values()))


@pytest.fixture(scope="package")
def statistics(measured):
    return measured()


@pytest.fixture(scope="package")
def held_out():
    tokens = torch.randint(3, VOCABULARY, (24, 20), generator=torch.Generator().manual_seed(2))
    return collect_moments(tiny_model(), tokens, EVERYTHING)
