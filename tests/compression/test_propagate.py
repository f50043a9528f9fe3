"""Error propagation: the closed form, the order of the blocks, and going on after a kill."""

import json
import shutil
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file

from fasc import pipeline
from fasc.statistics.collect import collect
from fasc.statistics.moments import GradientMoment, Statistics, UnitStatistics
from fasc.compression import propagate
from fasc.compression.compress import compress
from fasc.compression.propagate import propagated
from fasc.planning.options import BudgetConfig, MethodConfig
from fasc.errors import StatisticsError, UsageError
from fasc.statistics.accumulators import Covariance
from fasc.methods import METHODS
from fasc.layouts.lowrank import LowRankLinear
from tests import reference
from tests.conftest import kill_when, tiny_model

NEEDS = METHODS["fasc"].needs_in(("group", "layer")) | METHODS["whitened"].needs
OPTIONS = {"damping": 1e-3, "propagate": True}


@pytest.fixture(scope="module")
def statistics(tokens):
    cache = {}

    def measure(architecture="llama"):
        if architecture not in cache:
            cache[architecture] = collect(tiny_model(architecture), tokens, NEEDS)
        return cache[architecture]

    return measure


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
    full = METHODS["fasc"].decompose(fitted, changed, MethodConfig(damping=0))
    u, s, vh = torch.linalg.svd(root(hh, 0.5) @ weight @ xy @ root(yy, -0.5), full_matrices=False)
    for rank in (2, 5):
        expected = root(hh, -0.5) @ (u[:, :rank] * s[:rank]) @ vh[:rank] @ root(yy, -0.5)
        factors = full.truncate(rank, y.mean(0), weight @ x.mean(0))
        torch.testing.assert_close(factors.dense(), expected, rtol=0, atol=1e-6)
        outputs = y @ factors.dense().mT + factors.offset
        torch.testing.assert_close(outputs.mean(0), (x @ weight.mT).mean(0), rtol=0, atol=1e-8)


def test_nothing_changes_where_inputs_do_not(statistics):
    """With x' = x the first group of the model gets what it gets without propagation."""
    plain, changed = tiny_model(), tiny_model()
    even = MethodConfig(allocation="uniform")
    plan = pipeline.plan(plain, even, BudgetConfig(param_fraction=0.7), statistics=statistics())
    compress(plain, statistics(), plan, MethodConfig(damping=1e-3))
    compress(changed, statistics(), plan, MethodConfig(**OPTIONS))
    name = next(unit.layers[0] for unit in plan.units if unit.layout != "dense")
    assert name.startswith("model.layers.0.self_attn.q")
    one, other = plain.get_submodule(name), changed.get_submodule(name)
    torch.testing.assert_close(other.weight, one.weight, rtol=0, atol=1e-4)
    last = plan.units[-1].layers[0]
    assert not torch.allclose(plain.get_submodule(last).weight, changed.get_submodule(last).weight, atol=1e-3)


@pytest.mark.parametrize("method", ["fasc", "whitened"])
def test_it_runs_on_every_architecture_and_comes_closer_to_the_dense_model(statistics, tokens, architecture, method):
    dense = tiny_model(architecture)
    errors = []
    for on in (False, True):
        model = tiny_model(architecture)
        options = MethodConfig(name=method, damping=1e-3, propagate=on, allocation="uniform")
        plan = pipeline.plan(model, options, BudgetConfig(param_fraction=0.6), statistics=statistics(architecture))
        compress(model, statistics(architecture), plan, options)
        assert sum(isinstance(m, LowRankLinear) for m in model.modules()) >= 6
        with torch.no_grad():
            ours = model(input_ids=tokens, output_hidden_states=True).hidden_states[-2]
            errors.append(float((ours - dense(input_ids=tokens, output_hidden_states=True).hidden_states[-2]).norm()))
    if method == "whitened":  # its objective is this very error
        assert errors[1] < errors[0]


def test_methods_and_statistics_that_cannot_are_refused(statistics):
    model = tiny_model()
    plan = pipeline.plan(model, "fasc-eq6", BudgetConfig())
    eq6 = collect(model, torch.randint(3, 100, (8, 12)), METHODS["fasc-eq6"].needs)
    with pytest.raises(UsageError, match="Σ_xg"):
        compress(model, eq6, plan, MethodConfig(name="fasc-eq6", propagate=True))
    old = Statistics(statistics().groups, statistics().meta)
    with pytest.raises(StatisticsError, match="tokens"):
        compress(model, old, pipeline.plan(model, "fasc", BudgetConfig()), MethodConfig(**OPTIONS))


def test_finished_blocks_are_not_done_again(statistics, tmp_path, monkeypatch):
    plan = pipeline.plan(tiny_model(), "fasc", BudgetConfig(param_fraction=0.6), statistics=statistics())
    whole = tiny_model()
    compress(whole, statistics(), plan, MethodConfig(**OPTIONS), work=tmp_path / "a")
    files = sorted(file.name for file in (tmp_path / "a").iterdir())
    assert files == ["model.layers.0.safetensors", "model.layers.1.safetensors"]
    (tmp_path / "a" / files[1]).unlink()
    done = []
    real = propagate._compress_block
    monkeypatch.setattr(propagate, "_compress_block", lambda block, *rest: (done.append(block.name), real(block, *rest))[1])
    resumed = tiny_model()
    compress(resumed, statistics(), plan, MethodConfig(**OPTIONS), work=tmp_path / "a")
    assert done == ["model.layers.1"]
    for key, value in whole.state_dict().items():
        assert torch.equal(value, resumed.state_dict()[key]), key


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
    undisturbed = tmp_path / "undisturbed"
    subprocess.run([*command, str(undisturbed)], check=True, capture_output=True)
    for moment in ("dense/scores.json", "fasc/work/model.layers.0.safetensors"):
        out = tmp_path / "out"
        kill_when([*command, str(out)], out, moment)
        subprocess.run([*command, str(out)], check=True, capture_output=True)
        assert weights_of(out / "fasc" / "model") == weights_of(undisturbed / "fasc" / "model"), moment
        found, expected = (json.loads((one / "fasc" / "scores.json").read_text())["scores"] for one in (out, undisturbed))
        assert found == expected
        assert load_file(out / "statistics.safetensors").keys() == load_file(undisturbed / "statistics.safetensors").keys()
        shutil.rmtree(out)
