"""Llama-4's experts, whose router scales what they read: the same outputs, moments of routed tokens, a mean in the place of one."""

import copy

import pytest
import torch
from transformers import AutoModelForCausalLM

import fasc
from fasc.edits.skip import Skip
from fasc.edits.unfuse import Unfuse
from fasc.errors import ModelError
from fasc.model.experts import expert_layers, fuse, routers, unknown_experts
from tests.conftest import logits
from tests.zoo.walk import build, tokens_for

FIRST = "model.layers.0.feed_forward.experts"


@pytest.fixture(scope="module")
def dense():
    return build("llama4_text")


@pytest.fixture
def llama4(dense):
    return copy.deepcopy(dense)


@pytest.fixture(scope="module")
def text(dense):
    return tokens_for(dense)


@pytest.fixture(scope="module")
def statistics(dense, text):
    return fasc.collect(dense, corpus=text, sequences=len(text), sequence_length=text.shape[1])


def test_experts_one_by_one_compute_what_they_do_together(llama4, text):
    expected = logits(llama4, text)
    with expert_layers(llama4) as holders:
        assert FIRST in holders
        torch.testing.assert_close(logits(llama4, text), expected, rtol=1e-4, atol=1e-4)
    Unfuse.of(llama4).apply(llama4, None)
    torch.testing.assert_close(logits(llama4, text), expected, rtol=1e-4, atol=1e-4)
    assert len(routers(llama4)) == len(holders)
    for name in holders:
        fuse(llama4.get_submodule(name))
    torch.testing.assert_close(logits(llama4, text), expected)


def test_moments_are_of_the_tokens_that_the_router_sends_and_scaled_by_it(llama4, text, statistics):
    seen = {}
    llama4.get_submodule(FIRST).register_forward_pre_hook(lambda _m, args: seen.update(x=args[0].detach().double()))
    logits(llama4, text)
    routed = seen["x"].view(4, text.numel(), -1)
    assert sum(statistics.groups[f"{FIRST}.{index}.gate_up_proj"].tokens for index in range(4)) == 2 * text.numel()
    for index in range(4):
        group = statistics.groups[f"{FIRST}.{index}.gate_up_proj"]
        own = routed[index][routed[index].ne(0).any(-1)]
        assert group.tokens == len(own)
        torch.testing.assert_close(group.input.mean.double(), own.mean(0), rtol=1e-3, atol=1e-5)


def test_gradients_reach_what_is_before_the_experts(llama4, text):
    """As they do through the fused ones."""
    grads = []
    for way in (False, True):
        if way:
            Unfuse.of(llama4).apply(llama4, None)
        llama4.zero_grad()
        llama4(input_ids=text, labels=text).loss.backward()
        grads.append(
            [llama4.get_input_embeddings().weight.grad.clone(), llama4.get_submodule(routers_of(llama4)).weight.grad.clone()]
        )
    for before, after in zip(*grads, strict=True):
        assert before.abs().sum() > 0
        torch.testing.assert_close(after, before, rtol=1e-3, atol=1e-6)


def routers_of(model):
    return f"{FIRST.rpartition('.')[0]}.router"


def test_a_mean_in_the_place_of_an_expert_is_said_to_its_own_tokens_alone(llama4, text, statistics, tmp_path):
    made = fasc.plan(llama4, statistics, param_fraction=0.5, layouts="dense,experts,factors,channels", damping=1e-2)
    small = fasc.compress(llama4, statistics, made)
    gone = [edit.sublayer for edit in made.edits if isinstance(edit, Skip)]
    small.save(tmp_path / "small")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "small").eval()
    assert torch.equal(logits(again, text), logits(small.model, text))
    experts = small.model.get_submodule(FIRST)
    x = torch.zeros(4, 3, small.model.config.hidden_size)
    x[1, 2] = 1.0
    with torch.no_grad():
        said = experts(x.flatten(0, 1)).view(x.shape)
    assert said[1, 2].abs().sum() > 0
    said[1, 2] = 0
    assert not said.any(), f"biases and means ({gone}) are nothing to tokens that were not sent there"


def test_all_tokens_for_all_experts_are_refused(llama4, text):
    with pytest.raises(ModelError, match="scales what experts read"):
        fasc.collect(llama4, corpus=text, sequences=len(text), sequence_length=text.shape[1], route_all=True)


@pytest.mark.parametrize(("family", "name"), [("dbrx", "DbrxExpertGLU"), ("jetmoe", "JetMoeParallelExperts")])
def test_experts_of_another_form_stay_dense_and_that_is_said_once(family, name, capsys):
    model = build(family)
    text = tokens_for(model)
    statistics = fasc.collect(model, corpus=text, sequences=len(text), sequence_length=text.shape[1])
    said = [line for line in capsys.readouterr().err.splitlines() if "stay dense" in line]
    assert len(said) == 1 and said[0].startswith(f"experts of {name} run by code of their own")
    assert f"{unknown_experts(model)[name]:,} of {model.num_parameters():,} parameters" in said[0]
    made = fasc.plan(model, statistics, param_fraction=0.8, damping=1e-2)
    assert made.outside["experts"] >= unknown_experts(model)[name]
