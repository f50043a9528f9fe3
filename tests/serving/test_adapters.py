"""Other tools find every factor, because each is an ordinary linear layer."""

import copy
import warnings

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM

from fasc.errors import ModelError
from fasc.serving.adapters import lora_targets
from tests.conftest import logits
from tests.serving.small import small_of


@pytest.fixture(params=["factors", "shared", "pivoted", "pivoted-columns"])
def small(request, tokens):
    return small_of("llama", tokens, layouts=request.param).model


@pytest.mark.parametrize("which", ["all-linear", "named"])
@pytest.mark.filterwarnings("ignore")
def test_lora_trains_merges_and_is_saved(small, tokens, tmp_path, which):
    peft = pytest.importorskip("peft")
    targets = which if which == "all-linear" else lora_targets(small, ["q_proj", "v_proj"])
    model = peft.get_peft_model(small, peft.LoraConfig(target_modules=targets, r=2, task_type="CAUSAL_LM"))
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    descent = torch.optim.SGD(trained, lr=0.5)
    losses = []
    for _ in range(3):
        loss = model(input_ids=tokens, labels=tokens).loss
        descent.zero_grad()
        loss.backward()
        descent.step()
        losses.append(float(loss))
    assert losses[-1] < losses[0]
    adapted = logits(model.eval(), tokens)
    merged = model.merge_and_unload()
    torch.testing.assert_close(logits(merged, tokens), adapted, rtol=0, atol=1e-3)
    merged.save_pretrained(tmp_path / "merged")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    torch.testing.assert_close(logits(again, tokens), logits(merged, tokens))


def test_targets_are_layers_where_they_are_dense_and_factors_where_not(tokens):
    model = small_of("llama", tokens, layouts="shared").model
    modules = dict(model.named_modules())
    targets = lora_targets(model, "v_proj")
    assert all(isinstance(modules[name], nn.Linear) for name in targets)
    assert any(name.endswith("q_proj.down") for name in targets)  # which v_proj shares
    with pytest.raises(ModelError, match="no_such"):
        lora_targets(model, "no_such")


def test_quantising_linear_layers_changes_every_factor(small, tokens):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        smaller = torch.ao.quantization.quantize_dynamic(copy.deepcopy(small), {nn.Linear}, dtype=torch.qint8)
    assert not [name for name, module in smaller.named_modules() if isinstance(module, nn.Linear)]
    assert torch.isfinite(logits(smaller, tokens)).all()


@pytest.mark.filterwarnings("ignore")
def test_torchao_changes_every_factor(small, tokens):
    torchao = pytest.importorskip("torchao.quantization")
    torchao.quantize_(small, torchao.Int8WeightOnlyConfig())
    assert {type(module.weight) for module in small.modules() if isinstance(module, nn.Linear)} != {nn.Parameter}
    assert not any(type(m.weight) in (nn.Parameter, torch.Tensor) for m in small.modules() if isinstance(m, nn.Linear))
    assert torch.isfinite(logits(small, tokens)).all()
