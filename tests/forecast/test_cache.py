"""Forecasts that are kept change nothing but the time."""

import os
import shutil

import numpy as np
import pytest

import fasc
from fasc.forecast.cache import kept_forecasts
from fasc.model.load import LoadedModel
from fasc.model.options import LayersConfig
from fasc.planning import make
from fasc.planning.options import BudgetConfig, MethodConfig
from fasc.stages.plan import plan_from_files
from fasc.storage import cache_root
from tests.conftest import tiny_model

FEW_TOKENS = {"sequences": 20, "sequence_length": 16}


@pytest.fixture(autouse=True)
def cache(monkeypatch, tmp_path):
    """Of each test its own."""
    monkeypatch.setenv("FASC_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture(scope="module")
def moments(tokens, tmp_path_factory):
    """Two files of moments, of other text each."""
    folder = tmp_path_factory.mktemp("moments")
    parts = {"a": tokens[:12], "b": tokens[12:]}
    return [
        fasc.collect(tiny_model(), corpus=part, methods="fasc").save(folder / f"{name}.safetensors")
        for name, part in parts.items()
    ]


@pytest.fixture
def computed(monkeypatch):
    """One entry for each time that forecasts were computed."""
    calls, real = [], make.loss_curves

    def counted(*given, **named):
        calls.append(given)
        return real(*given, **named)

    monkeypatch.setattr(make, "loss_curves", counted)
    return calls


def plan(statistics, held_out=None, *, layers=None, budget=None, **method):
    asked = BudgetConfig(**(budget or {"param_fraction": 0.8}))
    loaded = LoadedModel(tiny_model(), None)
    return plan_from_files(loaded, MethodConfig(**method), asked, layers or LayersConfig(), statistics, held_out)


ASKED = {
    "another rate": {"budget": {"param_fraction": 0.7}},
    "two layouts": {"layouts": ("dense", "factors")},
    "other channels": {"budget": {"param_fraction": 0.8, "channel_multiple": 4}},
    "other ranks": {"budget": {"param_fraction": 0.8, "rank_multiple": 1}},
    "more damping": {"damping": 1e-2},
    "another method": {"name": "svd"},
    "fewer layers": {"layers": LayersConfig(exclude=("*down_proj",))},
    "a rank fraction": {"budget": {"rank_fraction": 0.5}},
    "a loss": {"budget": {"max_kl": 0.05}},
}


@pytest.mark.parametrize("asked", ASKED.values(), ids=ASKED)
def test_a_plan_is_the_same_with_and_without_forecasts_that_other_calls_kept(moments, cache, asked):
    fresh = []
    for files in (moments[:1], moments):
        fresh.append(plan(*files, **asked))
        shutil.rmtree(cache, ignore_errors=True)
    for files in (moments[:1], moments[1:], moments[::-1]):
        plan(*files)
    for files, expected in zip((moments[:1], moments), fresh, strict=True):
        for _ in range(2):
            assert plan(*files, **asked) == expected


def test_another_rate_from_the_same_moments_computes_no_forecast(moments, computed, model_folder, tmp_path):
    first = plan(moments[0])
    assert len(computed) == 1
    assert plan(moments[0]) == first
    plan(moments[0], budget={"param_fraction": 0.6})
    fasc.compress_checkpoint(model_folder, out=tmp_path / "small", statistics=moments[0], param_fraction=0.7)
    assert len(computed) == 1
    plan(moments[1])
    assert len(computed) == 2


def test_a_damaged_or_unwritable_cache_is_as_good_as_none(moments, computed, monkeypatch, tmp_path):
    first = plan(moments[0])
    (file,) = (cache_root() / "forecasts").iterdir()
    file.write_bytes(file.read_bytes()[:100])
    assert plan(moments[0]) == first
    assert len(computed) == 2
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("FASC_CACHE", str(tmp_path / "file" / "cache"))
    assert plan(moments[0]) == first
    assert len(computed) == 3


def test_nothing_is_kept_of_moments_that_no_file_holds(model_folder, text_file, tmp_path):
    fasc.compress_checkpoint(model_folder, text_file, out=tmp_path / "small", param_fraction=0.8, **FEW_TOKENS)
    assert not (cache_root() / "forecasts").exists()


def test_a_call_that_fails_keeps_what_it_had_computed():
    with pytest.raises(RuntimeError), kept_forecasts("digest") as known:
        known["key"] = {"unit": np.arange(3.0)}
        raise RuntimeError
    with kept_forecasts("digest") as known:
        assert known["key"]["unit"].tolist() == [0, 1, 2]
    with kept_forecasts("digest", "held out") as known:
        assert not known


def test_only_the_files_that_were_used_last_are_kept():
    for number in range(20):
        with kept_forecasts(str(number)) as known:
            known["key"] = {"unit": np.zeros(1)}
        newest = max((cache_root() / "forecasts").iterdir(), key=lambda path: path.stat().st_mtime_ns)
        os.utime(newest, (number, number))
    for number in range(20):
        with kept_forecasts(str(number)) as known:
            assert bool(known) == (number >= 4)
