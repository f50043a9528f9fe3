"""Forecasts are per token of the text: moments of an expert are means over its tokens, and count by their share.

A mixture of equal experts is a dense MLP, whichever expert a token goes to. The text is repeated once for each expert, and copy c
goes to the experts c, c+1, …, so that every expert gets the same tokens and the theorem is exact.
"""

from contextlib import contextmanager
from dataclasses import replace

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, MistralConfig

from fasc.forecast.channels import channel_curves, choose_channels, narrowing_loss
from fasc.forecast.half_j import loss_curves
from fasc.methods import solver
from fasc.model.coupling import find_channels
from fasc.model.experts import expert_layers
from fasc.statistics.collect import collect_moments
from fasc.statistics.options import CalibrationConfig
from tests.conftest import tiny_model
from tests.forecast.conftest import EVERYTHING

EXPERTS, LENGTH = 4, 20


@pytest.fixture(scope="module")
def copies(tokens):
    """Every sequence once for each expert, one after the other."""
    return tokens[:, :LENGTH].repeat_interleave(EXPERTS, dim=0)


def made_equal(mixture):
    with torch.no_grad():
        for name, parameter in mixture.named_parameters():
            if ".experts." in name:
                parameter.copy_(parameter[:1].expand_as(parameter))
    return mixture


@contextmanager
def routed(mixture, of_a_token):
    """Copy c of a sequence goes to the first so many experts from c on, with equal gates; or all of them to the first."""

    def route(_module, _args, output):
        logits, scores, _ = output
        copy = torch.arange(len(logits)) // LENGTH % EXPERTS
        first = copy if of_a_token else torch.zeros_like(copy)
        index = (first[:, None] + torch.arange(max(of_a_token, 1))) % EXPERTS
        return logits, torch.full(index.shape, 1 / index.shape[1], dtype=scores.dtype), index

    routers = [module for name, module in mixture.named_modules() if name.endswith(("mlp.gate", "mlp.router"))]
    assert len(routers) == 2
    handles = [router.register_forward_hook(route) for router in routers]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def forecasts(mixture, copies, of_a_token, chosen):
    """½J of every expert's layers by block and kind, at each rank: ``{(block, kind): [experts, ranks]}``; and the logits."""
    with expert_layers(mixture), routed(mixture, of_a_token):
        calibration = CalibrationConfig(batch_tokens=3 * EXPERTS * LENGTH)
        statistics = collect_moments(mixture, copies, EVERYTHING, calibration=calibration)
        experts = [one.group for one in statistics.groups.values() if one.group.layers[0].expert is not None]
        curves = loss_curves(mixture, statistics, chosen, [group.unit() for group in experts])
        logits = mixture(input_ids=copies[: 2 * EXPERTS]).logits.detach()
    rows = {}
    for group in experts:
        rows.setdefault((group.block, group.kind), []).append(curves[group.name])
    return {key: np.array(value) for key, value in rows.items()}, logits


@pytest.mark.parametrize("name", ["two-sided", "svd"])
def test_experts_of_which_each_token_has_one_lose_together_what_the_dense_mlp_loses(mixture, copies, name):
    """Unweighted, their sum is too high by the number of experts."""
    chosen = solver(name)
    dense, expected = forecasts(made_equal(mixture), copies, 0, chosen)
    experts, logits = forecasts(mixture, copies, 1, chosen)
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)
    assert experts.keys() == {(block, kind) for block in (0, 1) for kind in ("gate_up_proj", "down_proj")}
    for key, curves in experts.items():
        assert len(curves) == EXPERTS
        assert len(dense[key]) == 1, "only the first expert has got any token"
        np.testing.assert_allclose(curves.sum(0), dense[key][0], rtol=1e-3, atol=1e-5 * dense[key].max())


@pytest.mark.parametrize("of_a_token", [2, 4])
def test_where_a_token_has_k_experts_their_independent_errors_lose_a_kth_part(mixture, copies, of_a_token):
    """Each error reaches the output times its gate 1/k, so its square times 1/k², and a token has k of them."""
    dense, expected = forecasts(made_equal(mixture), copies, 0, solver("two-sided"))
    experts, logits = forecasts(mixture, copies, of_a_token, solver("two-sided"))
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)
    for key, curves in experts.items():
        assert len(curves) == EXPERTS
        np.testing.assert_allclose(of_a_token * curves.sum(0), dense[key][0], rtol=1e-3, atol=1e-5 * dense[key].max())


@pytest.mark.parametrize("mixture", ["mixtral"], indirect=True)
def test_equal_experts_lose_what_an_ordinary_model_with_that_mlp_loses(mixture, copies):
    """The same theorem against a model without experts."""
    sizes = {name: value for name, value in mixture.config.to_dict().items() if name in MistralConfig().to_dict()}
    dense = AutoModelForCausalLM.from_config(MistralConfig(**sizes | {"model_type": "mistral", "architectures": None})).eval()
    state = {}
    for name, value in made_equal(mixture).state_dict().items():
        if name.endswith("gate_up_proj"):
            (
                state[name.replace("experts.gate_up_proj", "gate_proj.weight")],
                state[name.replace("experts.gate_up_proj", "up_proj.weight")],
            ) = value[0].chunk(2)
        elif name.endswith("down_proj"):
            state[name.replace("experts.down_proj", "down_proj.weight")] = value[0]
        elif not name.endswith("mlp.gate.weight"):
            state[name] = value
    dense.load_state_dict(state)
    chosen = solver("fasc")
    experts, logits = forecasts(mixture, copies, 1, chosen)
    torch.testing.assert_close(dense(input_ids=copies[: 2 * EXPERTS]).logits, logits, rtol=1e-4, atol=1e-4)
    statistics = collect_moments(dense, copies, EVERYTHING)
    for (block, kind), curves in experts.items():
        name = f"model.layers.{block}.mlp." + {"gate_up_proj": "gate_proj+up_proj"}.get(kind, kind)
        whole = loss_curves(dense, statistics, chosen, [statistics.groups[name].group.unit()])[name]
        np.testing.assert_allclose(curves.sum(0), whole, rtol=1e-3, atol=1e-5 * whole.max())


def lengthened(statistics):
    """The same moments in a text of twice as many tokens."""
    groups = {name: replace(one, text_tokens=2 * one.text_tokens) for name, one in statistics.groups.items()}
    return replace(statistics, groups=groups)


@pytest.mark.parametrize("unseen", [False, True], ids=["own text", "held-out text"])
@pytest.mark.parametrize("name", ["fasc", "svd"])
def test_every_forecast_is_halved_where_twice_the_text_has_the_same_tokens_of_a_layer(statistics, held_out, name, unseen):
    model, chosen = tiny_model(), solver(name)
    groups = [one.group for one in statistics.groups.values()]
    units = [unit for group in groups for unit in group.units("layer")] + [group.unit() for group in groups]
    couplings = find_channels(model, groups)
    assert len(couplings) == 2

    def curves(own, other):
        given = other if unseen else None
        ranks = loss_curves(model, own, chosen, units, held_out=given)
        return ranks | channel_curves(model, couplings, chosen, lambda channels: [channels // 2, channels // 4], (own, given))

    whole = curves(statistics, held_out)
    half = curves(*map(lengthened, (statistics, held_out)))
    assert len(whole) == len({unit.name for unit in units}) + 2 * 3
    for key, curve in whole.items():
        assert curve.max() > 0
        np.testing.assert_allclose(2 * half[key], curve, rtol=1e-9)
    narrowing = choose_channels(model, statistics, couplings[0], 24, 1e-4)
    loss = narrowing_loss(model, held_out, narrowing)
    assert 2 * narrowing_loss(model, lengthened(held_out), narrowing) == pytest.approx(loss) != 0
