"""Types of few bits in GGUF files: chosen where they cost least, as large as was asked for, and read back as they were forecast."""

import copy

import pytest
import torch
from gguf import GGMLQuantizationType as Kind
from gguf import GGUFReader
from gguf.constants import GGML_QUANT_SIZES
from transformers import AutoModelForCausalLM

import fasc
from fasc.errors import BudgetError, UnknownNameError, UsageError
from fasc.model.load import LoadedModel
from fasc.planning.options import BudgetConfig
from fasc.serving.ggml import MENU, fits, row_bytes, type_named
from fasc.serving.tensor_types import TensorTypes, TypeLosses, every_tensor_as, next_larger
from fasc.stages.export import FewerBits, export_model
from fasc.statistics.options import CalibrationConfig
from tests.conftest import CONFIGS, logits, tiny_model
from tests.serving.small import small_of


def test_larger_types_of_the_menu_take_more_bytes():
    sizes = [row_bytes(kind, 256) for kind in MENU]
    assert sizes == sorted(sizes)


@pytest.mark.parametrize(
    "width,able", [(256, set(MENU)), (96, {kind for kind in MENU if GGML_QUANT_SIZES[kind][0] == 32}), (48, set())]
)
def test_a_type_fits_where_its_block_divides_the_width(width, able):
    assert {kind for kind in MENU if fits(kind, width)} == able


def test_a_type_whose_block_does_not_divide_gives_way_to_the_next_larger():
    assert next_larger(Kind.Q4_K, 96) == Kind.IQ4_NL  # as many bits in smaller blocks
    assert next_larger(Kind.Q6_K, 96) == Kind.Q8_0
    assert TensorTypes({"a": Kind.Q3_K}).of("a", 256) == Kind.Q3_K
    assert TensorTypes({}).of("unknown", 256) == Kind.Q8_0


def test_types_are_found_by_name_and_others_refused():
    assert type_named("q4_k") == Kind.Q4_K
    with pytest.raises(UnknownNameError, match="Q4_L"):
        type_named("Q4_L")


def test_a_budget_without_moments_and_two_ways_at_once_are_refused(tokenizer, tmp_path):
    loaded = LoadedModel(tiny_model("llama"), tokenizer)
    budget = BudgetConfig(max_bytes="1MB")
    for bits, words in [
        (FewerBits(budget=budget), "no moments.*--corpus or --statistics"),
        (FewerBits("Q8_0", budget), "--type and a budget"),
        (FewerBits(budget=budget, calibration=CalibrationConfig(corpus="self")), None),
    ]:
        if words:
            with pytest.raises(UsageError, match=words):
                export_model(loaded, "gguf", tmp_path / "a.gguf", bits)
    assert not list(tmp_path.iterdir())


def test_moments_are_of_dense_models(tokens, tokenizer, tmp_path):
    small = small_of("llama", tokens, layouts="dense,channels")
    bits = FewerBits(budget=BudgetConfig(max_bytes="1MB"), calibration=CalibrationConfig(corpus="self"))
    with pytest.raises(UsageError, match="--for plain"):
        export_model(LoadedModel(small.model, tokenizer), "gguf", tmp_path / "a.gguf", bits)


class TestWithLlamaCpp:
    """What needs ggml's own code."""

    @pytest.fixture(autouse=True)
    def _there(self):
        pytest.importorskip("llama_cpp", reason="llama-cpp-python is an extra: fasc[gguf]")

    @pytest.fixture(scope="class")
    def wide(self, tokens):
        """A model whose widths 32 divides, and its moments."""
        config = copy.deepcopy(CONFIGS["llama"])
        config.hidden_size, config.intermediate_size, config.head_dim = 64, 256, 16
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config).eval()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.1 * torch.randn_like(parameter))
        return model, fasc.collect(model, corpus=tokens, sequences=len(tokens), sequence_length=tokens.shape[1])

    def test_one_type_for_all_is_in_every_matrix_that_can_have_it(self, wide, tokenizer, tmp_path):
        model, _ = wide
        export_model(LoadedModel(model, tokenizer), "gguf", tmp_path / "a.gguf", FewerBits("Q6_K"))
        kinds = {tensor.name: tensor.tensor_type for tensor in GGUFReader(tmp_path / "a.gguf").tensors}
        assert kinds["blk.0.ffn_down.weight"] == Kind.Q6_K
        assert kinds["blk.0.attn_q.weight"] == Kind.Q8_0  # 64 inputs are no block of 256
        assert kinds["blk.0.attn_norm.weight"] == Kind.F32

    @pytest.mark.parametrize("share", [0.9, 0.75, 0.6])
    def test_the_file_is_within_the_budget_and_uses_it(self, wide, tokenizer, tmp_path, share):
        model, statistics = wide
        export_model(LoadedModel(model, tokenizer), "gguf", tmp_path / "q8.gguf", FewerBits("Q8_0"))
        whole = (tmp_path / "q8.gguf").stat().st_size
        header = 20_000  # room for names and sizes
        limit = int((whole - header) * share) + header
        bits = FewerBits(budget=BudgetConfig(max_bytes=limit), statistics=statistics)
        export_model(LoadedModel(model, tokenizer), "gguf", tmp_path / "a.gguf", bits)
        assert (tmp_path / "a.gguf").stat().st_size <= limit
        with pytest.raises(BudgetError):
            export_model(
                LoadedModel(model, tokenizer),
                "gguf",
                tmp_path / "b.gguf",
                FewerBits(budget=BudgetConfig(max_bytes=3_000), statistics=statistics),
            )
        assert not (tmp_path / "b.gguf").exists()

    def test_more_bytes_are_forecast_to_lose_less(self, wide):
        model, statistics = wide
        full = every_tensor_as(model, Kind.Q8_0)
        most = sum(
            row_bytes(Kind.Q8_0, t.shape[1]) * t.shape[0]
            for name, t in model.state_dict().items()
            if t.dim() == 2 and name in full.kinds
        )
        known = TypeLosses.of(model, statistics)
        losses = [known.choose(max_bytes=share * most).predicted_loss for share in (0.6, 0.7, 0.8, 1.0)]
        assert losses == sorted(losses, reverse=True)
        assert losses[0] > losses[-1] > 0

    def test_the_forecast_of_a_layer_is_the_definition(self, wide):
        """½ Σ_o E[h_o²] e_oᵀ E[x xᵀ] e_o, entry by entry."""
        from fasc.serving.ggml import rounded, unrounded
        from fasc.serving.tensor_types import _of_blocks

        model, statistics = wide
        for one in _of_blocks(model, statistics):
            if not one.name.endswith("down_proj.weight"):
                continue
            layer = one.name.removesuffix(".weight")
            group = statistics.group(layer)
            mean = group.input.mean.double()
            second = group.input.matrix.double() + torch.outer(mean, mean)
            felt = group.unit(layer).require_extra("output_scale").double()
            weight = model.get_parameter(one.name).detach()
            for option in one.options:
                error = (unrounded(rounded(weight, option.kind, second.diagonal()), option.kind) - weight).double()
                slow = sum(felt[o] * (error[o] @ second @ error[o]) for o in range(len(error))) / 2
                assert option.loss == pytest.approx(float(slow), rel=1e-3)

    def test_what_is_written_is_what_was_rounded(self, wide, tokenizer, tmp_path):
        from fasc.serving.ggml import unrounded

        model, statistics = wide
        bits = FewerBits("Q5_1", statistics=statistics)
        export_model(LoadedModel(model, tokenizer), "gguf", tmp_path / "a.gguf", bits)
        for tensor in GGUFReader(tmp_path / "a.gguf").tensors:
            if tensor.name == "blk.1.ffn_down.weight":
                again = unrounded(tensor.data, tensor.tensor_type)
                weight = model.model.layers[1].mlp.down_proj.weight.detach()
                assert (again - weight).abs().max() < weight.abs().max() / 16

    def test_llama_cpp_runs_the_file(self, wide, tokens, tmp_path, merging):
        import llama_cpp

        model, statistics = wide
        bits = FewerBits("Q8_0", statistics=statistics)
        export_model(LoadedModel(model, merging), "gguf", tmp_path / "a.gguf", bits)
        engine = llama_cpp.Llama(
            str(tmp_path / "a.gguf"), n_ctx=64, logits_all=True, verbose=False, n_threads=1, type_k=0, type_v=0
        )
        engine.eval(tokens[0].tolist())
        theirs = torch.tensor(engine.scores[: tokens.shape[1]])
        mine = logits(model, tokens[:1])[0]
        assert (theirs - mine).abs().max() < 0.3 * mine.std()
        engine.close()
