"""A statistics file gives back what was written, or one line that says what is wrong with it."""

import json
import os
import random
import stat

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from fasc.errors import FascError, NonFiniteError, StatisticsError
from fasc.statistics.collect import collect_moments
from fasc.statistics.moments import Statistics
from tests.conftest import tiny_model
from tests.statistics.needs import EVERYTHING, GRADIENTS
from tests.statistics.tensors import tensors_of


@pytest.fixture(scope="module")
def statistics(tokens):
    return collect_moments(tiny_model(), tokens, EVERYTHING)


@pytest.fixture
def file(statistics, tmp_path):
    return statistics.save(tmp_path / "statistics.safetensors")


def rewrite(file, change):
    """Apply ``change(tensors, groups, meta, header)`` to a file."""
    with safe_open(file, framework="pt") as stored:
        header = stored.metadata()
        tensors = {key: stored.get_tensor(key) for key in stored.keys()}  # noqa: SIM118 - not a mapping
    groups, meta = json.loads(header["groups"]), json.loads(header["meta"])
    header |= {"groups": json.dumps(groups), "meta": json.dumps(meta)}
    change(tensors, groups, meta, header)
    if "raw" not in header:
        header |= {"groups": json.dumps(groups), "meta": json.dumps(meta)}
    header.pop("raw", None)
    save_file({key: value.contiguous() for key, value in tensors.items()}, file, header)


def test_statistics_survive_the_disk(statistics, file, tmp_path):
    loaded = Statistics.load(str(file))
    assert loaded.meta == statistics.meta
    assert torch.equal(loaded.text, statistics.text)
    before, after = dict(tensors_of(statistics)), dict(tensors_of(loaded))
    assert list(after) == list(before)
    assert all(torch.equal(after[key], value) for key, value in before.items())
    for name, group in statistics.groups.items():
        other = loaded.groups[name]
        assert other.group == group.group
        assert (other.tokens, other.text_tokens, other.sequences) == (480, 480, 24)
        assert {unit: moment.side for unit, moment in other.gradients.items()} == {
            unit: moment.side for unit, moment in group.gradients.items()
        }
    assert [entry.name for entry in tmp_path.iterdir()] == ["statistics.safetensors"]
    with pytest.raises(StatisticsError, match="another model"):
        loaded.require_model("0" * 64)


def test_the_file_is_as_readable_as_any_other(statistics, tmp_path):
    old = os.umask(0o027)
    try:
        file = statistics.save(str(tmp_path / "s.safetensors"))
    finally:
        os.umask(old)
    assert stat.S_IMODE(file.stat().st_mode) == 0o640


def test_statistics_that_are_missing_or_no_safetensors_file_are_refused(tmp_path):
    file = tmp_path / "statistics.safetensors"
    with pytest.raises(StatisticsError, match="does not exist"):
        Statistics.load(file)
    for content in (b"", b"not a safetensors file", b"\xff" * 100):
        file.write_bytes(content)
        with pytest.raises(StatisticsError, match="damaged"):
            Statistics.load(file)
    with pytest.raises(StatisticsError, match="not statistics of fasc"):
        Statistics.load(tmp_path)


def test_a_file_of_an_older_format_is_refused_in_one_line(file):
    rewrite(file, lambda tensors, groups, meta, header: header.update(format="1"))
    with pytest.raises(StatisticsError, match="not a statistics file of format 2"):
        Statistics.load(file)


GROUP = "model.layers.0.mlp.down_proj"
COVARIANCE, MEAN = f"{GROUP}/input/covariance", f"{GROUP}/input/mean"


def _set(tensors, key, value):
    tensors[key] = value(tensors[key].clone())


def _spoil(index, entry):
    def change(matrix):
        matrix[index] = entry
        return matrix

    return change


DAMAGE = {
    "a tensor is missing": (lambda t, g, m, h: t.pop(COVARIANCE), "lacks `model.layers.0.mlp.down_proj/input/covariance`"),
    "an extra is missing": (lambda t, g, m, h: t.pop(f"{GROUP}/extra/taylor"), "lacks .*taylor"),
    "a tensor too many": (lambda t, g, m, h: t.update({"other/input/mean": torch.zeros(3)}), "belongs to no group"),
    "wrong shape": (lambda t, g, m, h: _set(t, MEAN, lambda v: v[:-1]), r"has shape \[47\] instead of \[48\]"),
    "no matrix": (lambda t, g, m, h: _set(t, COVARIANCE, lambda v: v[0]), r"has shape \[48\]"),
    "scalar": (lambda t, g, m, h: _set(t, MEAN, lambda v: v[0]), r"has shape \[\]"),
    "no sequences": (lambda t, g, m, h: _set(t, f"{GROUP}/extra/sequences/count", lambda v: v[:0]), "is empty"),
    "wrong precision": (lambda t, g, m, h: _set(t, MEAN, torch.Tensor.double), "holds torch.float64"),
    "integers": (lambda t, g, m, h: _set(t, MEAN, torch.Tensor.int), "holds torch.int32"),
    "NaN": (lambda t, g, m, h: _set(t, COVARIANCE, _spoil((3, 4), float("nan"))), "NaN or infinity"),
    "infinity": (lambda t, g, m, h: _set(t, MEAN, _spoil(5, float("-inf"))), "NaN or infinity"),
    "not symmetric": (lambda t, g, m, h: _set(t, COVARIANCE, lambda v: v + torch.triu(v, 1)), "is not symmetric"),
    "negative variance": (lambda t, g, m, h: _set(t, COVARIANCE, torch.neg), "negative variance"),
    "other text": (lambda t, g, m, h: _set(t, "text", lambda v: v.flip(0)), "its text is not the one"),
    "text without sequences": (lambda t, g, m, h: _set(t, "text", torch.Tensor.flatten), "`text` has shape"),
    "no groups": (lambda t, g, m, h: g.clear(), "groups"),
    "a group twice": (lambda t, g, m, h: g.append(g[0]), "lacks|twice"),
    "no tokens": (lambda t, g, m, h: g[0].update(tokens=0), "groups.0.tokens"),
    "tokens in words": (lambda t, g, m, h: g[0].update(tokens="many"), "groups.0.tokens"),
    "texts of two lengths": (lambda t, g, m, h: g[0].update(text_tokens=481), "several lengths"),
    "another side": (lambda t, g, m, h: g[3]["units"].update({GROUP: "input"}), "those of its inputs, not of its outputs"),
    "no side": (lambda t, g, m, h: g[3]["units"].update({GROUP: "left"}), "units"),
    "a unit is missing": (lambda t, g, m, h: g[3]["units"].clear(), "gradient moments of"),
    "a layer without size": (lambda t, g, m, h: g[0]["layers"][0].pop("d_in"), "layers.0.d_in"),
    "layers of two inputs": (lambda t, g, m, h: g[0]["layers"][0].update(d_in=31), "inputs of different sizes"),
    "an unknown field": (lambda t, g, m, h: g[0].update(colour="red"), "colour"),
    "no fingerprint": (lambda t, g, m, h: m.pop("model_fingerprint"), "model_fingerprint"),
    "an unknown need": (lambda t, g, m, h: m["needs"].append(["love", "group"]), "needs"),
    "another label": (lambda t, g, m, h: m.update(labels="guessed"), "labels"),
    "an endless loss": (lambda t, g, m, h: m.update(nll=float("inf")), "nll"),
    "no JSON": (lambda t, g, m, h: h.update(meta="{", raw="yes"), "not JSON"),
    "deep JSON": (lambda t, g, m, h: h.update(meta="[" * 100_000, raw="yes"), "not JSON"),
    "JSON of another kind": (lambda t, g, m, h: h.update(groups="7", raw="yes"), "groups"),
    "no groups at all": (lambda t, g, m, h: (h.pop("groups"), h.update(raw="yes")), "groups"),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_a_file_that_contradicts_itself_is_refused_in_one_line(file, kind):
    change, message = DAMAGE[kind]
    rewrite(file, change)
    with pytest.raises(StatisticsError, match=message) as caught:
        Statistics.load(file)
    assert str(file) in caught.value.message
    assert "\n" not in str(caught.value)


def test_bytes_changed_at_random_are_read_alike_or_refused(statistics, file):
    """Never another kind of error, whatever the bytes."""
    content, choose = file.read_bytes(), random.Random(0)
    refused = 0
    for _ in range(60):
        changed = bytearray(content)
        for _ in range(choose.choice([1, 4, 64])):
            changed[choose.randrange(choose.choice([8, 4000, len(content)]))] = choose.randrange(256)
        file.write_bytes(changed[: choose.choice([len(content), choose.randrange(len(content))])])
        try:
            Statistics.load(file)
        except FascError as problem:
            refused += 1
            assert isinstance(problem, StatisticsError)
    assert refused > 30


def test_a_moment_that_is_not_finite_is_not_written(tokens, tmp_path):
    statistics = collect_moments(tiny_model(), tokens, GRADIENTS)
    statistics.groups[GROUP].gradients[GROUP].covariance.mean[0] = float("nan")
    with pytest.raises(NonFiniteError, match="down_proj/gradient"):
        statistics.save(tmp_path / "s.safetensors")
    assert not list(tmp_path.iterdir())
