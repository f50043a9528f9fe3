"""Moments of an expert are those of the tokens that it gets, and say how many these are."""

import pytest
import torch

from fasc.errors import ModelError
from fasc.model.experts import expert_layers, hearing_all
from fasc.model.groups import find_groups
from fasc.model.options import LayersConfig
from fasc.statistics.collect import collect_moments
from fasc.statistics.options import CalibrationConfig
from fasc.statistics.pooling import _renamed, pooled
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


def experts_of(statistics, block=1, kind="gate_up_proj"):
    return [one for one in statistics.groups.values() if (one.group.block, one.group.kind) == (block, kind)]


def with_floor(mixture, tokens, floor, needs=EVERYTHING):
    with expert_layers(mixture):
        return collect_moments(mixture, tokens, needs, calibration=CalibrationConfig(batch_tokens=160, expert_floor=floor))


def test_a_floor_that_every_expert_reaches_changes_nothing(mixture, tokens, capsys):
    plain = with_floor(mixture, tokens, 0)
    least = min(group.tokens for group in plain.groups.values())
    values = dict(tensors_of(with_floor(mixture, tokens, least)))
    for key, value in tensors_of(plain):
        assert torch.equal(values[key], value), key
    assert "pooled" not in capsys.readouterr().err


def test_an_expert_below_the_floor_has_the_tokens_that_it_lacks_from_its_block(mixture, tokens, capsys):
    """As if T − n tokens of the block's experts, by their tokens, had come to its n: mean and covariance of that text."""
    plain = with_floor(mixture, tokens, 0)
    floor = max(one.tokens for one in experts_of(plain)) + 40
    pooled = with_floor(mixture, tokens, floor)
    ones = experts_of(plain)
    counts = torch.tensor([one.tokens for one in ones], dtype=torch.float64)
    means = torch.stack([one.input.mean.double() for one in ones])
    seconds = torch.stack([one.input.matrix.double() + torch.outer(one.input.mean, one.input.mean).double() for one in ones])
    mean = (counts[:, None] * means).sum(0) / counts.sum()
    second = (counts[:, None, None] * seconds).sum(0) / counts.sum()
    for own, drawn in zip(ones, experts_of(pooled), strict=True):
        part = own.tokens / floor
        expected = part * own.input.mean.double() + (1 - part) * mean
        torch.testing.assert_close(drawn.input.mean.double(), expected, rtol=1e-4, atol=1e-5)
        whole = part * (own.input.matrix.double() + torch.outer(own.input.mean, own.input.mean).double()) + (1 - part) * second
        torch.testing.assert_close(drawn.input.matrix.double(), whole - torch.outer(expected, expected), rtol=1e-3, atol=1e-4)
        assert (drawn.tokens, drawn.text_tokens, drawn.sequences, drawn.group) == (
            own.tokens,
            own.text_tokens,
            own.sequences,
            own.group,
        )
    assert pooled.meta["pooled"].keys() >= {one.group.name for one in ones}
    said = capsys.readouterr().err
    assert f"fewer than {floor} tokens" in said
    assert f"{ones[0].group.name.rpartition('.')[0]} ({ones[0].tokens})" in said
    dense = [name for name, one in pooled.groups.items() if one.group.layers[0].expert is None]
    plain_values, values = dict(tensors_of(plain)), dict(tensors_of(pooled))
    assert dense
    assert all(torch.equal(values[key], plain_values[key]) for key in values if key.startswith(tuple(dense)))


def test_an_idle_expert_has_the_mean_of_its_block_and_counts_as_one_token(mixture, tokens, tmp_path):
    short = tokens[:1, :3]
    plain, pooled = (with_floor(mixture, short, floor) for floor in (0, 10))
    idle = set(pooled.groups) - set(plain.groups)
    assert idle
    assert list(pooled.groups) == pooled.meta["groups"]
    assert all(pooled.groups[name].tokens == 1 and pooled.meta["pooled"][name] == 0 for name in idle)
    pooled.save(tmp_path / "pooled.safetensors")
    again = type(pooled).load(tmp_path / "pooled.safetensors")
    assert list(again.groups) == list(pooled.groups)
    name = min(idle)
    others = [one for one in plain.groups.values() if one.group.kind == pooled.groups[name].group.kind]
    others = [
        one for one in others if one.group.block == pooled.groups[name].group.block and one.group.layers[0].expert is not None
    ]
    weights = torch.tensor([one.tokens for one in others], dtype=torch.float64)
    mean = (weights[:, None] * torch.stack([one.input.mean.double() for one in others])).sum(0) / weights.sum()
    torch.testing.assert_close(pooled.groups[name].input.mean.double(), mean, rtol=1e-4, atol=1e-6)


def test_equal_moments_stay_what_they_are_when_they_are_pooled(mixture, tokens):
    """Copies of one expert's statistics under the others' names: the block's mean is each of them."""
    statistics = with_floor(mixture, tokens, 0)
    one = experts_of(statistics)[0]
    alike = {
        group.group.name: _renamed(one, group.group) if group in experts_of(statistics) else group
        for group in statistics.groups.values()
    }
    drawn, few = pooled(alike, [group.group for group in statistics.groups.values()], one.tokens + 1)
    assert set(few) >= {group.group.name for group in experts_of(statistics)}
    for group in experts_of(statistics):
        torch.testing.assert_close(drawn[group.group.name].input.matrix, one.input.matrix, rtol=1e-5, atol=1e-6)
        for before, after in zip(one.gradients.values(), drawn[group.group.name].gradients.values(), strict=True):
            torch.testing.assert_close(after.covariance.matrix, before.covariance.matrix, rtol=1e-5, atol=1e-9)


def test_experts_that_are_given_all_tokens_say_the_same_and_lose_by_their_share(mixture, tokens):
    """Inputs are means over all tokens; gradients are 0 where a token was not routed, so their sums are those of routed ones."""
    with expert_layers(mixture):
        expected = mixture(input_ids=tokens).logits.detach()
        with hearing_all(mixture):
            torch.testing.assert_close(mixture(input_ids=tokens).logits.detach(), expected, rtol=1e-4, atol=1e-4)
        routed = collect_moments(mixture, tokens, COVARIANCES)
        every = collect_moments(mixture, tokens, COVARIANCES, calibration=CalibrationConfig(route_all=True))
        torch.testing.assert_close(mixture(input_ids=tokens).logits.detach(), expected)
    assert every.meta["nll"] == pytest.approx(routed.meta["nll"], rel=1e-5)
    blocks = {}
    for name, group in every.groups.items():
        if group.group.layers[0].expert is None:
            continue
        assert group.tokens == tokens.numel()
        if group.group.kind == "gate_up_proj":
            blocks.setdefault(group.group.block, []).append(group.input.matrix)
        own = routed.groups[name]
        for unit, gradient in group.gradients.items():
            mean, matrix = (getattr(own.gradients[unit].covariance, part).double() for part in ("mean", "matrix"))
            second = own.share * (matrix + torch.outer(mean, mean))
            torch.testing.assert_close(gradient.covariance.mean.double(), own.share * mean, rtol=1e-3, atol=1e-6)
            found = gradient.covariance.matrix.double() + own.share**2 * torch.outer(mean, mean)
            torch.testing.assert_close(found, second, rtol=1e-3, atol=1e-6 + 1e-4 * float(second.abs().max()))
    for matrices in blocks.values():
        assert all(torch.allclose(one, matrices[0], rtol=1e-4, atol=1e-5) for one in matrices)


def test_a_model_without_experts_cannot_give_them_all_tokens(model, tokens):
    with pytest.raises(ModelError, match="no experts"):
        collect_moments(model, tokens, INPUTS, calibration=CalibrationConfig(route_all=True))
