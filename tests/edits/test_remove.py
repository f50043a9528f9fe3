"""Removed heads and channels leave an ordinary, smaller model that computes what the dense one does without them."""

import pytest
import torch
from transformers import AutoModelForCausalLM

from fasc.edits import read_edit
from fasc.errors import ModelError
from fasc.model.coupling import find_channels, find_heads
from fasc.model.groups import find_groups
from fasc.model.options import LayersConfig
from tests.conftest import tiny_model
from tests.pruning.pruned import pruned

SEPARATE = ("gemma2", "gemma3", "llama", "mistral", "qwen2", "qwen3")
"""Architectures with separate q, k, v projections."""


@pytest.mark.parametrize("architecture", SEPARATE)
def test_a_narrow_model_is_the_dense_one_without_the_removed_parts(architecture, tokens, tmp_path):
    masked, model = tiny_model(architecture), tiny_model(architecture)
    statistics, _, _ = pruned(model, tokens, "llm-pruner", param_fraction=0.6)
    groups = find_groups(masked, LayersConfig())
    removed = 0
    with torch.no_grad():
        for one in (*find_heads(masked, groups), *find_channels(masked, groups)):
            consumer = masked.get_submodule(one.consumer.name)
            size = one.consumer.d_in // one.parts
            score = statistics.groups[one.consumer.name].extras["taylor"].view(one.parts, size).sum(1)
            keep = model.get_submodule(one.consumer.name).in_features // size
            for part in score.argsort(descending=True)[keep:].tolist():
                consumer.weight[:, part * size : (part + 1) * size] = 0
                removed += 1
        expected = masked(input_ids=tokens).logits
        assert removed
        torch.testing.assert_close(model(input_ids=tokens).logits, expected, rtol=1e-4, atol=1e-4)
        model.save_pretrained(tmp_path / "narrow")
        loaded, info = AutoModelForCausalLM.from_pretrained(tmp_path / "narrow", output_loading_info=True)
        assert not info["missing_keys"]
        assert not info["mismatched_keys"]
        assert type(loaded) is type(model)
        torch.testing.assert_close(loaded(input_ids=tokens).logits, expected, rtol=1e-4, atol=1e-4)


def test_a_removal_that_does_not_fit_is_refused_before_anything_is_changed(tokens):
    model = tiny_model()
    _, made, _ = pruned(tiny_model(), tokens, "llm-pruner", param_fraction=0.6)
    raw = next(edit for edit in made.edits if edit.part == "channels").to_dict()
    for change, words in (
        ({"count": 49}, "cannot keep 49 of 48"),
        ({"parts": 47, "count": 3}, "cannot keep 3 of 47"),
        ({"consumer": raw["producers"][0]}, "cannot keep|is listed twice"),
    ):
        with pytest.raises(ModelError, match=words):
            made.with_edits([read_edit(raw | change, "plan")]).check(model)
    with pytest.raises(ModelError, match="an earlier edit has replaced it"):
        made.with_edits([*made.edits, made.edits[0]]).check(model)
