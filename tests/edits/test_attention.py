"""Fewer heads and narrower values: what goes, and that what is left computes what it should."""

import pytest
import torch
from transformers import AutoModelForCausalLM

from fasc.compression.trial import Trial
from fasc.edits.attention import Heads, Values
from fasc.edits.skip import Skip
from fasc.edits.structure import structure_of
from fasc.errors import ModelError
from fasc.forecast.attention import reduction_loss
from fasc.methods import METHODS
from fasc.model.attention import find_attentions, with_values_of
from fasc.model.groups import find_groups, stacked_weight
from fasc.model.options import LayersConfig
from fasc.model.sublayers import find_sublayers
from fasc.serving.quantizer import attach
from fasc.statistics.collect import collect_moments
from tests.conftest import CONFIGS, in_new_process, logits, tiny_model

NEEDS = METHODS["fasc"].needs_in(("group", "layer"))
DAMPING = 1e-4
BUILT_SO = ["llama", "mistral", "qwen2", "qwen3", "gemma2", "gemma3"]


def attentions(model):
    return find_attentions(model, find_groups(model, LayersConfig()))


def heads_of(model, count=1):
    return [Heads.of(one.coupling, count, DAMPING) for one in attentions(model)]


def values_of(model, size):
    return [Values.of(one.coupling, one.value.name, size, DAMPING) for one in attentions(model)]


def make(model, statistics, edits):
    for edit in edits:
        edit.require(statistics)
        statistics = edit.apply(model, statistics)
    return statistics


def test_both_are_offered_where_query_key_and_value_are_layers_of_their_own():
    offered = {name: [one.value is not None for one in attentions(tiny_model(name))] for name in CONFIGS}
    assert offered == {name: [True, True] if name in BUILT_SO else [] for name in CONFIGS}


def test_an_attention_whose_heads_have_an_entry_each_keeps_them():
    """A scale for each head would have another length than the heads that are left."""
    model = tiny_model()
    scale = torch.arange(1.0, 5.0)
    for block in model.model.layers:
        block.self_attn.o_proj.register_forward_pre_hook(
            lambda _m, args: ((args[0].unflatten(-1, (4, -1)) * scale[:, None]).flatten(-2),)
        )
    assert attentions(model) == []


@pytest.mark.parametrize("name", BUILT_SO)
def test_a_head_that_says_nothing_goes_without_loss(name, tokens):
    model, dead = tiny_model(name), [0, 1]
    with torch.no_grad():
        for one, gone in zip(attentions(model), dead, strict=True):
            model.get_submodule(one.coupling.consumer.name).weight.view(32, 2, 16)[:, gone] = 0
    before = logits(model, tokens)
    statistics = collect_moments(model, tokens, NEEDS)
    for one, edit, gone in zip(attentions(model), heads_of(model), dead, strict=True):
        kept = edit.choose(model, statistics).producers[one.value.name].rows.nonzero()[:, 1]
        assert kept.tolist() == list(range(8 * (1 - gone), 8 * (2 - gone)))
    make(model, statistics, heads_of(model))
    torch.testing.assert_close(logits(model, tokens), before, rtol=0, atol=2e-3 * float(before.abs().max()))


@pytest.mark.parametrize("name", BUILT_SO)
def test_values_that_lie_in_a_subspace_are_narrowed_to_it_without_loss(name, tokens):
    model = tiny_model(name)
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for one in attentions(model):
            value = model.get_submodule(one.value.name)
            for head in range(2):
                rows = slice(8 * head, 8 * head + 8)
                basis = torch.linalg.qr(torch.randn(8, 5, generator=generator)).Q
                value.weight[rows] = basis @ basis.mT @ value.weight[rows]
    before = logits(model, tokens)
    statistics = collect_moments(model, tokens, NEEDS)
    make(model, statistics, values_of(model, 5))
    assert {model.get_submodule(one.value.name).weight.shape for one in attentions(tiny_model(name))} == {(10, 32)}
    torch.testing.assert_close(logits(model, tokens), before, rtol=0, atol=5e-3 * float(before.abs().max()))


@pytest.mark.parametrize("make_edits", [heads_of, lambda model: values_of(model, 6)], ids=["heads", "values"])
def test_the_output_keeps_its_mean_and_the_forecast_is_the_quadratic_loss_of_the_error(make_edits, measured, tokens):
    """½ tr(Eᵀ Σ_hh E Σ_xx) of the error at the output layer's own inputs, by hand."""
    dense, model, statistics = tiny_model(), tiny_model(), measured()
    edit = make_edits(model)[0]
    reduction = edit.choose(model, statistics)
    loss = reduction_loss(stacked_weight(model, reduction.coupling.consumer.unit()), statistics, reduction)
    inputs = []
    dense.get_submodule(edit.consumer.name).register_forward_pre_hook(lambda _m, args: inputs.append(args[0].flatten(0, 1)))
    logits(dense, tokens)
    x = inputs[0].double()
    edit.apply(model, statistics)
    before, after = (one.get_submodule(edit.consumer.name) for one in (dense, model))
    error = x @ before.weight.double().mT - ((x @ reduction.reads.mT) @ after.weight.double().mT + after.bias.double())
    torch.testing.assert_close(error.mean(0), torch.zeros(32).double(), rtol=0, atol=1e-4)
    gradient = statistics.unit(reduction.coupling.consumer.unit()).require_gradient()
    assert gradient.side == "input"
    pulled = torch.linalg.lstsq(before.weight.double(), error.mT).solution.mT  # the error at the inputs: g = Wᵀh
    by_hand = 0.5 * torch.trace(gradient.covariance.matrix.double() @ (pulled.mT @ pulled) / len(x))
    assert loss == pytest.approx(float(by_hand.detach()), rel=1e-3)


@pytest.mark.parametrize("make_edits", [heads_of, lambda model: values_of(model, 6)], ids=["heads", "values"])
def test_the_statistics_that_they_give_back_are_of_the_smaller_attention(make_edits, measured, tokens):
    model = tiny_model()
    edit = make_edits(model)[0]
    left = edit.apply(model, measured()).groups[edit.consumer.name]
    again = collect_moments(model, tokens, NEEDS).groups[edit.consumer.name]
    assert left.group == again.group
    torch.testing.assert_close(left.input.matrix, again.input.matrix, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(left.input.mean, again.input.mean, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("name", BUILT_SO)
def test_what_they_save_is_what_the_model_lacks(name, measured):
    model = tiny_model(name)
    parameters = model.num_parameters()
    first = heads_of(model)[0]
    made = [first]
    statistics = make(model, measured(name), made)
    one = attentions(tiny_model(name))[0]
    left = first.coupling(statistics)
    made.append(Values.of(left.__class__("heads", 1, left.group, left.producers, left.consumer), one.value.name, 4, DAMPING))
    make(model, statistics, made[1:])
    assert parameters - model.num_parameters() == sum(edit.saved for edit in made)
    tensors = [tensor for layer in made[1].touches for tensor in model.get_submodule(layer).parameters()]
    assert made[1].new_bytes(4) == sum(4 * tensor.numel() for tensor in tensors)
    assert [edit["edit"] for edit in structure_of(model).edits] == ["heads", "values"]


@pytest.mark.parametrize("name", BUILT_SO)
def test_generation_from_a_cache_is_generation_without_one_and_the_cache_of_values_is_smaller(name, measured):
    model = tiny_model(name)
    statistics = make(model, measured(name), heads_of(model)[:1])
    make(model, statistics, values_of(tiny_model(name), 6)[1:])
    prompt = torch.arange(3, 9)[None].repeat(2, 1)
    generate = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 2}
    plain = model.generate(prompt, use_cache=False, **generate)
    assert torch.equal(model.generate(prompt, **generate), plain)
    assert torch.equal(model.generate(prompt, cache_implementation="static", **generate), plain)
    first, second = model(input_ids=prompt, use_cache=True).past_key_values.layers
    assert first.keys.shape[1::2] == first.values.shape[1::2] == (1, 8)
    assert second.keys.shape[1::2] == (2, 8) and second.values.shape[1::2] == (2, 6)


def test_both_kernels_of_attention_agree_and_compile(measured, tokens):
    model = tiny_model()
    make(model, measured(), values_of(model, 6))
    usual = logits(model, tokens)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(input_ids=tokens[:2]).logits, usual[:2], rtol=1e-4, atol=1e-4)
    model.set_attn_implementation("eager")
    torch.testing.assert_close(logits(model, tokens), usual, rtol=1e-4, atol=1e-4)


def test_a_kernel_that_takes_one_width_is_refused():
    model = tiny_model()
    model.config._attn_implementation = "flash_attention_2"
    with pytest.raises(ModelError, match="flash_attention_2 takes values as wide as keys"):
        with_values_of(model, "model.layers.0.self_attn.o_proj", 6)


def all_of_them(name, statistics):
    """One head less in the first block, narrower values in the second, and what may be left out of either left out."""
    model = tiny_model(name)
    groups = find_groups(model, LayersConfig())
    edits = [heads_of(model)[0], values_of(model, 6)[1]]
    edits += [Skip.of(one) for one in find_sublayers(model, groups) if one.kind == "mlp"]
    return model, edits, make(model, statistics, edits)


@pytest.mark.parametrize("name", BUILT_SO)
def test_a_checkpoint_gives_the_same_logits(name, measured, tokens, tmp_path):
    model, _, _ = all_of_them(name, measured(name))
    attach(model)
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(logits(again, tokens), logits(model, tokens))


def test_a_new_process_loads_it(measured, tmp_path):
    model, _, _ = all_of_them("llama", measured())
    attach(model)
    model.save_pretrained(tmp_path)
    script = (
        "import sys, torch\nfrom transformers import AutoModelForCausalLM\n"
        "model = AutoModelForCausalLM.from_pretrained(sys.argv[1])\n"
        "print(float(model(input_ids=torch.arange(12)[None]).logits.double().sum()))"
    )
    expected = float(logits(model, torch.arange(12)[None]).double().sum())
    assert float(in_new_process(script, tmp_path).split()[-1]) == pytest.approx(expected, rel=1e-6)


def test_a_trial_puts_every_module_back(measured, tokens):
    model, statistics = tiny_model(), measured()
    _, edits, _ = all_of_them("llama", statistics)
    before, modules = logits(model, tokens), dict(model.named_modules())
    assert Trial(model, statistics, tokens[:4]).measure(edits).nats > 0
    assert torch.equal(logits(model, tokens), before)
    assert all(module is modules[name] for name, module in model.named_modules())
