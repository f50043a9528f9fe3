"""Tiny models of which every layer lies in one layout."""

import pytest

from fasc.compression.compress import carry_out
from fasc.serving.quantizer import attach
from fasc.stages.plan import plan
from tests.conftest import tiny_model


@pytest.fixture(scope="session")
def in_layout(measured):
    """A model compressed at a quarter of the rank, every unit in the layout, and the plan as it was made."""

    def of(name, architecture="llama", **options):
        model = tiny_model(architecture)
        wanted = {"rank_fraction": 0.25, "damping": 1e-2, "layouts": (name,)} | options
        done = carry_out(model, measured(architecture), plan(model, measured(architecture), **wanted))
        attach(model)
        return model, done

    return of
