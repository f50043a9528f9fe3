"""An expert's mean in its place: the forecast is what its outputs vary by, felt by the loss; and the allocation ranks by it."""

import pytest
import torch
from transformers import AutoModelForCausalLM

import fasc
from fasc.compression.compress import carried_out
from fasc.compression.merge import merge
from fasc.edits.skip import Skip
from fasc.edits.unfuse import Unfuse
from fasc.errors import BudgetError, UsageError
from fasc.model.experts import expert_layers, find_experts
from fasc.model.groups import find_groups
from fasc.model.options import LayersConfig
from fasc.planning.plan import Plan
from fasc.stages.compress import compress
from fasc.stages.plan import plan
from tests.conftest import logits

FIRST = "model.layers.0.mlp.experts"


def measured(mixture, tokens):
    return fasc.collect(mixture, corpus=tokens, sequences=len(tokens), sequence_length=tokens.shape[1])


def planned(mixture, statistics, **options):
    given = {"layouts": "dense,experts", "damping": 0.0, "overhead": 0} | options
    return plan(mixture, statistics, **given)


def fraction(statistics, count):
    """At which so many experts' means stand in their places."""
    dense = sum(group.group.parameters for group in statistics.groups.values())
    one = sum(group.group.parameters for name, group in statistics.groups.items() if name.startswith(f"{FIRST}.0."))
    return 1 - (count * (one - 32) - 0.5) / dense


def test_all_experts_but_those_of_the_last_block_may_be_replaced(mixture):
    with expert_layers(mixture):
        found = find_experts(mixture, find_groups(mixture, LayersConfig()))
    assert [one.name for one in found] == [f"{FIRST}.{index}" for index in range(4)]
    assert {one.kind for one in found} == {"mlp"}


def test_the_forecast_of_a_mean_is_half_the_variance_of_the_outputs_as_the_loss_feels_it(mixture, tokens):
    """``π ½ tr(Cov(y) Σ_hh)`` of an expert's outputs, formed from every token's output and gradient."""
    statistics = measured(mixture, tokens)
    made = planned(mixture, statistics, param_fraction=fraction(statistics, 4))
    edits = {edit.sublayer: edit for edit in made.edits if isinstance(edit, Skip)}
    assert len(edits) == 4
    assert made.edits[0] == Unfuse.of(mixture)
    for index, edit in enumerate(edits[f"{FIRST}.{index}"] for index in range(4)):
        group = statistics.groups[edit.last.name]
        outputs = []
        with expert_layers(mixture):
            module = mixture.get_submodule(edit.last.name)
            handle = module.register_forward_hook(lambda _m, _a, output, to=outputs: to.append(output.detach().double()))
            logits(mixture, tokens)
            handle.remove()
            weight = module.weight.detach().double()
        y = torch.cat(outputs)
        assert len(y) == group.tokens
        moment = group.unit(edit.last.name).require_gradient()
        covariance = torch.cov(y.mT, correction=0)
        felt = moment.covariance.matrix.double()
        if moment.side == "input":
            inverse = torch.linalg.pinv(weight)
            felt = inverse.mT @ felt @ inverse
        loss = 0.5 * len(y) / tokens.numel() * float((covariance * felt).sum())
        assert edit.predicted_loss == pytest.approx(loss, rel=2e-3), index


def test_an_expert_that_says_the_same_to_every_token_goes_first_and_without_loss(mixture, tokens, tmp_path):
    with torch.no_grad():
        mixture.get_submodule(FIRST).down_proj[2] *= 1e-4
    before = logits(mixture, tokens)
    statistics = measured(mixture, tokens)
    whole = mixture.num_parameters()
    made = planned(mixture, statistics, param_fraction=fraction(statistics, 1))
    skips = [edit for edit in made.edits if isinstance(edit, Skip)]
    assert [edit.sublayer for edit in skips] == [f"{FIRST}.2"]
    assert 0 < made.predicted_loss < 1e-6
    small = compress(mixture, statistics, made)
    torch.testing.assert_close(logits(small.model, tokens), before, rtol=1e-2, atol=1e-2)
    assert small.model.num_parameters() == whole - skips[0].saved
    small.save(tmp_path / "small")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "small").eval()
    assert torch.equal(logits(again, tokens), logits(small.model, tokens))


def test_experts_go_in_the_order_of_what_they_are_forecast_to_lose(mixture, tokens):
    statistics = measured(mixture, tokens)
    every = {
        edit.sublayer: edit.predicted_loss
        for edit in planned(mixture, statistics, param_fraction=fraction(statistics, 4)).edits[1:]
    }
    order = sorted(every, key=lambda name: every[name])
    for count in (1, 2, 3):
        made = planned(mixture, statistics, param_fraction=fraction(statistics, count))
        gone = [edit.sublayer for edit in made.edits if isinstance(edit, Skip)]
        assert sorted(gone) == sorted(order[:count])


def test_the_mean_of_what_an_expert_said_stays_in_its_place(mixture, tokens):
    statistics = measured(mixture, tokens)
    outputs = []
    with expert_layers(mixture):
        name = f"{FIRST}.1.down_proj"
        handle = mixture.get_submodule(name).register_forward_hook(lambda _m, _a, output: outputs.append(output.detach()))
        logits(mixture, tokens)
        handle.remove()
    made = planned(mixture, statistics, param_fraction=fraction(statistics, 4))
    compress(mixture, statistics, made)
    torch.testing.assert_close(mixture.get_submodule(f"{FIRST}.1").mean, torch.cat(outputs).mean(0), rtol=1e-3, atol=1e-4)


def test_a_model_without_experts_is_refused(model, tokens):
    statistics = measured(model, tokens)
    with pytest.raises(BudgetError, match="LlamaForCausalLM has no expert that a mean could stand for") as raised:
        planned(model, statistics, param_fraction=0.9, layouts="dense,experts,factors")
    assert raised.value.hint.startswith("leave `experts` out of --layouts")


def test_experts_that_were_not_chosen_are_none(mixture, tokens):
    statistics = measured(mixture, tokens)
    with pytest.raises(BudgetError, match="no expert that a mean could stand for"):
        planned(mixture, statistics, param_fraction=0.9, layouts="dense,experts,factors", exclude=("*.experts.*",))


def test_a_plan_with_means_is_the_same_after_a_file(mixture, tokens, tmp_path):
    made = planned(mixture, measured(mixture, tokens), param_fraction=0.7, layouts="dense,experts,factors,channels")
    again = Plan.load(made.save(tmp_path / "plan.json"))
    assert again.edits == made.edits
    assert again.totals == made.totals


def test_a_mean_is_counted_and_costs_as_many_numbers_as_the_expert_has_outputs(mixture, tokens):
    statistics = measured(mixture, tokens)
    made = planned(mixture, statistics, param_fraction=fraction(statistics, 2))
    gone = [edit for edit in made.edits if isinstance(edit, Skip)]
    whole = sum(layer.parameters for layer in made.layers)
    held = sum(one.layer.parameters for edit in gone for one in edit.layers)
    assert len(gone) == 2
    assert made.parameters == whole - held + 2 * mixture.config.hidden_size


def test_experts_with_a_mean_among_them_cannot_be_fused_again_and_that_is_said(mixture, tokens):
    statistics = measured(mixture, tokens)
    made = planned(mixture, statistics, param_fraction=fraction(statistics, 1))
    left = carried_out(mixture, statistics, made)[1]
    with pytest.raises(UsageError, match="edits that no ordinary checkpoint can say"):
        merge(mixture, left, 0.0)


def test_they_are_refused_before_anything_is_measured(model_folder, text_file, tmp_path, capsys):
    with pytest.raises(BudgetError, match="LlamaForCausalLM has no expert"):
        fasc.compress_checkpoint(
            model_folder, text_file, out=tmp_path / "small", param_fraction=0.9, layouts="dense,experts", sequence_length=16
        )
    assert "measuring" not in capsys.readouterr().err
    assert not (tmp_path / "small").exists()
