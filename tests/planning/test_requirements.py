"""What a run needs is known from the config alone: the same layers, and bytes that can be counted by hand."""

import pytest
from transformers import LlamaConfig, MixtralConfig

from fasc.errors import ModelError
from fasc.model.experts import expert_layers, expert_layers_called
from fasc.model.groups import find_groups
from fasc.model.load import model_of_config
from fasc.model.options import LayersConfig
from fasc.planning.needs import needs_for
from fasc.planning.options import BudgetConfig, MethodConfig
from fasc.stages.plan import plan_of_config
from fasc.statistics.memory import entries_of, memory_forecast
from fasc.statistics.passes import PROGRAM
from tests.conftest import CONFIGS, PARALLEL, tiny_model
from tests.statistics.needs import INPUTS

LLAMA_2_7B = LlamaConfig(hidden_size=4096, intermediate_size=11008, num_hidden_layers=32, vocab_size=32000, dtype="float16")
LLAMA_3_8B = LlamaConfig(
    hidden_size=4096,
    intermediate_size=14336,
    num_hidden_layers=32,
    num_attention_heads=32,
    num_key_value_heads=8,
    vocab_size=128256,
    dtype="bfloat16",
)
LLAMA_3_70B = LlamaConfig(
    hidden_size=8192,
    intermediate_size=28672,
    num_hidden_layers=80,
    num_attention_heads=64,
    num_key_value_heads=8,
    vocab_size=128256,
    dtype="bfloat16",
)


@pytest.mark.parametrize("architecture", [*CONFIGS, *PARALLEL])
def test_a_config_has_the_groups_of_the_loaded_model(architecture, tmp_path):
    model = tiny_model(architecture)
    model.config.save_pretrained(tmp_path)
    with expert_layers(model):
        groups = find_groups(model, LayersConfig())
        forecast = memory_forecast(model, groups, INPUTS)
    bare = model_of_config(tmp_path / "config.json", dtype="float32")
    assert all(parameter.is_meta for parameter in bare.parameters())
    with expert_layers_called(bare):
        assert find_groups(bare, LayersConfig()) == groups
        assert memory_forecast(bare, groups, INPUTS) == forecast


def needed(config, folder, limit, **budget):
    config.save_pretrained(folder)
    return plan_of_config(
        str(folder),
        MethodConfig(name="fasc", allocation="uniform"),
        BudgetConfig(**budget),
        LayersConfig(),
        dtype="auto",
        limit=limit,
    )


def test_the_input_moments_of_llama_2_7b_are_those_counted_by_hand(tmp_path):
    LLAMA_2_7B.save_pretrained(tmp_path)
    model = model_of_config(tmp_path)
    groups = find_groups(model, LayersConfig())
    down = [group for group in groups if group.kind == "down_proj"]
    assert sum(4 * entries_of(group, INPUTS) for group in down) == 32 * 4 * 11008**2  # 15.5 GB
    assert memory_forecast(model, groups, INPUTS)["model"] == 2 * model.num_parameters() == 2 * 6_738_415_616


def test_a_70b_takes_what_its_shapes_say(tmp_path):
    made, found = needed(LLAMA_3_70B, tmp_path, 640 * 10**9, param_fraction=0.8)
    stages = {one.stage: one for one in found.stages}
    d, channels, kv = 8192, 28672, 1024
    gradients = d**2 + d**2 + d**2 + d**2  # of q+k+v, o, gate+up and down: each on the smaller side
    sums = 80 * (3 * d**2 + channels**2 + gradients)
    per_unit = sum(4 * entries_of(group, needs_for(MethodConfig(name="fasc"), None)) for group in find_groups_of(tmp_path))
    assert stages["collect, in one pass"].parts["moments"] == per_unit >= 4 * sums
    assert stages["collect, in one pass"].parts["totals"] == 2 * per_unit
    weights = 80 * (2 * d * d + 2 * d * kv + 3 * d * channels + 2 * d) + 2 * 128256 * d + d
    assert stages["collect, in one pass"].parts["model"] == 2 * weights
    assert stages["load the result"].total == PROGRAM + made.totals["bytes"]
    assert 1 < found.passes <= 80
    assert [one.total <= found.limit for one in found.stages] == [False, True, True, True, True]


def test_an_8b_takes_what_its_shapes_say(tmp_path):
    _, found = needed(LLAMA_3_8B, tmp_path, 80 * 10**9, param_fraction=0.8)
    stages = {one.stage: one for one in found.stages}
    d, channels, kv = 4096, 14336, 1024
    weights = 32 * (2 * d * d + 2 * d * kv + 3 * d * channels + 2 * d) + 2 * 128256 * d + d
    assert stages["collect, in one pass"].parts["model"] == 2 * weights == 2 * 8_030_261_248
    inputs = 3 * d**2 + channels**2  # of q+k+v, o and gate+up; of down
    gradients = 4 * d**2  # of the four groups, on the smaller side, which is 4,096 of each
    by_layer = d**2 + 2 * kv**2 + 2 * d**2  # of q, k, v, gate and up by themselves; o and down are groups of one
    assert stages["collect, in one pass"].parts["moments"] == 4 * 32 * (inputs + gradients + by_layer)
    decomposition = stages["plan by forecasts, with moments on disk"].parts["decomposition"]
    assert decomposition == 8 * 10 * channels**2, "the channels of an MLP are chosen by ten matrices in float64"
    assert 1 < found.passes < 32


def test_experts_are_counted_each_by_itself(tmp_path):
    config = MixtralConfig(dtype="bfloat16")
    _, found = needed(config, tmp_path, 2 * 10**12, param_fraction=0.8)
    parts = found.stages[0].parts
    d, channels, kv, experts = 4096, 14336, 1024, 8
    weights = 32 * (2 * d * d + 2 * d * kv + experts * (3 * d * channels + d) + 2 * d) + 2 * 32000 * d + d
    assert parts["model"] == 2 * weights == 2 * 46_702_792_704
    attention = 2 * d**2 + 2 * d**2 + d**2 + 2 * kv**2  # inputs; gradients of q+k+v and o; of q, k and v
    moes = experts * (d**2 + d**2 + channels**2 + d**2)  # fused gate and up are one layer; down on its outputs
    assert parts["moments"] == 4 * 32 * (attention + moes)


def find_groups_of(folder):
    return find_groups(model_of_config(folder), LayersConfig())


def test_too_little_memory_for_one_block_is_said_with_the_least_that_is_enough(tmp_path):
    config = MixtralConfig(num_hidden_layers=2, dtype="bfloat16")
    _, found = needed(config, tmp_path, 10**9, rank_fraction=0.5)
    assert found.passes is None
    assert "do not hold the moments of one block" in found.why
    _, enough = needed(config, tmp_path, 10**12, rank_fraction=0.5)
    assert (enough.passes, enough.why) == (1, "")


def test_no_config_is_said(tmp_path):
    with pytest.raises(ModelError, match=r"holds no config\.json"):
        model_of_config(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "unheard-of"}')
    with pytest.raises(ModelError, match="cannot load"):
        model_of_config(tmp_path)
