"""Moments beside covariances are those of their definitions."""

import pytest
import torch

from fasc.statistics.collect import collect_moments
from fasc.statistics.extras import SKETCH
from fasc.statistics.options import CalibrationConfig
from tests.reference import moments_by_hand
from tests.statistics.needs import EXTRAS, INPUTS


def test_extra_moments_are_those_of_their_definitions(model, tokens):
    """E|x|, E[(g⊙x)(g⊙x)ᵀ], and the row sums of the squared weight gradient of each sequence, from autograd itself."""
    statistics = collect_moments(model, tokens, INPUTS | EXTRAS, calibration=CalibrationConfig(batch_tokens=64))
    name = "model.layers.1.mlp.down_proj"
    extras = statistics.groups[name].extras
    x, h = (parts[name] for parts in moments_by_hand(model, tokens, [name]))
    weight = model.get_submodule(name).weight.detach().double()
    product = (h @ weight) * x
    torch.testing.assert_close(extras["magnitude"].double(), x.abs().mean(0), rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(extras["product"].double(), product.mT @ product / len(x), rtol=1e-3, atol=1e-6)
    rows = torch.zeros(weight.shape[0], dtype=torch.float64)
    for sequence in tokens:
        model.zero_grad()
        logits = model(input_ids=sequence[None], use_cache=False).logits
        torch.nn.functional.cross_entropy(logits[0, :-1], sequence[1:], reduction="sum").backward()
        rows += model.get_submodule(name).weight.grad.double().square().sum(1) / len(tokens)
    torch.testing.assert_close(extras[f"rows/{name}"].double(), rows, rtol=1e-3, atol=1e-7)


def test_taylor_is_the_mean_over_sequences_of_the_absolute_sum(model, tokens):
    """E_s |Σ_t x_ti g_ti|, the absolute value of each sequence's sum."""
    extras = collect_moments(model, tokens, INPUTS | EXTRAS, calibration=CalibrationConfig(batch_tokens=64))
    name = "model.layers.0.mlp.down_proj"
    x, h = (parts[name].view(*tokens.shape, -1) for parts in moments_by_hand(model, tokens, [name]))
    weight = model.get_submodule(name).weight.detach().double()
    by_hand = (x * (h @ weight)).sum(1).abs().mean(0)
    torch.testing.assert_close(extras.groups[name].extras["taylor"].double(), by_hand, rtol=1e-3, atol=1e-6)


def test_sketches_are_sums_of_each_sequence_seen_through_the_same_two_maps(model, tokens):
    statistics = collect_moments(model, tokens, INPUTS | EXTRAS)
    name = "model.layers.0.self_attn.o_proj"
    extras = statistics.groups[name].extras
    x, _ = (parts[name].view(*tokens.shape, -1) for parts in moments_by_hand(model, tokens, [name]))
    left, right = torch.randn(2, x.shape[-1], SKETCH, generator=torch.Generator().manual_seed(0)).double() / SKETCH**0.5
    torch.testing.assert_close(extras["sequences/x_left"].double(), x.sum(1) @ left, rtol=1e-3, atol=1e-3)
    by_hand = torch.einsum("sti,stj->sij", x @ left, x @ right)
    torch.testing.assert_close(extras["sequences/xx"].double(), by_hand, rtol=1e-3, atol=1e-3)
    assert extras["sequences/count"].tolist() == [tokens.shape[1]] * len(tokens)


@pytest.mark.parametrize("batch_tokens", [20, 100_000])
def test_extras_do_not_depend_on_batches_or_padding(model, tokens, batch_tokens):
    plain = collect_moments(model, tokens, INPUTS | EXTRAS)
    padded = torch.cat([tokens, torch.full((len(tokens), 4), 2)], dim=1)
    mask = torch.cat([torch.ones_like(tokens), torch.zeros(len(tokens), 4, dtype=torch.long)], dim=1)
    masked = collect_moments(model, padded, INPUTS | EXTRAS, calibration=CalibrationConfig(batch_tokens=batch_tokens), mask=mask)
    for name, group in plain.groups.items():
        for key, value in group.extras.items():
            torch.testing.assert_close(masked.groups[name].extras[key], value, rtol=1e-3, atol=1e-4)
