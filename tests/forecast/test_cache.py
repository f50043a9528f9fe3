"""Forecasts that were kept change nothing but the time."""

import json
import os

import numpy as np
import pytest

from fasc.cli.app import main
from fasc.forecast.cache import kept_forecasts
from fasc.storage import cache_root


@pytest.fixture
def plan(monkeypatch, tmp_path, model_folder):
    """`fasc plan` in this process, with a cache of its own; gives the plan."""
    monkeypatch.setattr("fasc.cli.app.INTERRUPT.install", lambda: None)
    monkeypatch.setenv("FASC_CACHE", str(tmp_path / "cache"))

    def call(*options, verb="plan"):
        file = tmp_path / "plan.json"
        ending = ["--json", file] if verb == "plan" else []
        monkeypatch.setattr("sys.argv", ["fasc", verb, *map(str, [model_folder, *options, *ending])])
        with pytest.raises(SystemExit) as stopped:
            main()
        assert not stopped.value.code
        return json.loads(file.read_text()) if ending else None

    return call


@pytest.fixture
def moments(plan, text_file, tmp_path):
    """Two files of moments, of other text each."""
    files = [tmp_path / "a.safetensors", tmp_path / "b.safetensors"]
    for seed, file in enumerate(files):
        calibration = ["--sequences", "20", "--sequence-length", "16", "--seed", seed]
        plan("--corpus", text_file, *calibration, "--out", file, verb="collect")
    return files


@pytest.fixture
def computed(monkeypatch):
    """How often forecasts were computed."""
    from fasc.compression import planning

    calls = []
    real = planning.loss_curves
    monkeypatch.setattr(planning, "loss_curves", lambda *given, **named: calls.append(1) or real(*given, **named))
    return calls


def without_cache(plan, monkeypatch, tmp_path, *options):
    with monkeypatch.context() as patch:
        patch.setenv("FASC_CACHE", str(tmp_path / "none"))
        return plan(*options)


@pytest.mark.parametrize(
    "options",
    [
        ["--param-fraction", "0.7"],
        ["--param-fraction", "0.8", "--layouts", "dense,factors"],
        ["--param-fraction", "0.8", "--damping", "1e-2"],
        ["--param-fraction", "0.8", "--method", "svd"],
        ["--param-fraction", "0.8", "--exclude", "*down_proj"],
        ["--rank-fraction", "0.5"],
        ["--max-kl", "0.05"],
    ],
)
def test_a_plan_is_the_same_with_and_without_forecasts_that_other_calls_kept(plan, moments, monkeypatch, tmp_path, options):
    plan("--param-fraction", "0.8", "--statistics", moments[0])
    plan("--param-fraction", "0.8", "--statistics", moments[1])
    plan("--param-fraction", "0.8", "--statistics", moments[1], "--held-out", moments[0])
    for given in ([moments[0]], [moments[0], "--held-out", moments[1]]):
        fresh = without_cache(plan, monkeypatch, tmp_path / str(len(given)), *options, "--statistics", *given)
        for _ in range(2):
            assert plan(*options, "--statistics", *given) == fresh


def test_another_rate_from_the_same_moments_computes_no_forecast(plan, moments, computed, tmp_path):
    first = plan("--param-fraction", "0.8", "--statistics", moments[0])
    assert computed
    computed.clear()
    assert plan("--param-fraction", "0.8", "--statistics", moments[0]) == first
    plan("--param-fraction", "0.6", "--statistics", moments[0])
    plan("--param-fraction", "0.7", "--statistics", moments[0], "--out", tmp_path / "small", verb="compress")
    assert not computed
    plan("--param-fraction", "0.8", "--statistics", moments[1])
    assert len(computed) == 1


def test_a_damaged_or_unwritable_cache_is_as_good_as_none(plan, moments, computed, monkeypatch, tmp_path):
    options = ["--param-fraction", "0.8", "--statistics", moments[0]]
    first = plan(*options)
    (file,) = (cache_root() / "forecasts").iterdir()
    file.write_bytes(file.read_bytes()[:100])
    assert plan(*options) == first
    assert len(computed) == 2
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("FASC_CACHE", str(tmp_path / "file" / "cache"))
    assert plan(*options) == first
    assert len(computed) == 3


def test_nothing_is_kept_of_moments_that_no_file_holds(plan, text_file, tmp_path):
    calibration = ["--sequences", "20", "--sequence-length", "16"]
    plan("--param-fraction", "0.8", "--corpus", text_file, *calibration, "--out", tmp_path / "small", verb="compress")
    assert not (cache_root() / "forecasts").exists()


def test_only_the_files_that_were_used_last_are_kept(plan):
    for number in range(20):
        with kept_forecasts(str(number)) as known:
            known["key"] = {"unit": np.zeros(1)}
        newest = max((cache_root() / "forecasts").iterdir(), key=lambda path: path.stat().st_mtime_ns)
        os.utime(newest, (number, number))
    for number in range(20):
        with kept_forecasts(str(number)) as known:
            assert bool(known) == (number >= 4)
