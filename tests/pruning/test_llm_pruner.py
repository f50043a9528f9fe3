"""The importance that LLM-Pruner goes by."""

import torch

from fasc.pruning.llm_pruner import taylor_importance
from tests.conftest import tiny_model
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
