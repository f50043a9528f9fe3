"""Which layers read the same tensor."""

import pytest

from fasc.errors import ModelError
from fasc.model.groups import find_groups
from fasc.model.options import LayersConfig
from tests.conftest import tiny_model

EXPECTED_KINDS = {
    "gpt2": ["c_attn", "c_proj", "c_fc", "c_proj"],
    "phi3": ["qkv_proj", "o_proj", "gate_up_proj", "down_proj"],
}


def test_groups_are_the_layers_that_read_the_same_tensor(architecture):
    groups = find_groups(tiny_model(architecture), LayersConfig())
    expected = EXPECTED_KINDS.get(architecture, ["q_proj+k_proj+v_proj", "o_proj", "gate_proj+up_proj", "down_proj"])
    assert [group.kind for group in groups] == expected * 2
    assert [group.block for group in groups] == [0] * 4 + [1] * 4


def test_group_names_say_the_parent_once(model):
    names = [group.name for group in find_groups(model, LayersConfig())]
    assert names[0] == "model.layers.0.self_attn.q_proj+k_proj+v_proj"
    assert names[3] == "model.layers.0.mlp.down_proj"


def test_layers_can_be_chosen_and_an_empty_choice_is_an_error(model):
    chosen = find_groups(model, LayersConfig(include=("*.mlp.*",), exclude=("*.1.*",)))
    assert [group.kind for group in chosen] == ["gate_proj+up_proj", "down_proj"]
    with pytest.raises(ModelError, match="no layer to compress"):
        find_groups(model, LayersConfig(include=("*.experts.*",)))
