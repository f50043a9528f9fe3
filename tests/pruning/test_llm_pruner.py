"""The importance that LLM-Pruner goes by."""

import pytest
import torch
from transformers import AutoModelForCausalLM

from fasc.model.experts import is_fused
from fasc.pruning.llm_pruner import taylor_importance
from fasc.stages.calibrate import collect
from fasc.stages.compress import compress
from fasc.stages.plan import plan
from tests.conftest import logits, tiny_model
from tests.pruning.pruned import statistics_of


def test_importance_is_the_first_order_change_of_the_loss_by_a_column(tokens):
    model = tiny_model()
    statistics = statistics_of(model, tokens, "llm-pruner")
    name = "model.layers.1.mlp.down_proj"
    weight = model.get_submodule(name).weight
    total = torch.zeros(weight.shape[1], dtype=torch.float64)
    for sequence in tokens:
        logits = model(input_ids=sequence[None]).logits[0, :-1]
        loss = torch.nn.functional.cross_entropy(logits, sequence[1:], reduction="sum")
        (gradient,) = torch.autograd.grad(loss, weight)
        total += (weight * gradient).sum(0).abs().double().detach()
    by_column = taylor_importance(statistics.group(name), weight.shape[1])
    torch.testing.assert_close(by_column.double(), total / len(tokens), rtol=1e-3, atol=1e-5)


def test_a_head_is_as_important_as_its_columns_together(tokens):
    group = statistics_of(tiny_model(), tokens, "llm-pruner").group("model.layers.0.self_attn.o_proj")
    columns = taylor_importance(group, 32)
    torch.testing.assert_close(taylor_importance(group, 2), columns.view(2, 16).sum(1))


@pytest.mark.parametrize("mixture", ["mixtral", "qwen3_moe"], indirect=True)
def test_a_pruned_mixture_is_an_ordinary_one_with_narrower_experts(mixture, tokens, tmp_path):
    statistics = collect(mixture, corpus=tokens, methods="llm-pruner", sequences=len(tokens), sequence_length=tokens.shape[1])
    whole = mixture.num_parameters()
    made = plan(mixture, statistics, method="llm-pruner", param_fraction=0.7, rank_multiple=1)
    half = {
        "count": mixture.get_submodule("model.layers.0.mlp.experts").down_proj.shape[-1] // 2
    }  # of grouped kernels' multiples
    made = made.with_edits([edit.model_copy(update=half if edit.part == "channels" else {}) for edit in made.edits])
    small = compress(mixture, statistics, made)
    assert small.model.num_parameters() == whole - sum(edit.saved for edit in made.edits) == made.totals["parameters"]
    assert any(is_fused(module) for module in small.model.modules())
    small.model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    assert not hasattr(again.config, "quantization_config")
    assert torch.equal(logits(again, tokens), logits(small.model, tokens))


@pytest.mark.parametrize("mixture", ["mixtral"], indirect=True)
def test_channels_that_carry_nothing_go_from_experts_without_loss(mixture, tokens):
    """Every expert's own: a third of them, at other places in each."""
    gone = torch.rand(2, 4, 48, generator=torch.Generator().manual_seed(0)).argsort(-1)[..., :16]
    with torch.no_grad():
        for block, layer in enumerate(mixture.model.layers):
            for expert in range(4):
                layer.mlp.experts.down_proj[expert, :, gone[block, expert]] = 0
    before = logits(mixture, tokens)
    statistics = collect(mixture, corpus=tokens, methods="llm-pruner", sequences=len(tokens), sequence_length=tokens.shape[1])
    made = plan(mixture, statistics, method="llm-pruner", param_fraction=0.8, rank_multiple=1)
    made = made.with_edits([edit.model_copy(update={"count": 32}) for edit in made.edits if edit.part == "channels"])
    small = compress(mixture, statistics, made)
    torch.testing.assert_close(logits(small.model, tokens), before, rtol=1e-4, atol=1e-4)
