"""Rounded checkpoints for transformers and vLLM: what is written is what compressed-tensors reads."""

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, CompressedTensorsConfig

from fasc.compression.compress import carry_out
from fasc.errors import UsageError
from fasc.planning.needs import needs_for
from fasc.planning.options import MethodConfig
from fasc.serving.checkpoint import CheckpointNotes
from fasc.serving.pack_quantized import save_pack_quantized, words
from fasc.serving.quantizer import attach
from fasc.stages.plan import plan
from fasc.statistics.collect import collect_moments
from fasc.storage import read_json
from tests.conftest import tiny_model

NOTES = CheckpointNotes({}, {}, {}, "")


def rounded_model(tokens, bits=(4, 8), **options):
    model = tiny_model(dtype=torch.float32)
    statistics = collect_moments(model, tokens, needs_for(MethodConfig(bits=(4,)), None))
    wanted = {"layouts": ("dense",), "bits_group": 16, "max_bytes": 45_000} | options
    made = plan(model, statistics, bits=bits, **wanted)
    carry_out(model, statistics, made)
    attach(model)
    return model


@pytest.mark.parametrize("bits", range(1, 9))
def test_words_hold_each_code_where_it_begins(bits):
    codes = torch.randint(2**bits, (3, 37), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    packed = words(codes, bits)
    assert packed.shape == (3, -(-37 * bits // 32))
    for row, values in zip(packed, codes, strict=True):
        number = sum((int(word) % 2**32) << (32 * index) for index, word in enumerate(row))
        assert [(number >> (bits * i)) % 2**bits for i in range(37)] == values.tolist()


def test_every_number_of_bits_is_a_group_of_the_config_and_the_model_is_as_before(tokens, tokenizer, tmp_path):
    model = rounded_model(tokens)
    with torch.no_grad():
        before = model(tokens[:2]).logits
    save_pack_quantized(model, tokenizer, tmp_path / "out", NOTES)
    with torch.no_grad():
        assert torch.equal(model(tokens[:2]).logits, before)
    assert model.config.quantization_config.quant_method == "fasc"
    config = read_json(tmp_path / "out" / "config.json")["quantization_config"]
    groups = config["config_groups"].values()
    assert {group["weights"]["num_bits"] for group in groups} == {4, 8}
    assert sum(len(group["targets"]) for group in groups) == 14
    assert config["ignore"] == ["lm_head"]


def test_compressed_tensors_reads_the_weights_that_we_wrote(tokens, tokenizer, tmp_path):
    pytest.importorskip("compressed_tensors")
    from compressed_tensors.compressors import PackedQuantizationCompressor
    from compressed_tensors.quantization import QuantizationConfig

    model = rounded_model(tokens, bits=(3, 4, 8))
    save_pack_quantized(model, tokenizer, tmp_path / "out", NOTES)
    state = load_file(tmp_path / "out" / "model.safetensors")
    groups = QuantizationConfig.model_validate(read_json(tmp_path / "out" / "config.json")["quantization_config"]).config_groups
    for scheme in groups.values():
        for name in scheme.targets:
            own = {key.removeprefix(f"{name}."): value for key, value in state.items() if key.startswith(f"{name}.")}
            own["weight_scale"] = own["weight_scale"].float()
            read = PackedQuantizationCompressor.decompress(own, scheme)["weight"]
            torch.testing.assert_close(read, model.get_submodule(name).weight)


@pytest.mark.filterwarnings("ignore:You passed `quantization_config`")
def test_transformers_loads_one_number_of_bits_through_compressed_tensors(tokens, tokenizer, tmp_path):
    """It takes the first group of the config for all layers, and cannot leave weights with zeros packed (5.23 with 0.20)."""
    pytest.importorskip("compressed_tensors")
    model = rounded_model(tokens, bits=(4,))
    save_pack_quantized(model, tokenizer, tmp_path / "out", NOTES)
    dense = CompressedTensorsConfig(dequantize=True)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32, quantization_config=dense)
    with torch.no_grad():
        read, written = loaded(tokens[:2]).logits, model(tokens[:2]).logits
    assert (read - written).norm() < 2e-3 * written.norm()  # it multiplies codes and scales in float16


@pytest.mark.parametrize(
    "options,words_",
    [
        ({"layouts": ("dense", "channels"), "max_bytes": 39_000, "bits": (3,)}, "another kind"),
        ({"bits_group": 12}, "do not divide"),
    ],
)
def test_what_the_format_cannot_hold_is_refused_with_what_would_do(tokens, tokenizer, tmp_path, options, words_):
    model = rounded_model(tokens, **options)
    with pytest.raises(UsageError, match=words_):
        save_pack_quantized(model, tokenizer, tmp_path / "out", NOTES)
    assert not (tmp_path / "out").exists()
