"""What is heard of a layer that is called several times, in part, or not for the loss."""

import pytest
import torch
from transformers import AutoModelForCausalLM, CTRLConfig

from fasc.model.groups import find_groups
from fasc.model.options import LayersConfig
from fasc.statistics.capture import GroupCapture
from fasc.statistics.collect import collect_moments
from fasc.statistics.memory import memory_forecast
from fasc.statistics.moments import Statistics
from tests.conftest import VOCABULARY, tiny_model
from tests.reference import covariance, moments_by_hand
from tests.statistics.needs import COVARIANCES, EVERYTHING, GRADIENTS, INPUTS
from tests.statistics.tensors import tensors_of


def without_gradient(model, name):
    """Nothing behind this layer reaches it in the backward pass."""
    model.get_submodule(name).register_forward_hook(lambda _module, _args, output: output.detach())
    return model


def test_a_member_without_gradient_counts_as_zero_in_its_group(tokens, capsys):
    name = "model.layers.0.self_attn.k_proj"
    model = without_gradient(tiny_model(), name)
    whole = collect_moments(model, tokens, EVERYTHING)
    others = collect_moments(model, tokens, EVERYTHING, layers=LayersConfig(exclude=(name,)))
    group = whole.groups["model.layers.0.self_attn.q_proj+k_proj+v_proj"]
    expected = others.groups["model.layers.0.self_attn.q_proj+v_proj"]
    for one, other in (
        (group.group.name, expected.group.name),
        *[(f"model.layers.0.self_attn.{kind}_proj",) * 2 for kind in "qv"],
    ):
        moment, wanted = group.gradients[one], expected.gradients[other]
        torch.testing.assert_close(moment.covariance.matrix, wanted.covariance.matrix)
        torch.testing.assert_close(moment.cross, wanted.cross)
    torch.testing.assert_close(group.extras["product"], expected.extras["product"])
    assert not group.gradients[name].covariance.matrix.any()
    assert whole.meta["without_gradient"] == [name]
    assert name in capsys.readouterr().err
    assert others.meta["without_gradient"] == []


def test_layers_without_gradient_are_listed_in_a_file_and_after_merging(tokens, tmp_path):
    name = "model.layers.0.mlp.down_proj"
    model = without_gradient(tiny_model(), name)
    parts = [collect_moments(model, part, EVERYTHING) for part in (tokens[:10], tokens[10:])]
    merged = parts[0].merge(Statistics.load(parts[1].save(tmp_path / "s.safetensors")))
    assert merged.meta["without_gradient"] == [f"model.layers.0.mlp.{kind}_proj" for kind in ("gate", "up", "down")]
    assert "sequences/xx" not in merged.groups[name].extras


@pytest.mark.parametrize("rows", [slice(None), slice(0, 4)])
@pytest.mark.parametrize("first", [True, False])
def test_a_call_whose_result_the_loss_does_not_read_lends_its_input_to_no_other(tokens, first, rows):
    """Also where it reads other tokens than the call that counts."""
    model, other = tiny_model(), tiny_model()
    mlp = model.model.layers[0].mlp
    once = mlp.forward

    def twice(x):
        before = once(3 * x[:, rows]).sum() if first else 0
        read = once(x)
        return read + 0 * (before if first else once(3 * x[:, rows]).sum()).detach()

    mlp.forward = twice
    name = "model.layers.0.mlp.down_proj"
    found, expected = (collect_moments(one, tokens, EVERYTHING).groups[name] for one in (model, other))
    calls = found.tokens / expected.tokens  # means over the tokens of all calls; of a centred moment the mean is taken off
    one, alone = found.gradients[name], expected.gradients[name]
    torch.testing.assert_close(one.covariance.mean * calls, alone.covariance.mean)
    cross = one.cross + torch.outer(found.input.mean, one.covariance.mean)
    torch.testing.assert_close(cross * calls, alone.cross + torch.outer(expected.input.mean, alone.covariance.mean))


def test_a_layer_that_is_called_twice_has_the_moments_of_both_calls_and_a_share_of_two(tokens):
    model = tiny_model()
    mlp = model.model.layers[0].mlp
    once = mlp.forward
    mlp.forward = lambda x: once(x) + once(2 * x)
    statistics = collect_moments(model, tokens, COVARIANCES)
    name = "model.layers.0.mlp.down_proj"
    group = statistics.groups[name]
    x, h = (parts[name] for parts in moments_by_hand(model, tokens, [name]))
    assert len(x) == group.tokens == 2 * tokens.numel()
    assert group.share == 2
    torch.testing.assert_close(group.input.matrix.double(), covariance(x), rtol=1e-3, atol=1e-5)
    torch.testing.assert_close(group.gradients[name].covariance.matrix.double(), covariance(h), rtol=1e-3, atol=1e-7)
    torch.testing.assert_close(group.gradients[name].cross.double(), covariance(x, h), rtol=1e-3, atol=1e-5)


def test_a_model_may_scale_its_embeddings_in_place(tokens):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(CTRLConfig(vocab_size=VOCABULARY, n_embd=32, dff=48, n_layer=2, n_head=4)).eval()
    statistics = collect_moments(model, tokens, COVARIANCES)
    name = "transformer.h.1.ffn.2"
    _, h = moments_by_hand(model, tokens, [name])
    moment = statistics.groups[name].gradients[name]
    torch.testing.assert_close(moment.covariance.matrix.double(), covariance(h[name]), rtol=1e-3, atol=1e-7)


@pytest.mark.parametrize("needs", [INPUTS, GRADIENTS, COVARIANCES])
def test_the_memory_forecast_counts_the_entries_of_every_sum(model, needs):
    groups = find_groups(model, LayersConfig())
    captures = [GroupCapture(group, needs, model.device) for group in groups]
    for capture in captures:
        capture.tokens = capture.text_tokens = 1
    published = {capture.group.name: capture.publish() for capture in captures}
    means = {"/mean", " mean"}
    entries = sum(value.numel() for key, value in tensors_of(Statistics(published, {})) if key[-5:] not in means)
    forecast = memory_forecast(model, groups, needs)
    assert forecast["moments"] == 4 * entries
    assert forecast["totals"] == 8 * entries
    assert (forecast["batch"] > memory_forecast(model, groups, INPUTS)["batch"]) == (needs != INPUTS)
