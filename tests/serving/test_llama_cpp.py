"""GGUF files hold the model, its tokenizer and its chat template, and what no graph holds is refused."""

import copy

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, normalizers
from transformers import AutoModelForCausalLM, GgufConfig, PreTrainedTokenizerFast

from fasc.edits.attention import Heads, Values
from fasc.edits.skip import Skip
from fasc.errors import UsageError
from fasc.model.attention import find_attentions
from fasc.model.groups import find_groups
from fasc.model.load import LoadedModel
from fasc.model.options import LayersConfig
from fasc.model.sublayers import find_sublayers
from fasc.serving.graphs import GRAPHS, graph_for
from fasc.serving.llama_cpp import export_gguf
from fasc.stages.compress import _recipe_of, carry_out_recipe
from fasc.stages.export import export_model, usual_name
from fasc.stages.plan import plan
from tests.conftest import CONFIGS, logits, tiny_model
from tests.serving.small import small_of


def read(file):
    from gguf import GGUFReader

    return GGUFReader(file)


def again(file):
    """The model as transformers reads it back."""
    return AutoModelForCausalLM.from_pretrained(
        file.parent, gguf_file=file.name, quantization_config=GgufConfig(dequantize=True), dtype=torch.float32
    )


@pytest.mark.parametrize("architecture", ["llama", "qwen2"])  # transformers reads no size of heads back for Qwen3
def test_a_dense_model_comes_back_as_it_was(architecture, tokens, tokenizer, tmp_path):
    model, file = tiny_model(architecture), tmp_path / "dense.gguf"
    assert export_gguf(model, tokenizer, file).name == architecture
    torch.testing.assert_close(logits(again(file), tokens), logits(model, tokens), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("architecture", ["llama", "mistral", "qwen2"])
def test_a_narrower_model_says_the_width_of_every_block(architecture, tokens, tokenizer, tmp_path):
    small, file = small_of(architecture, tokens, layouts="dense,channels"), tmp_path / "small.gguf"
    assert export_gguf(small.model, tokenizer, file).name == "deci"
    written = read(file)
    widths = [block.mlp.down_proj.in_features for block in small.model.model.layers]
    assert written.fields["deci.feed_forward_length"].contents() == widths
    assert len(set(widths)) > 1
    tensors = {tensor.name: torch.tensor(tensor.data) for tensor in written.tensors}
    for number, block in enumerate(small.model.model.layers):
        torch.testing.assert_close(tensors[f"blk.{number}.ffn_down.weight"], block.mlp.down_proj.weight.detach())
        if block.mlp.down_proj.bias is not None:
            torch.testing.assert_close(tensors[f"blk.{number}.ffn_down.bias"], block.mlp.down_proj.bias.detach())


def test_merged_layers_travel_with_their_biases(tokens, tokenizer, tmp_path):
    small = small_of("llama", tokens, layouts="merged")
    assert export_gguf(small.model, tokenizer, tmp_path / "merged.gguf").name == "llama"
    names = {tensor.name for tensor in read(tmp_path / "merged.gguf").tensors}
    assert {"blk.0.attn_q.bias", "blk.1.ffn_down.bias"} <= names


def test_factors_are_refused_with_the_option_that_helps(tokens, tokenizer, tmp_path):
    small = small_of("llama", tokens, layouts="factors")
    with pytest.raises(UsageError, match=r"stored as factors.*--for llama.cpp"):
        export_gguf(small.model, tokenizer, tmp_path / "small.gguf")
    assert not list(tmp_path.iterdir())


def test_a_graph_of_one_width_refuses_others(tokens, tokenizer, tmp_path):
    small = small_of("qwen3", tokens, layouts="dense,channels")
    with pytest.raises(UsageError, match="--for plain"):
        export_gguf(small.model, tokenizer, tmp_path / "small.gguf")
    with pytest.raises(UsageError, match="no GGUF of `gpt2`"):
        export_gguf(tiny_model("gpt2"), tokenizer, tmp_path / "small.gguf")
    assert graph_for("qwen3", [8, 8], {}) is GRAPHS["qwen3"]


def test_the_tokenizer_and_the_chat_template_travel(tokenizer, tmp_path):
    tokenizer.chat_template = "{{ messages }}"
    try:
        export_gguf(tiny_model("llama"), tokenizer, tmp_path / "dense.gguf")
    finally:
        tokenizer.chat_template = None
    fields = read(tmp_path / "dense.gguf").fields
    assert fields["tokenizer.chat_template"].contents() == "{{ messages }}"
    assert fields["tokenizer.ggml.tokens"].contents()[:3] == ["<bos>", "<eos>", "<pad>"]


@pytest.mark.parametrize("architecture", ["llama", "qwen2", "qwen3", "gemma3"])
def test_one_width_for_all_blocks_is_an_ordinary_model(architecture, tokens, measured, tokenizer, tmp_path):
    model, statistics = tiny_model(architecture), measured(architecture)
    made = plan(model, statistics, param_fraction=0.8, layouts="dense,channels", allocation="uniform")
    assert len({edit.width for edit in made.edits}) == 1
    assert len(made.edits) == 2
    recipe = _recipe_of(model, statistics, made)
    small = carry_out_recipe(LoadedModel(model, None), statistics, recipe, made, merged=True)
    small.model.save_pretrained(tmp_path / "plain")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "plain")
    assert loaded.config.intermediate_size == made.edits[0].width
    assert not hasattr(loaded.config, "quantization_config")
    torch.testing.assert_close(logits(loaded, tokens), logits(small.model, tokens))
    assert export_gguf(loaded, tokenizer, tmp_path / "plain.gguf").name == GRAPHS[loaded.config.model_type].name


def with_edits(architecture, measured, wanted):
    """One head fewer in the first block, and sublayers left out."""
    model, statistics = tiny_model(architecture), measured(architecture)
    groups = find_groups(model, LayersConfig())
    for one in find_attentions(model, groups)[:1] if "heads" in wanted else []:
        statistics = Heads.of(one.coupling, 1, 1e-2).apply(model, statistics)
    for one in find_sublayers(tiny_model(architecture), groups):
        if one.kind in wanted:
            statistics = Skip.of(one).apply(model, statistics)
    return model


def test_narrower_values_are_refused_with_what_helps(measured, tokenizer, tmp_path):
    model = tiny_model()
    one = find_attentions(model, find_groups(model, LayersConfig()))[0]
    Values.of(one.coupling, one.value.name, 6, 1e-2).apply(model, measured())
    with pytest.raises(UsageError, match="leave `values` out of --layouts"):
        export_gguf(model, tokenizer, tmp_path / "small.gguf")


def test_llama_cpp_says_what_transformers_says(tokens, merging, measured, tmp_path):
    """Logits of the same tokens, from the ordinary and the narrower graph."""
    llama_cpp = pytest.importorskip("llama_cpp", reason="llama-cpp-python is an extra of the tests: fasc[serve-tests]")
    for name, model in {
        "dense": tiny_model("llama"),
        "narrow": small_of("llama", tokens, layouts="dense,channels").model,
        "qwen2": small_of("qwen2", tokens, layouts="dense,channels").model,
        "merged": small_of("llama", tokens, layouts="merged").model,
        "qwen3": tiny_model("qwen3"),
        "gemma2": tiny_model("gemma2"),
        "gemma3": tiny_model("gemma3"),
        "heads": with_edits("llama", measured, ["heads", "attention", "mlp"]),
        "skips": with_edits("mistral", measured, ["attention", "mlp"]),
        "qwen2 heads": with_edits("qwen2", measured, ["heads", "attention"]),
    }.items():
        file = tmp_path / f"{name}.gguf"
        export_model(LoadedModel(model, merging), "gguf", file)
        engine = llama_cpp.Llama(str(file), n_ctx=64, logits_all=True, verbose=False, n_threads=1, type_k=0, type_v=0)
        engine.eval(tokens[0].tolist())
        theirs = torch.tensor(engine.scores[: tokens.shape[1]])
        torch.testing.assert_close(theirs, logits(model, tokens[:1])[0], rtol=1e-3, atol=5e-3)
        assert theirs.argmax(-1).tolist() == logits(model, tokens[:1])[0].argmax(-1).tolist()
        assert engine.tokenize(b"the hat", add_bos=False) == merging("the hat").input_ids
        engine.close()


@pytest.fixture
def sentencepiece():
    """Byte pairs over characters, with bytes for what is unknown, as Llama 2, Mistral and Gemma have them."""
    pieces = ["<unk>", "<bos>", "<eos>", *(f"<0x{byte:02X}>" for byte in range(256)), *"▁theahcrs", "▁t", "he", "▁the", "at"]
    vocabulary = {piece: number for number, piece in enumerate(dict.fromkeys(pieces))}
    merges = [("▁", "t"), ("h", "e"), ("▁t", "he"), ("a", "t")]
    backend = Tokenizer(models.BPE(vocabulary, merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    special = {"bos_token": "<bos>", "eos_token": "<eos>", "unk_token": "<unk>"}
    return PreTrainedTokenizerFast(tokenizer_object=backend, **special)


def test_a_sentencepiece_tokenizer_splits_text_as_before(sentencepiece, tmp_path):
    llama_cpp = pytest.importorskip("llama_cpp", reason="llama-cpp-python is an extra of the tests: fasc[serve-tests]")
    config = copy.deepcopy(CONFIGS["llama"])
    config.vocab_size = len(sentencepiece)
    file = tmp_path / "a.gguf"
    export_gguf(AutoModelForCausalLM.from_config(config), sentencepiece, file)
    engine = llama_cpp.Llama(str(file), vocab_only=True, verbose=False)
    for text in ("the hat", "heat that  the", "a hätte", "the\nrest <eos> x"):
        assert engine.tokenize(text.encode(), add_bos=False, special=True) == sentencepiece(text).input_ids
    engine.close()


def test_a_format_that_is_not_there_is_refused():
    assert str(usual_name("gguf", "a/small")) == "small.gguf"
    with pytest.raises(Exception, match="onnx"):
        usual_name("onnx", "small")
