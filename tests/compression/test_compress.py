"""A plan carried out: exact at full rank, the mean kept at every rank, and nothing but what the plan says."""

import json
import weakref

import pytest
import torch

import fasc.forecast.channels
from fasc.compression.compress import carry_out
from fasc.compression.options import RecoveryConfig
from fasc.compression.recover import recover
from fasc.edits.structure import edited_layers, parsed, structure_of
from fasc.errors import ModelError, NonFiniteError, StatisticsError
from fasc.linalg.elimination import refit
from fasc.methods import METHODS
from fasc.planning.plan import Plan
from fasc.stages.plan import plan
from fasc.statistics.collect import collect_moments
from tests.conftest import logits, tiny_model

FULL = {"svd", "fasc-eq6", "grad-weighted", "fisher-diag"}
"""Methods that have ``d_in`` directions, whatever the layer's rank."""


def at_full_rank(made):
    """The plan with every unit at every direction that its method has: the strictest test of the arithmetic."""
    edits = []
    for edit in made.edits:
        rank = edit.d_in if edit.method in FULL else min(edit.d_in, sum(edit.d_outs))
        layout = "factors" if len(edit.layers) == 1 else "shared"
        edits.append(edit.model_copy(update={"rank": rank, "layout": layout}))
    return made.with_edits(edits)


def compressed(measured, architecture="llama", **options):
    model = tiny_model(architecture)
    return model, carry_out(model, measured(architecture), plan(model, measured(architecture), **options))


@pytest.mark.parametrize("method", sorted(METHODS))
def test_at_full_rank_the_logits_are_the_dense_models(measured, tokens, method, architecture):
    model = tiny_model(architecture)
    dense = logits(model, tokens)
    made = at_full_rank(plan(model, method=method, rank_fraction=0.5))
    carry_out(model, measured(architecture), made)
    assert len(edited_layers(model)) == {"gpt2": 8, "phi3": 8}.get(architecture, 14)
    assert (logits(model, tokens) - dense).abs().max() < 1e-3


def test_the_whole_rank_is_no_edit(measured, tokens):
    model, made = compressed(measured, rank_fraction=1)
    assert made.edits == ()
    assert torch.equal(logits(model, tokens), logits(tiny_model(), tokens))
    assert made.totals["param_fraction"] == 1
    assert made.predicted_loss == 0
    assert structure_of(model) is None


@pytest.mark.parametrize("method", sorted(METHODS))
def test_the_layers_outputs_keep_their_mean(measured, tokens, method):
    """The point of the bias: with one layer compressed, its mean output on the calibration text is unchanged."""
    name = "model.layers.1.mlp.down_proj"
    dense, model = tiny_model(), tiny_model()
    made = plan(model, method=method, rank_fraction=0.25)
    carry_out(model, measured(), made.with_edits([edit for edit in made.edits if edit.layers == (name,)]))
    assert edited_layers(model) == [name]
    outputs = []
    for one in (dense, model):
        one.get_submodule(name).register_forward_hook(lambda _m, _a, y: outputs.append(y))
        logits(one, tokens)
    torch.testing.assert_close(outputs[1].mean((0, 1)), outputs[0].mean((0, 1)), rtol=0, atol=1e-4)
    assert (outputs[1] - outputs[0]).abs().max() > 1e-2


def test_the_forecast_grows_as_ranks_fall_and_is_least_of_the_method_that_minimises_it(measured):
    losses = [compressed(measured, rank_fraction=fraction)[1].predicted_loss for fraction in (0.25, 0.5, 0.75)]
    assert losses[0] > losses[1] > losses[2] > 0
    for method in ("svd", "weight-svd", "fisher-diag"):
        assert compressed(measured, method=method, rank_fraction=0.5)[1].predicted_loss > losses[1]


def test_the_forecast_of_what_is_left_of_an_mlp_is_that_of_its_decomposition(measured, architecture):
    model = tiny_model(architecture)
    made = plan(model, measured(architecture), param_fraction=0.5, damping=1e-2)
    assert {edit.edit for edit in made.edits} == {"narrow", "factor"}
    done = carry_out(model, measured(architecture), made)
    assert done.predicted_loss == pytest.approx(made.predicted_loss, rel=2e-2)


def test_a_bfloat16_model_is_compressed_in_its_own_precision(measured, tokens):
    model = tiny_model(dtype=torch.bfloat16)
    statistics = collect_moments(model, tokens, METHODS["fasc"].needs)
    carry_out(model, statistics, plan(model, statistics, rank_fraction=0.5))
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    exact = logits(compressed(measured, rank_fraction=0.5)[0], tokens)
    assert float((logits(model, tokens).float() - exact).norm() / exact.norm()) < 0.1


def test_what_was_carried_out_is_written_into_the_model_and_read_back(measured):
    model, made = compressed(measured, param_fraction=0.5, damping=1e-2)
    assert parsed(structure_of(model)) == list(made.edits)
    assert Plan.from_dict(json.loads(json.dumps(made.to_dict()))) == made
    assert all(edit.facts is not None for edit in made.edits if edit.edit == "factor")


def test_carrying_out_twice_gives_the_same_bits(measured):
    (one, _), (other, _) = (compressed(measured, param_fraction=0.5, damping=1e-2) for _ in range(2))
    states = one.state_dict(), other.state_dict()
    assert states[0].keys() == states[1].keys()
    assert all(torch.equal(states[0][key], states[1][key]) for key in states[0])


def test_trainable_flags_and_modes_stay(measured):
    model = tiny_model().train()
    model.requires_grad_(False)
    carry_out(model, measured(), plan(model, measured(), param_fraction=0.5, damping=1e-2))
    assert model.training
    assert all(module.training for module in model.modules())
    assert not any(parameter.requires_grad for parameter in model.parameters())


def test_statistics_of_other_layers_are_refused_before_anything_is_changed(measured, tokens):
    from dataclasses import replace

    model = tiny_model()
    made = plan(model, measured(), rank_fraction=0.5)
    groups = {name: group for name, group in measured().groups.items() if "layers.1" not in name}
    with pytest.raises(StatisticsError, match="no group"):
        carry_out(model, replace(measured(), groups=groups), made)
    assert torch.equal(logits(model, tokens), logits(tiny_model(), tokens))


def test_a_compressed_model_is_not_compressed_again(measured):
    model, made = compressed(measured, rank_fraction=0.5)
    with pytest.raises(ModelError, match="compressed already"):
        carry_out(model, measured(), made)


def test_a_weight_that_its_precision_cannot_hold_is_refused_by_name(tokens):
    """The dense weight is finite in float16, and its factor is not."""
    model, name = tiny_model(), "model.layers.0.mlp.down_proj"
    with torch.no_grad():
        model.get_submodule(name).weight.add_(6e4)
    statistics = collect_moments(model, tokens, METHODS["whitened"].needs)
    made = plan(model, statistics, method="whitened", rank_fraction=0.25, layouts=("factors",))
    model.half()
    assert all(parameter.isfinite().all() for parameter in model.parameters())
    with pytest.raises(NonFiniteError, match=rf"`{name}\.down\.weight`"):
        carry_out(model, statistics, made)


@pytest.mark.parametrize("propagate", [False, True])
def test_the_estimates_of_only_one_mlp_are_in_memory(tokens, monkeypatch, propagate):
    model = tiny_model(layers=4)
    statistics = collect_moments(model, tokens, METHODS["fasc"].needs_in(("group", "layer")))
    made = plan(model, statistics, param_fraction=0.5)
    estimates = []

    def watched(*given):
        assert all(estimate() is None for estimate in estimates)
        estimate = refit(*given)
        estimates.append(weakref.ref(estimate))
        return estimate

    monkeypatch.setattr(fasc.forecast.channels, "refit", watched)
    carry_out(model, statistics, made, propagate=propagate)
    assert len(estimates) == sum(edit.edit == "narrow" for edit in made.edits) >= 2


def test_recovery_trains_narrower_layers_too(measured):
    model, dense = tiny_model(), tiny_model()
    made = plan(model, measured(), param_fraction=0.85, damping=1e-2, layouts=("dense", "channels"))
    carry_out(model, measured(), made)
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    text = torch.randint(3, 128, (64, 20), generator=torch.Generator().manual_seed(5))
    recover(model, dense, text, RecoveryConfig(batch_tokens=80, learning_rate=1e-3))
    changed = {name for name, parameter in model.named_parameters() if not torch.equal(parameter, before[name])}
    assert changed == {name for name in before if name.rpartition(".")[0] in edited_layers(model)}


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_a_gpu_compresses_as_the_processor_does(measured, tokens):
    here, made = compressed(measured, param_fraction=0.6, damping=1e-2)
    model = tiny_model().cuda()
    there = carry_out(model, measured(), plan(model, measured(), param_fraction=0.6, damping=1e-2))
    assert [edit.touches for edit in there.edits] == [edit.touches for edit in made.edits]
    assert {parameter.device.type for parameter in model.parameters()} == {"cuda"}
    expected = logits(here, tokens)
    assert float((logits(model, tokens.cuda()).cpu() - expected).norm() / expected.norm()) < 1e-2
