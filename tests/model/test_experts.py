"""Experts as layers of their own: the same model, and a group for every expert."""

import pytest
import torch

from fasc.methods import METHODS
from fasc.model.experts import expert_layers
from fasc.model.groups import find_groups
from fasc.model.load import model_fingerprint
from fasc.model.options import LayersConfig
from fasc.stages.compress import compress
from fasc.stages.plan import plan
from fasc.statistics.collect import collect_moments


def test_a_model_with_expert_layers_computes_the_same_and_is_left_as_it_was(mixture, tokens):
    modules, weights = [name for name, _ in mixture.named_modules()], model_fingerprint(mixture)
    with torch.no_grad():
        expected = mixture(input_ids=tokens).logits
        with expert_layers(mixture) as holders:
            assert len(holders) == 2
            assert model_fingerprint(mixture) == weights
            torch.testing.assert_close(mixture(input_ids=tokens).logits, expected, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(mixture(input_ids=tokens).logits, expected)
    assert [name for name, _ in mixture.named_modules()] == modules


def test_a_mixture_is_left_as_it_was_when_the_body_raises(mixture):
    modules = [name for name, _ in mixture.named_modules()]
    with pytest.raises(KeyboardInterrupt), expert_layers(mixture):
        raise KeyboardInterrupt
    assert [name for name, _ in mixture.named_modules()] == modules


def test_a_dense_model_has_none(model):
    with expert_layers(model) as holders:
        assert holders == []


def test_every_expert_is_a_group_even_if_a_short_text_misses_it(mixture):
    with expert_layers(mixture):
        groups = find_groups(mixture, LayersConfig())
    experts = {(group.block, group.layers[0].expert, group.kind) for group in groups if group.layers[0].expert is not None}
    assert experts == {(block, expert, kind) for block in (0, 1) for expert in range(4) for kind in ("gate_up_proj", "down_proj")}


def test_experts_are_not_compressed(mixture, tokens):
    with expert_layers(mixture):
        statistics = collect_moments(mixture, tokens, METHODS["fasc"].needs)
    made = plan(mixture, statistics, rank_fraction=0.5, damping=1e-2)
    assert made.edits
    assert not any("experts" in name for edit in made.edits for name in edit.touches)
    compress(mixture, statistics, made)
    with torch.no_grad():
        assert torch.isfinite(mixture(input_ids=tokens).logits).all()
