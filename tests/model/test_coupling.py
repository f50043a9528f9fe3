"""Which layers produce what nobody else reads is tried on the model, not guessed from its names."""

import pytest
import torch
from transformers import AutoModelForCausalLM, BitNetConfig, CohereConfig, GPTNeoXConfig

from fasc.model.coupling import find_channels, find_heads, rows_of
from fasc.model.groups import find_groups
from fasc.model.options import LayersConfig
from tests.conftest import PARALLEL, logits, tiny_model

SMALL = {
    "vocab_size": 128,
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 0,
    "eos_token_id": 1,
}
"""Every projection is 32 × 32: widths tell nothing apart."""


def mlps(model):
    return find_channels(model, find_groups(model, LayersConfig()))


def small(config):
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config(**SMALL)).eval()


def test_every_architectures_mlps_are_seen_and_the_model_is_left_as_it_was(tokens, architecture):
    model = tiny_model(architecture)
    before = logits(model, tokens)
    couplings = mlps(model.train())
    assert [one.parts for one in couplings] == [128 if architecture == "gpt2" else 48] * 2
    assert all("down" in one.consumer.name or "c_proj" in one.consumer.name for one in couplings)
    assert all("mlp" in layer.name for one in couplings for layer in one.layers)
    assert model.training
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    assert torch.equal(logits(model.eval(), tokens), before)


def test_channels_that_a_norm_mixes_are_not_taken_for_separate_ones():
    assert mlps(small(BitNetConfig)) == []


def test_heads_are_not_taken_for_channels():
    """Queries, keys and values are as wide as what the output projection reads."""
    assert [one.consumer.kind for one in mlps(small(GPTNeoXConfig))] == ["dense_4h_to_h"] * 2


@pytest.mark.parametrize("name", PARALLEL)
def test_an_mlp_beside_its_attention_is_told_from_it(name):
    couplings = mlps(tiny_model(name))
    assert len(couplings) == 2
    for one in couplings:
        assert all("mlp" in layer.name for layer in one.layers)
        assert any("mlp" not in layer.name for layer in one.group.layers)
        assert one.parts == 48


def test_queries_as_wide_as_the_channels_beside_them_are_told_from_the_producers():
    assert [[layer.kind for layer in one.layers] for one in mlps(small(CohereConfig))] == [
        ["gate_proj", "up_proj", "down_proj"]
    ] * 2


def test_an_mlp_of_which_only_a_part_was_chosen_stays_whole():
    model = tiny_model()
    assert find_channels(model, find_groups(model, LayersConfig(exclude=("*up_proj",)))) == []


def test_leaving_channels_out_is_what_a_narrower_model_computes(architecture, tokens):
    """The definition: zeros in the consumer's columns change what is read, removed channels do not change the rest."""
    model, zeroed = tiny_model(architecture), tiny_model(architecture)
    (first, _) = mlps(model)
    gone = torch.arange(first.parts)[::3]
    with torch.no_grad():
        for producer in first.producers:
            weight = zeroed.get_submodule(producer.name).weight
            rows = rows_of(gone, first.parts, producer.d_out)
            (weight if architecture != "gpt2" else weight.T)[rows] = 7.0
        for one in (model, zeroed):
            weight = one.get_submodule(first.consumer.name).weight
            (weight if architecture != "gpt2" else weight.T)[:, gone] = 0
    torch.testing.assert_close(logits(zeroed, tokens), logits(model, tokens))


def test_the_parameters_of_fewer_parts_are_counted():
    model = tiny_model("gpt2")
    first = mlps(model)[0]
    assert first.parameters(first.parts) == sum(layer.parameters for layer in first.layers)
    assert first.parameters(first.parts) - first.parameters(first.parts - 1) == 32 + 1 + 32


def test_key_value_heads_go_with_the_query_heads_that_they_serve():
    model = tiny_model()
    couplings = find_heads(model, find_groups(model, LayersConfig()))
    assert [(one.parts, one.consumer.kind) for one in couplings] == [(2, "o_proj")] * 2
    assert [layer.kind for layer in couplings[0].producers] == ["q_proj", "k_proj", "v_proj"]
