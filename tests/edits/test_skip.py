"""A sublayer that is left out: its mean stands there, and nothing of it is computed."""

import pytest
import torch

from fasc.edits.skip import Skip
from fasc.methods import METHODS
from fasc.model.groups import find_groups
from fasc.model.options import LayersConfig
from fasc.model.sublayers import find_sublayers
from fasc.statistics.collect import collect_moments
from tests.conftest import CONFIGS, PARALLEL, logits, tiny_model

NEEDS = METHODS["fasc"].needs_in(("group", "layer"))


def sublayers(model):
    return find_sublayers(model, find_groups(model, LayersConfig()))


def test_the_first_attention_of_each_kind_and_the_last_mlp_stay():
    found = {name: [one.kind for one in sublayers(tiny_model(name))] for name in CONFIGS}
    assert found == {name: ["mlp"] if name == "gemma2" else ["mlp", "attention"] for name in CONFIGS}
    assert all(sublayers(tiny_model(name)) == [] for name in PARALLEL)


@pytest.mark.parametrize("name", CONFIGS)
def test_a_sublayer_that_gives_the_same_everywhere_goes_without_loss(name, tokens):
    model = tiny_model(name)
    with torch.no_grad():
        for one in sublayers(model):
            module = model.get_submodule(one.layers[-1].name)
            module.weight.zero_()
            if module.bias is None:
                continue
            module.bias.normal_()
    before = logits(model, tokens)
    statistics = collect_moments(model, tokens, NEEDS)
    for one in sublayers(tiny_model(name)):
        Skip.of(one).apply(model, statistics)
    torch.testing.assert_close(logits(model, tokens), before, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["llama", "qwen3", "gemma3", "gpt2"])
def test_what_it_saves_is_what_the_model_lacks_and_it_generates(name, measured):
    model = tiny_model(name)
    parameters = model.num_parameters()
    edits = [Skip.of(one) for one in sublayers(model)]
    statistics = measured(name)
    for edit in edits:
        statistics = edit.apply(model, statistics)
        assert not set(edit.touches) & {layer.name for one in statistics.groups.values() for layer in one.group.layers}
    assert parameters - model.num_parameters() == sum(edit.saved for edit in edits)
    prompt = torch.arange(3, 9)[None].repeat(2, 1)
    generate = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 2}
    plain = model.generate(prompt, use_cache=False, **generate)
    assert torch.equal(model.generate(prompt, **generate), plain)
    assert torch.equal(model.generate(prompt, cache_implementation="static", **generate), plain)


def test_the_mean_output_stays(measured, tokens):
    dense, model = tiny_model(), tiny_model()
    one = next(one for one in sublayers(model) if one.kind == "attention")
    outputs = []
    dense.get_submodule(one.name).register_forward_hook(lambda _m, _a, output: outputs.append(output[0]))
    logits(dense, tokens)
    Skip.of(one).apply(model, measured())
    mean = model.get_submodule(one.name).mean
    torch.testing.assert_close(mean, outputs[0].flatten(0, 1).mean(0), rtol=1e-4, atol=1e-4)
