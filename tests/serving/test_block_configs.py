"""Block configs hold a narrower Llama tensor by tensor, in the widths that the graph computes; what does not fit is refused."""

import json

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoConfig, LlamaConfig, LlamaForCausalLM

from fasc import collect, compress, plan
from fasc.errors import UsageError
from fasc.serving.block_configs import MULTIPLE, export_block_configs, register_config, width_of
from tests.conftest import tiny_model


def wide_model():
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=128, hidden_size=32, intermediate_size=3 * MULTIPLE, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=64, bos_token_id=0, eos_token_id=1,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


@pytest.mark.parametrize("hidden", [32, 576, 2048, 4096])
@pytest.mark.parametrize("blocks", [1, 2, 7, 56])
def test_every_multiple_of_256_is_read_back(hidden, blocks):
    from fasc.serving.block_configs import _multiple

    width = blocks * MULTIPLE
    assert width_of(_multiple(width, hidden), hidden) == width


def test_a_narrower_model_is_written_as_it_is(tokenizer, text_file, tmp_path):
    model = wide_model()
    statistics = collect(model, tokenizer, corpus=text_file, sequences=8, sequence_length=16)
    made = plan(model, statistics, param_fraction=0.8, layouts=("dense", "channels"), channel_multiple=MULTIPLE)
    small = compress(model, statistics, made).model
    tokens = torch.randint(3, 128, (2, 12), generator=torch.Generator().manual_seed(0))
    wanted = small(input_ids=tokens).logits
    blocks = export_block_configs(small, tokenizer, tmp_path)
    assert {block.width for block in blocks} <= {MULTIPLE, 2 * MULTIPLE, 3 * MULTIPLE}
    assert len({block.width for block in blocks}) > 1
    config, tensors = json.loads((tmp_path / "config.json").read_text()), load_file(tmp_path / "model.safetensors")
    assert config["architectures"] == ["DeciLMForCausalLM"]
    assert config["mlp_bias"] is True
    register_config()
    read = AutoConfig.from_pretrained(tmp_path)
    assert [width_of(one.ffn.ffn_mult, 32) for one in read.block_configs] == [block.width for block in blocks]
    with torch.no_grad():
        assert torch.allclose(by_hand(read, tensors, tokens), wanted, atol=1e-4)


def by_hand(config, tensors, tokens):
    """The graph of block configs: Llama's own blocks, each built in its width."""
    x = torch.nn.functional.embedding(tokens, tensors["model.embed_tokens.weight"])
    for number, block in enumerate(config.block_configs):
        own = LlamaConfig(
            **{k: v for k, v in config.to_dict().items() if k not in ("block_configs", "model_type", "architectures")}
        )
        own.intermediate_size, own.num_hidden_layers = width_of(block.ffn.ffn_mult, config.hidden_size), 1
        own.num_key_value_heads = config.num_attention_heads // block.attention.n_heads_in_group
        own._attn_implementation = "eager"
        one = LlamaForCausalLM(own).eval()
        prefix = f"model.layers.{number}."
        state = {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}
        one.model.layers[0].load_state_dict(state)
        one.model.norm = torch.nn.Identity()
        x = one.model(inputs_embeds=x).last_hidden_state
    norm = torch.nn.functional.rms_norm(x, (x.shape[-1],), tensors["model.norm.weight"], config.rms_norm_eps)
    return norm @ tensors["lm_head.weight"].T


def test_what_the_form_cannot_hold_is_refused_with_a_way_out(tokenizer, tmp_path):
    with pytest.raises(UsageError, match="48 wide, and block configs hold multiples of 256"):
        export_block_configs(tiny_model(), tokenizer, tmp_path)
    with pytest.raises(UsageError, match="this is `qwen2`"):
        export_block_configs(tiny_model("qwen2"), tokenizer, tmp_path)
