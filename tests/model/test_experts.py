"""Experts as layers of their own: the same model, and a group for every expert."""

import pytest
import torch
from transformers import AutoModelForCausalLM

import fasc
from fasc.edits.unfuse import Unfuse
from fasc.errors import BudgetError, ModelError
from fasc.model.experts import expert_layers, fuse, is_fused
from fasc.model.groups import find_groups
from fasc.model.load import LoadedModel, model_fingerprint
from fasc.model.options import LayersConfig
from fasc.stages.compress import _recipe_of, carry_out_recipe, compress
from fasc.stages.plan import plan


def test_a_model_with_expert_layers_computes_the_same_and_is_left_as_it_was(mixture, tokens):
    modules, weights = [name for name, _ in mixture.named_modules()], model_fingerprint(mixture)
    with torch.no_grad():
        expected = mixture(input_ids=tokens).logits
        with expert_layers(mixture) as holders:
            assert len(holders) == 2
            assert model_fingerprint(mixture) == weights
            torch.testing.assert_close(mixture(input_ids=tokens).logits, expected, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(mixture(input_ids=tokens).logits, expected)
    assert [name for name, _ in mixture.named_modules()] == modules


def test_a_mixture_is_left_as_it_was_when_the_body_raises(mixture):
    modules = [name for name, _ in mixture.named_modules()]
    with pytest.raises(KeyboardInterrupt), expert_layers(mixture):
        raise KeyboardInterrupt
    assert [name for name, _ in mixture.named_modules()] == modules


def test_a_dense_model_has_none(model):
    with expert_layers(model) as holders:
        assert holders == []


def test_every_expert_is_a_group_even_if_a_short_text_misses_it(mixture):
    with expert_layers(mixture):
        groups = find_groups(mixture, LayersConfig())
    experts = {(group.block, group.layers[0].expert, group.kind) for group in groups if group.layers[0].expert is not None}
    assert experts == {(block, expert, kind) for block in (0, 1) for expert in range(4) for kind in ("gate_up_proj", "down_proj")}


def test_experts_are_compressed_saved_and_loaded(mixture, tokens, tmp_path):
    statistics = fasc.collect(mixture, corpus=tokens, sequences=len(tokens), sequence_length=tokens.shape[1])
    whole = mixture.num_parameters()
    made = plan(mixture, statistics, param_fraction=0.6, damping=1e-2)
    assert made.edits[0].edit == "unfuse"
    assert any("experts" in name for edit in made.edits[1:] for name in edit.touches)
    assert "experts" not in (made.outside or {})
    assert made.dense_parameters + sum((made.outside or {}).values()) == whole
    small = compress(mixture, statistics, made)
    left = sum(tensor.numel() for tensor in small.model.state_dict().values() if tensor.numel() > 1)  # orders as well
    assert left == whole - sum(edit.saved for edit in made.edits)
    small.save(tmp_path / "small")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "small").eval()
    with torch.no_grad():
        expected = small.model(input_ids=tokens).logits
        assert torch.equal(again(input_ids=tokens).logits, expected)
        ways = [one.generate(tokens[:2], max_new_tokens=4, do_sample=False) for one in (small.model, again)]
    assert torch.equal(*ways)


def test_unfused_experts_compute_what_the_fused_ones_do(mixture, tokens):
    with torch.no_grad():
        expected = mixture(input_ids=tokens).logits
        Unfuse.of(mixture).apply(mixture, None)
        torch.testing.assert_close(mixture(input_ids=tokens).logits, expected, rtol=1e-4, atol=1e-4)
    assert not any(is_fused(module) for module in mixture.modules())


def test_experts_that_are_excluded_stay_fused(mixture, tokens):
    sizes = {"sequences": len(tokens), "sequence_length": tokens.shape[1]}
    statistics = fasc.collect(mixture, corpus=tokens, exclude=["*.experts.*"], **sizes)
    made = plan(mixture, statistics, rank_fraction=0.5, damping=1e-2)
    assert made.edits
    assert not any("experts" in name for edit in made.edits for name in edit.touches)
    assert made.outside["experts"] > 0
    compress(mixture, statistics, made)
    assert any(is_fused(module) for module in mixture.modules())


def test_a_plan_for_other_experts_is_refused(mixture, model):
    edit = Unfuse.of(mixture)
    smaller = edit.model_copy(
        update={"holders": tuple(one.model_copy(update={"channels": one.channels + 1}) for one in edit.holders)}
    )
    for changed, other in ((smaller, mixture), (edit, model)):
        with pytest.raises(ModelError, match=r"no such experts|no attribute|another model"):
            changed.apply(other, None)
    assert Unfuse.of(model) is None


def test_fusing_is_the_inverse_of_unfusing(mixture):
    before = {name: tensor.clone() for name, tensor in mixture.state_dict().items()}
    edit = Unfuse.of(mixture)
    edit.apply(mixture, None)
    for holder in edit.holders:
        fuse(mixture.get_submodule(holder.name))
    after = mixture.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(tensor, after[name]) for name, tensor in before.items())


def test_merged_experts_are_an_ordinary_mixture(mixture, tokens, tmp_path):
    """Without channels and with its biases folded, the merged model is as near as the fold."""
    statistics = fasc.collect(mixture, corpus=tokens, sequences=len(tokens), sequence_length=tokens.shape[1])
    made = plan(mixture, statistics, param_fraction=0.9, damping=1e-2, layouts="dense,merged,factors")
    small = carry_out_recipe(LoadedModel(mixture, None), statistics, _recipe_of(mixture, statistics, made), made, merged=True)
    small.save(tmp_path / "merged")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "merged").eval()
    assert any(is_fused(module) for module in again.modules())
    assert not hasattr(again.config, "quantization_config")
    with torch.no_grad():
        torch.testing.assert_close(again(input_ids=tokens).logits, small.model(input_ids=tokens).logits, rtol=1e-4, atol=1e-4)


def test_one_width_is_not_made_for_experts(mixture, tokens):
    statistics = fasc.collect(mixture, corpus=tokens, sequences=len(tokens), sequence_length=tokens.shape[1])
    with pytest.raises(BudgetError, match=r"experts.*--exclude|needs an MLP"):
        plan(mixture, statistics, param_fraction=0.8, layouts="dense,channels", allocation="uniform")
