"""Fewer channels per MLP: which go, and that the narrower model is an ordinary one that computes what it should."""

import pytest
import torch

from fasc.compression.compress import carry_out
from fasc.edits.narrow import Narrow
from fasc.errors import ModelError
from fasc.methods import METHODS
from fasc.model.coupling import find_channels
from fasc.model.groups import find_groups
from fasc.model.options import LayersConfig
from fasc.stages.plan import plan
from fasc.statistics.collect import collect_moments
from tests.conftest import PARALLEL, logits, tiny_model

NEEDS = METHODS["fasc"].needs_in(("group", "layer"))
DAMPING = 1e-2


def mlps(model):
    return find_channels(model, find_groups(model, LayersConfig()))


def narrow_all(model, statistics, width):
    """Every MLP with so many channels; which stay."""
    edits = [Narrow.of(coupling, width, DAMPING) for coupling in mlps(model)]
    narrowings = [edit.choose(model, statistics) for edit in edits]
    for edit, narrowing in zip(edits, narrowings, strict=True):
        edit.carry_out(model, statistics, narrowing)
    return narrowings


def channels_only(measured, architecture="llama", fraction=0.85):
    model = tiny_model(architecture)
    made = plan(model, measured(architecture), param_fraction=fraction, damping=DAMPING, layouts=("dense", "channels"))
    return model, carry_out(model, measured(architecture), made)


def test_channels_that_are_always_zero_go_first_and_without_loss(tokens, architecture):
    model, dead = tiny_model(architecture), {}
    with torch.no_grad():
        for coupling in mlps(model):
            gone = torch.arange(coupling.parts)[::3]
            dead[coupling.consumer.name] = gone
            weight = model.get_submodule(coupling.consumer.name).weight
            (weight if architecture == "gpt2" else weight.T)[gone] = 0
    before = logits(model, tokens)
    statistics = collect_moments(model, tokens, NEEDS)
    for one in narrow_all(model, statistics, width=128 - 43 if architecture == "gpt2" else 48 - 16):
        gone = set(range(one.coupling.parts)) - set(one.channels.tolist())
        assert gone == set(dead[one.coupling.consumer.name].tolist())
    torch.testing.assert_close(logits(model, tokens), before, rtol=0, atol=2e-3 * float(before.abs().max()))


def test_the_consumer_keeps_its_mean_output(measured, tokens, architecture):
    dense, model = tiny_model(architecture), tiny_model(architecture)
    first = mlps(dense)[0].consumer.name
    narrow_all(model, measured(architecture), width=24)
    means = []
    for one in (dense, model):
        outputs = []
        one.get_submodule(first).register_forward_hook(lambda _m, _a, output, outputs=outputs: outputs.append(output))
        logits(one, tokens)
        means.append(outputs[0].flatten(0, 1).mean(0))
    torch.testing.assert_close(means[1], means[0], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", PARALLEL)
def test_the_attention_beside_an_mlp_stays_as_it_was(name, tokens):
    model = tiny_model(name)
    statistics = collect_moments(model, tokens, NEEDS)
    coupling = mlps(model)[0]
    others = [layer.name for layer in coupling.group.layers if layer not in coupling.producers]
    before = {other: model.get_submodule(other).weight.clone() for other in others}
    edit = Narrow.of(coupling, 24, DAMPING)
    edit.apply(model, statistics)
    assert others
    for other in others:
        assert torch.equal(model.get_submodule(other).weight, before[other])
    assert logits(model, tokens).isfinite().all()


def test_the_statistics_that_it_gives_back_are_of_the_narrower_model(measured, tokens):
    """Inputs of the consumer exactly: they are the same features, fewer of them."""
    model, statistics = tiny_model(), measured()
    edit = Narrow.of(mlps(model)[0], 24, DAMPING)
    left = edit.apply(model, statistics)
    again = collect_moments(model, tokens, NEEDS).groups[edit.consumer.name]
    assert left.groups[edit.consumer.name].group == again.group
    torch.testing.assert_close(left.groups[edit.consumer.name].input.matrix, again.input.matrix, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(left.groups[edit.consumer.name].input.mean, again.input.mean, rtol=1e-3, atol=1e-4)


def test_narrow_mlps_are_ordinary_layers_and_compile(measured):
    model, made = channels_only(measured)
    assert {edit.edit for edit in made.edits} == {"narrow"}
    layers = [module for name, module in model.named_modules() if name.endswith(("gate_proj", "up_proj", "down_proj"))]
    assert all(type(layer) is torch.nn.Linear for layer in layers)
    widths = {edit.width for edit in made.edits}
    assert {layer.in_features for layer in layers} | {layer.out_features for layer in layers} == {32, 48} | widths
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    ids = torch.arange(12)[None]
    torch.testing.assert_close(compiled(input_ids=ids).logits, model(input_ids=ids).logits, rtol=1e-4, atol=1e-4)


def test_what_it_saves_is_what_the_model_lacks(measured, architecture):
    dense = tiny_model(architecture)
    model, made = channels_only(measured, architecture)
    assert made.edits
    assert dense.num_parameters() - model.num_parameters() == sum(edit.saved for edit in made.edits)
    for edit in made.edits:
        tensors = [tensor for name in edit.touches for tensor in model.get_submodule(name).parameters()]
        assert edit.new_bytes(4) == sum(tensor.numel() * tensor.element_size() for tensor in tensors)
        before, after = (sum(one.get_submodule(name).weight.numel() for name in edit.touches) for one in (dense, model))
        assert edit.saved_multiply_adds == before - after


def test_plans_with_channels_lose_less_and_keep_the_budget(measured, architecture):
    statistics = measured(architecture)
    without = ("dense", "factors", "shared", "pivoted", "pivoted-columns")
    for fraction in (0.8, 0.5):
        model = tiny_model(architecture)
        made = plan(model, statistics, param_fraction=fraction, damping=DAMPING)
        other = plan(model, statistics, param_fraction=fraction, damping=DAMPING, layouts=without)
        assert made.predicted_loss <= other.predicted_loss + 1e-12
        assert made.totals["param_fraction"] <= fraction
        assert made.dense_parameters == other.dense_parameters
        carry_out(model, statistics, made)
        orders = sum(buffer.numel() for name, buffer in model.named_buffers() if name.endswith(".order"))
        assert model.num_parameters() + orders == made.totals["parameters"] < tiny_model(architecture).num_parameters()


@pytest.mark.parametrize("width", [48, 49])
def test_as_many_channels_as_there_are_cannot_stay(model, width):
    edit = Narrow.of(mlps(model)[0], 24, DAMPING).model_copy(update={"width": width})
    made = plan(model, param_fraction=0.9, allocation="uniform").with_edits([edit])
    with pytest.raises(ModelError, match=f"cannot keep {width} of 48 channels of layers 48×32, 48×32, 32×48"):
        made.check(model)
