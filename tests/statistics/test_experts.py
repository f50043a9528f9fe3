"""Moments of an expert are those of the tokens that it gets, and say how many these are."""

import pytest
import torch

from fasc.model.experts import expert_layers
from fasc.model.groups import find_groups
from fasc.model.options import LayersConfig
from fasc.statistics.collect import collect_moments
from fasc.statistics.options import CalibrationConfig
from tests.statistics.needs import COVARIANCES, EVERYTHING, INPUTS
from tests.statistics.tensors import tensors_of


def test_an_experts_moments_are_those_of_the_tokens_that_are_routed_to_it(mixture, tokens):
    name = "model.layers.1.mlp.experts.2.gate_up_proj"
    seen = []
    with expert_layers(mixture):
        group = collect_moments(mixture, tokens, COVARIANCES, calibration=CalibrationConfig(batch_tokens=160)).groups[name]
        handle = mixture.get_submodule(name).register_forward_pre_hook(lambda _m, args: seen.append(args[0].detach().double()))
        with torch.no_grad():
            mixture(input_ids=tokens)
        handle.remove()
    inputs = torch.cat(seen)
    assert group.tokens == len(inputs)
    torch.testing.assert_close(group.input.mean.double(), inputs.mean(0), rtol=1e-3, atol=1e-4)


def test_shares_of_experts_sum_to_the_experts_of_a_token_and_other_layers_have_one(mixture, tokens):
    """Top-2 of 4: a mean over an expert's tokens weighs as much as its share of them in the text."""
    with expert_layers(mixture):
        statistics = collect_moments(mixture, tokens, INPUTS)
    for name, group in statistics.groups.items():
        assert group.text_tokens == tokens.numel()
        assert group.unit(name).share == group.share == group.tokens / tokens.numel()
    experts = [one for one in statistics.groups.values() if one.group.layers[0].expert is not None]
    for block in (0, 1):
        for kind in ("gate_up_proj", "down_proj"):
            shares = [one.share for one in experts if (one.group.block, one.group.kind) == (block, kind)]
            assert sum(shares) == pytest.approx(2)
            assert all(share < 1 for share in shares)
    assert {one.share for one in statistics.groups.values() if one.group.layers[0].expert is None} == {1.0}


def test_padding_is_excluded_from_every_experts_moments(mixture, tokens):
    padded = torch.cat([tokens, torch.full((len(tokens), 5), 2)], dim=1)
    mask = torch.cat([torch.ones_like(tokens), torch.zeros(len(tokens), 5, dtype=torch.long)], dim=1)
    with expert_layers(mixture):
        plain = collect_moments(mixture, tokens, EVERYTHING)
        masked = collect_moments(mixture, padded, EVERYTHING, mask=mask)
    values = dict(tensors_of(masked))
    for key, value in tensors_of(plain):
        torch.testing.assert_close(values[key], value, rtol=1e-3, atol=2e-5 * float(value.abs().max()) + 1e-9, msg=key)
    assert [one.tokens for one in masked.groups.values()] == [one.tokens for one in plain.groups.values()]


def test_an_idle_expert_has_no_moments_and_that_is_said(mixture, tokens, capsys):
    with expert_layers(mixture):
        statistics = collect_moments(mixture, tokens[:1, :2], INPUTS)
        groups = find_groups(mixture, LayersConfig())
    assert len(statistics.groups) < len(groups)
    assert statistics.meta["groups"] == [group.name for group in groups]
    assert "got no token" in capsys.readouterr().err


def test_statistics_hold_the_layers_that_the_model_has_now(mixture, tokens):
    with expert_layers(mixture):
        statistics = collect_moments(mixture, tokens, INPUTS)
        assert statistics.present_in(mixture).groups.keys() == statistics.groups.keys()
    outside = statistics.present_in(mixture).groups
    assert outside.keys() < statistics.groups.keys()
    assert not any("experts" in name for name in outside)
