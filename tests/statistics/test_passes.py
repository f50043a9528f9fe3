"""Moments in several passes over ranges of blocks are those of one pass, bit by bit, also after a kill."""

import json

import pytest
import torch

from fasc.errors import StatisticsError, StorageError, UsageError
from fasc.model.experts import expert_layers
from fasc.model.groups import find_groups
from fasc.model.options import LayersConfig
from fasc.planning.needs import needs_for
from fasc.planning.options import MethodConfig
from fasc.stages import calibrate as stage
from fasc.stages.plan import plan
from fasc.statistics.collect import collect_moments
from fasc.statistics.moments import Statistics
from fasc.statistics.options import CalibrationConfig
from fasc.statistics.passes import PROGRAM, plan_passes
from fasc.statistics.shards import INDEX, digest_of, require_own_shards
from tests.conftest import CONFIGS, PARALLEL, tiny_model
from tests.statistics.needs import EVERYTHING, GRADIENTS, INPUTS

OPTIONS = CalibrationConfig(batch_tokens=160, labels="sampled")


def block_by_block(model, groups, needs, options=OPTIONS):
    """As many passes as blocks: the least limit that is allowed."""
    low, high = 0, 10**12
    while low < high:
        middle = (low + high) // 2
        try:
            plan_passes(model, groups, needs, options, middle)
            high = middle
        except UsageError:
            low = middle + 1
    return plan_passes(model, groups, needs, options, low), low


def equal(one, other):
    assert list(one.groups) == list(other.groups)
    for name, group in one.groups.items():
        twin = other.groups[name]
        assert (group.tokens, group.text_tokens, group.sequences) == (twin.tokens, twin.text_tokens, twin.sequences)
        assert torch.equal(group.input.mean, twin.input.mean)
        assert torch.equal(group.input.matrix, twin.input.matrix)
        for unit, moment in group.gradients.items():
            assert torch.equal(moment.covariance.matrix, twin.gradients[unit].covariance.matrix), unit
            assert moment.cross is None or torch.equal(moment.cross, twin.gradients[unit].cross)
        for key, value in group.extras.items():
            assert torch.equal(value, twin.extras[key]), key


@pytest.mark.parametrize("architecture", [*CONFIGS, *PARALLEL])
def test_passes_over_ranges_give_the_bits_of_one_pass(architecture, tokens):
    model = tiny_model(architecture)
    with expert_layers(model):
        groups = find_groups(model, LayersConfig())
        passes, _ = block_by_block(model, groups, EVERYTHING)
        assert len(passes) == len({group.block for group in groups}) > 1
        assert [name for one in passes for name in one.groups] == [group.name for group in groups]
        assert [one.start is None for one in passes] == [True] + [False] * (len(passes) - 1)
        whole = collect_moments(model, tokens, EVERYTHING, calibration=OPTIONS)
        for one in passes:
            part = collect_moments(model, tokens, EVERYTHING, calibration=OPTIONS, only=one)
            equal(part, Statistics({name: whole.groups[name] for name in part.groups}, whole.meta))
            assert set(part.groups) == set(one.groups) & set(whole.groups)


def test_as_many_blocks_share_a_pass_as_the_limit_holds(tokens):
    model = tiny_model(layers=6)
    groups = find_groups(model, LayersConfig())
    passes, least = block_by_block(model, groups, GRADIENTS)
    block = passes[0].bytes
    assert len(passes) == 6
    for together in (2, 3, 4, 6):
        fewer = plan_passes(model, groups, GRADIENTS, OPTIONS, least + (together - 1) * block)
        assert len(fewer) == -(-6 // together)
    with pytest.raises(UsageError, match="do not hold the moments of one block") as refused:
        plan_passes(model, groups, GRADIENTS, OPTIONS, least - 1)
    assert "--max-memory" in refused.value.hint
    assert least > PROGRAM


@pytest.fixture
def loaded(model_folder):
    from fasc.model.load import load_model

    return load_model(model_folder)


@pytest.fixture
def made(loaded, text_file, tmp_path):
    """A folder of one shard for each block, and how to make it again."""
    options = CalibrationConfig(corpus=str(text_file), sequences=12, sequence_length=16, batch_tokens=48, labels="sampled")
    groups = find_groups(loaded.model, LayersConfig())
    needs = needs_for(MethodConfig(name="fasc"), None)
    _, limit = block_by_block(loaded.model, groups, needs, options)

    def make(name="stats", **more):
        out = tmp_path / name
        count = stage.calibrate_in_passes(loaded, needs, options, LayersConfig(), limit=limit, out=out, **more)
        return out, count

    whole = stage.calibrate(loaded, needs, options, LayersConfig())
    return make, whole


def test_a_folder_of_shards_is_read_like_one_file(made, loaded):
    make, whole = made
    folder, count = make()
    assert count == 2
    assert sorted(file.name for file in folder.iterdir()) == [
        INDEX,
        "statistics-00001-of-00002.safetensors",
        "statistics-00002-of-00002.safetensors",
    ]
    read = Statistics.load(folder)
    equal(whole, read)
    assert torch.equal(read.text, whole.text)
    for key, value in whole.vocabulary.tensors().items():
        assert torch.equal(value, read.vocabulary.tensors()[key]), key
    same = {key: value for key, value in read.meta.items() if key not in ("provenance", "passes")}
    assert same == {key: value for key, value in whole.meta.items() if key != "provenance"}
    plans = [plan(loaded.model, one, param_fraction=0.6, method="fasc") for one in (whole, read)]
    assert plans[0].edits == plans[1].edits
    require_own_shards(folder)


def test_a_killed_call_goes_on_with_the_next_range_and_gives_the_same_bits(made, monkeypatch):
    make, whole = made
    folder, _ = make("undisturbed")
    measured = []
    real = stage.collect_moments

    def counting(*args, only, **kwargs):
        measured.append(only.groups)
        if len(measured) == 2:
            raise KeyboardInterrupt
        return real(*args, only=only, **kwargs)

    monkeypatch.setattr(stage, "collect_moments", counting)
    with pytest.raises(KeyboardInterrupt):
        make()
    again, _ = make()
    assert len(measured) == 3
    assert measured[1] == measured[2], "the first range was not measured again"
    equal(Statistics.load(folder), Statistics.load(again))
    equal(whole, Statistics.load(again))
    assert not list(again.parent.glob(".stats*")), "nothing is left beside the result"


def test_a_shard_that_is_missing_or_of_another_run_is_said(made):
    make, _ = made
    folder, _ = make()
    other, _ = make("other")
    second = "statistics-00002-of-00002.safetensors"
    before = digest_of(folder)
    content = json.loads((folder / INDEX).read_text())
    (folder / INDEX).write_text(json.dumps(content | {"run": "0" * 64}))
    assert digest_of(folder) != before
    with pytest.raises(StatisticsError, match="is a shard of another run"):
        Statistics.load(folder)
    with pytest.raises(StatisticsError, match="is no file of the folder"):
        _names_its_shard(other, f"../{other.name}/{second}")
    _names_its_shard(other, second)
    raw = bytearray((other / second).read_bytes())
    raw[-100] ^= 0x55
    (other / second).write_bytes(raw)
    with pytest.raises(StatisticsError, match="its digest is not that of the index"):
        Statistics.load(other)
    (other / second).unlink()
    with pytest.raises(StatisticsError, match=f"lacks `{second}`, one of its 2 shards"):
        Statistics.load(other)
    (other / INDEX).write_text("[]")
    with pytest.raises(StatisticsError, match="is damaged"):
        Statistics.load(other)
    (other / INDEX).unlink()
    with pytest.raises(StatisticsError, match="a folder without"):
        Statistics.load(other)
    with pytest.raises(StorageError, match="holds no statistics that fasc wrote"):
        require_own_shards(other)
    (folder / INDEX).write_text(json.dumps(content))
    (folder / "mine.txt").write_text("mine")
    with pytest.raises(StorageError, match="`mine.txt`, which fasc did not write"):
        require_own_shards(folder)


def _names_its_shard(folder, name):
    """Load statistics whose index calls the second shard so."""
    content = json.loads((folder / INDEX).read_text())
    content["shards"][1]["file"] = name
    (folder / INDEX).write_text(json.dumps(content))
    Statistics.load(folder)


def test_moments_of_inputs_alone_need_no_backward_pass_in_any_range(tokens):
    model = tiny_model()
    groups = find_groups(model, LayersConfig())
    passes, _ = block_by_block(model, groups, INPUTS)
    whole = collect_moments(model, tokens, INPUTS, calibration=OPTIONS)
    called = []
    handle = model.model.layers[-1].register_forward_hook(lambda *_: called.append(1))
    parts = []
    for one, expected in zip(passes, (2, 4), strict=True):  # once to find the groups, and 3 batches
        called.clear()
        parts.append(collect_moments(model, tokens, INPUTS, calibration=OPTIONS, only=one))
        assert len(called) == expected, "the first pass goes beyond its block with one batch, to see the order of the blocks"
    handle.remove()
    equal(whole, Statistics({name: group for part in parts for name, group in part.groups.items()}, whole.meta))
