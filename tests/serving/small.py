"""Compressed tiny models in memory."""

import fasc
from tests.conftest import tiny_model

_BUDGETS = {"merged": {"rank_fraction": 0.5}, "dense,channels": {"param_fraction": 0.8}}


def small_of(architecture, tokens, **options):
    """A tiny model with its plan, of every kind of layer by default."""
    model = tiny_model(architecture)
    statistics = fasc.collect(model, corpus=tokens, sequences=len(tokens), sequence_length=tokens.shape[1])
    return fasc.compress(model, statistics, **(_BUDGETS.get(options.get("layouts"), {"param_fraction": 0.7}) | options))
