"""Error propagation: the closed form, the order of the blocks, and going on after a kill."""

import json
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file

from fasc.compression import propagate
from fasc.compression.compress import carry_out
from fasc.compression.propagate import propagated
from fasc.edits.structure import edited_layers
from fasc.errors import ModelError, StatisticsError, UsageError
from fasc.methods import solver
from fasc.stages.plan import plan
from fasc.statistics.accumulators import Covariance
from fasc.statistics.moments import GradientMoment, UnitStatistics
from tests import reference
from tests.conftest import kill_when, logits, tiny_model

OPTIONS = {"param_fraction": 0.6, "damping": 1e-3}


def compressed(measured, architecture="llama", *, on, **options):
    model = tiny_model(architecture)
    statistics = measured(architecture)
    return model, carry_out(model, statistics, plan(model, statistics, **OPTIONS | options), propagate=on)


def root(matrix, power):
    values, vectors = torch.linalg.eigh(matrix)
    return vectors @ torch.diag(values**power) @ vectors.mT


@pytest.mark.parametrize("side", ["input", "output"])
def test_the_substitution_is_the_closed_form(side):
    """W' = M^-½ [M^½ W Σ_xx' Σ_x'x'^-½]_k Σ_x'x'^-½, by symmetric roots and an SVD."""
    g = torch.Generator().manual_seed(0)
    n, d_in, d_out = 5000, 9, 12
    x = torch.randn(n, d_in, generator=g, dtype=torch.float64) @ torch.randn(d_in, d_in, generator=g, dtype=torch.float64)
    y = x + 0.5 * torch.randn(n, d_in, generator=g, dtype=torch.float64) + 1.0
    h = torch.randn(n, d_out, generator=g, dtype=torch.float64) @ torch.randn(d_out, d_out, generator=g, dtype=torch.float64)
    weight = torch.randn(d_out, d_in, generator=g, dtype=torch.float64)
    xy, yy, hh = reference.covariance(x, y), reference.covariance(y), reference.covariance(h)
    gradients = h @ weight if side == "input" else h
    moment = GradientMoment(side, Covariance(gradients.mean(0), reference.covariance(gradients)))
    unit = UnitStatistics("unit", n, Covariance(x.mean(0), reference.covariance(x)), moment)
    fitted, changed = propagated(weight, unit, xy @ torch.linalg.inv(yy), Covariance(y.mean(0), yy))
    full = solver("fasc", {"damping": 0.0}).decompose(fitted, changed)
    u, s, vh = torch.linalg.svd(root(hh, 0.5) @ weight @ xy @ root(yy, -0.5), full_matrices=False)
    for rank in (2, 5):
        expected = root(hh, -0.5) @ (u[:, :rank] * s[:rank]) @ vh[:rank] @ root(yy, -0.5)
        factors = full.truncate(rank, y.mean(0), weight @ x.mean(0))
        torch.testing.assert_close(factors.dense(), expected, rtol=0, atol=1e-6)
        outputs = y @ factors.dense().mT + factors.offset
        torch.testing.assert_close(outputs.mean(0), (x @ weight.mT).mean(0), rtol=0, atol=1e-8)


def test_nothing_changes_where_inputs_do_not(measured):
    """With x' = x the first group of the model gets what it gets without propagation; the last one does not."""
    (plain, made), (changed, _) = (compressed(measured, on=on, allocation="uniform") for on in (False, True))
    first, last = made.edits[0].layers[0], made.edits[-1].layers[0]
    assert first.startswith("model.layers.0.self_attn.q")
    for name, same in ((first, True), (last, False)):
        weights = [one.get_submodule(name).product()[0] for one in (plain, changed)]
        assert torch.allclose(*weights, rtol=0, atol=1e-4) == same, name


@pytest.mark.parametrize("method", ["fasc", "whitened"])
def test_it_runs_on_every_architecture_and_comes_closer_to_the_dense_model(measured, tokens, architecture, method):
    errors = []
    with torch.no_grad():
        expected = tiny_model(architecture)(input_ids=tokens, output_hidden_states=True).hidden_states[-2]
        for on in (False, True):
            model, _ = compressed(measured, architecture, on=on, method=method, allocation="uniform")
            assert len(edited_layers(model)) >= 6
            ours = model(input_ids=tokens, output_hidden_states=True).hidden_states[-2]
            errors.append(float((ours - expected).norm()))
    if method == "whitened":  # its objective is this very error
        assert errors[1] < errors[0]
    else:
        assert errors[1] != errors[0]


def test_mlps_that_lose_channels_are_fitted_to_the_inputs_they_get(measured, tokens, architecture):
    (plain, made), (changed, _) = (compressed(measured, architecture, on=on, param_fraction=0.25) for on in (False, True))
    assert {edit.edit for edit in made.edits} == {"narrow", "factor"}
    assert set(edited_layers(plain)) == set(edited_layers(changed))
    assert logits(changed, tokens).isfinite().all()
    assert not torch.equal(logits(plain, tokens), logits(changed, tokens))


def test_the_forecast_is_given_up_where_it_would_be_of_other_gradients(measured):
    """A method that is no loss has its forecast of dense inputs; on propagated ones nobody knows it."""
    _, of_loss = compressed(measured, on=True)
    _, of_none = compressed(measured, on=True, method="whitened")
    assert of_loss.predicted_loss > 0
    assert of_none.edits
    assert all(edit.predicted_loss == plan_loss for edit, plan_loss in zip(of_none.edits, losses_of(measured), strict=True))


def losses_of(measured):
    return [edit.predicted_loss for edit in plan(tiny_model(), measured(), **OPTIONS, method="whitened").edits]


def test_methods_and_statistics_that_cannot_are_refused_before_anything_is_changed(measured, tokens):
    model = tiny_model()
    with pytest.raises(UsageError, match="Σ_xg"):
        carry_out(model, measured(), plan(model, method="fasc-eq6", rank_fraction=0.5), propagate=True)
    with pytest.raises(StatisticsError, match="the text they were measured on"):
        carry_out(model, replace(measured(), text=None), plan(model, rank_fraction=0.5), propagate=True)
    assert torch.equal(logits(model, tokens), logits(tiny_model(), tokens))


def test_finished_blocks_are_not_done_again(measured, tmp_path, monkeypatch):
    made = plan(tiny_model(), measured(), **OPTIONS)
    whole = tiny_model()
    carry_out(whole, measured(), made, propagate=True, work=tmp_path)
    files = sorted(file.name for file in tmp_path.iterdir())
    assert files == ["model.layers.0.safetensors", "model.layers.1.safetensors"]
    (tmp_path / files[1]).unlink()
    done = []
    real = propagate._compress_block
    monkeypatch.setattr(propagate, "_compress_block", lambda block, *rest: (done.append(block.name), real(block, *rest))[1])
    resumed = tiny_model()
    again = carry_out(resumed, measured(), made, propagate=True, work=tmp_path)
    assert done == ["model.layers.1"]
    assert again.edits == carry_out(tiny_model(), measured(), made, propagate=True).edits
    for key, value in whole.state_dict().items():
        assert torch.equal(value, resumed.state_dict()[key]), key


def test_a_damaged_block_is_named(measured, tmp_path):
    made = plan(tiny_model(), measured(), **OPTIONS)
    carry_out(tiny_model(), measured(), made, propagate=True, work=tmp_path)
    file = tmp_path / "model.layers.0.safetensors"
    file.write_bytes(file.read_bytes()[:200])
    with pytest.raises(ModelError, match=r"model\.layers\.0\.safetensors` is damaged") as problem:
        carry_out(tiny_model(), measured(), made, propagate=True, work=tmp_path)
    assert "\n" not in str(problem.value)


def weights_of(folder):
    return (folder / "model.safetensors").read_bytes(), json.loads((folder / "config.json").read_text())


def test_a_killed_compress_goes_on_and_gives_the_same_bytes(model_folder, text_file, tmp_path):
    """SIGKILL at several points of a real run; the finished result is that of a run nobody disturbed."""
    command = [sys.executable, "-m", "fasc", "compress", str(model_folder), "--param-fraction", "0.7", "--propagate"]
    command += ["--corpus", str(text_file), "--sequences", "20", "--sequence-length", "16", "--damping", "1e-3"]

    def run(out):
        return subprocess.run([*command, "--out", str(out)], capture_output=True, text=True, check=False)

    undisturbed, out, work = tmp_path / "undisturbed", tmp_path / "out", tmp_path / ".out.work"
    assert run(undisturbed).returncode == 0
    for moment in ("statistics.safetensors", "plan.json", "model.layers.0.safetensors"):  # each try gets a stage further
        kill_when([*command, "--out", str(out)], work, moment)
        if not work.exists():
            pytest.skip("the process was faster than the signal")
        assert not out.exists(), "nothing half-written stands where the checkpoint will"
    again = run(out)
    assert again.returncode == 0, again.stderr
    assert "measuring moments" not in again.stderr, "calibration was done already"
    assert weights_of(out) == weights_of(undisturbed)
    assert not work.exists()


def test_a_killed_run_goes_on_and_gives_the_same_bytes(model_folder, text_file, tmp_path):
    recipe = tmp_path / "recipe.toml"
    recipe.write_text(
        f'[source]\nmodel = "{model_folder}"\n'
        f'[calibration]\ncorpus = "{text_file}"\nsequences = 20\nsequence_length = 16\n'
        '[[methods]]\nname = "fasc"\ndamping = 1e-3\npropagate = true\n[[budgets]]\nparam_fraction = 0.7\n'
        f'[evaluation]\nbenchmarks = ["perplexity"]\ncorpus = "{text_file}"\ncontext = 16\nlimit = 4\n'
    )
    command = [sys.executable, "-m", "fasc", "run", str(recipe), "--out"]
    undisturbed, out = tmp_path / "undisturbed", tmp_path / "out"
    subprocess.run([*command, str(undisturbed)], check=True, capture_output=True)
    for moment in ("dense/scores.json", "fasc/work/model.layers.0.safetensors"):  # each try gets a stage further
        kill_when([*command, str(out)], out, moment)
    subprocess.run([*command, str(out)], check=True, capture_output=True)
    assert weights_of(out / "fasc" / "model") == weights_of(undisturbed / "fasc" / "model")
    scores, expected = (json.loads((one / "fasc" / "scores.json").read_text())["scores"] for one in (out, undisturbed))
    assert scores == expected
    assert load_file(out / "statistics.safetensors").keys() == load_file(undisturbed / "statistics.safetensors").keys()
