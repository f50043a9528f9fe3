"""The table of a diagnosis: a row per group, forecasts that are those of the plan, files that hold the same."""

import csv
import json

import pytest
import torch

import fasc
from fasc.diagnosis.diagnose import Diagnosis, diagnose, diagnosis_needs
from fasc.errors import ModelError, StatisticsError, StorageError
from fasc.methods import METHODS
from fasc.model.experts import expert_layers
from fasc.planning.needs import needs_for
from fasc.planning.options import MethodConfig
from fasc.reporting import diagnosis_table
from fasc.reporting.diagnosis_table import print_diagnosis
from fasc.reporting.page.sources import checked
from fasc.stages.plan import plan
from fasc.statistics.collect import collect_moments
from fasc.statistics.options import CalibrationConfig
from tests.conftest import tiny_model

BOTH = (MethodConfig(name="fasc", damping=1e-3), MethodConfig(name="svd"))
THREE = (*BOTH, MethodConfig(name="whitened"))


@pytest.fixture(scope="module")
def statistics(tokens):
    return collect_moments(tiny_model(), tokens, diagnosis_needs(THREE))


@pytest.fixture(scope="module")
def diagnosis(statistics):
    return diagnose(tiny_model(), statistics, THREE, rank_fraction=0.5)


def test_every_row_holds_the_contract(diagnosis, statistics):
    assert [row["group"] for row in diagnosis.rows] == list(statistics.groups)
    for row in json.loads(json.dumps(list(diagnosis.rows))):
        assert {"group", "block", "kind", "rho", "rho_floor", "rho_debiased", "rho_low", "rho_high", "predicted_loss"} <= set(row)
        assert row["rho_low"] < row["rho"] < row["rho_high"]
        assert set(row["predicted_loss"]) == {"fasc", "svd", "whitened"}
        assert row["predicted_loss"]["fasc"] <= row["predicted_loss"]["svd"] * (1 + 1e-3)
        assert 0 <= row["angle"] <= 90
        assert row["gradient_norm"] > 0


def test_the_flat_table_and_the_files_hold_the_same_rows(diagnosis, tmp_path):
    flat = diagnosis.table()
    assert {"predicted_loss.fasc", "input.stable_rank", "group"} <= set(flat[0])
    assert not any(isinstance(value, (dict, list)) for row in flat for value in row.values())
    with diagnosis.save_csv(tmp_path / "d.csv").open() as stream:
        assert [row["group"] for row in csv.DictReader(stream)] == [row["group"] for row in diagnosis.rows]
    raw = json.loads(diagnosis.save(tmp_path / "d.json").read_text())
    assert set(raw) == {"written_by", "groups", "meta"}
    assert raw["written_by"] == "fasc diagnosis"
    assert raw["meta"]["rank_fraction"] == 0.5
    assert Diagnosis.load(tmp_path / "d.json").table() == flat


def test_the_diagnosis_forecasts_what_the_plan_does(diagnosis, statistics):
    model = tiny_model()
    for options in BOTH:
        made = plan(model, statistics, method=options, rank_fraction=0.5, rank_multiple=1)
        losses = {edit.unit.name: edit.predicted_loss for edit in made.edits}
        for row in diagnosis.rows:
            assert row["predicted_loss"][options.name] == pytest.approx(losses[row["group"]], rel=1e-6), row["group"]


def test_rows_without_cross_moments_have_no_score(tokens):
    """And without gradients no forecast; what is known stands there."""
    model = tiny_model()
    bare = diagnose(model, collect_moments(model, tokens, METHODS["svd"].needs), [BOTH[1]], rank_fraction=0.5)
    for row in bare.rows:
        assert row["rho"] is None and row["rho_low"] is None and row["angle"] is None
        assert row["predicted_loss"] == {}
        assert row["input"]["effective_rank"] > 1
    with pytest.raises(StatisticsError, match="lack gradient per group"):
        diagnose(model, collect_moments(model, tokens, METHODS["svd"].needs), BOTH, rank_fraction=0.5)


def test_reasons_for_exclusion_are_those_that_are_asked_for(statistics):
    table = diagnose(
        tiny_model(), statistics, BOTH, rank_fraction=0.5, exclude=lambda rows: [f"row {i}" for i, _ in enumerate(rows)]
    )
    assert [row["excluded"] for row in table.rows] == [f"row {i}" for i in range(8)]
    assert {row["excluded"] for row in diagnose(tiny_model(), statistics, BOTH, rank_fraction=0.5).rows} == {None}


def test_every_expert_has_a_row_with_the_moments_of_its_tokens(mixture, tokens):
    seen = {}

    def watch(_module, args):
        seen.setdefault("x", []).append(args[0].detach().double())

    both = (MethodConfig(damping=1e-2), MethodConfig(name="svd"))
    with expert_layers(mixture):
        name = "model.layers.1.mlp.experts.2.gate_up_proj"
        statistics = collect_moments(mixture, tokens, diagnosis_needs(both), calibration=CalibrationConfig(batch_tokens=160))
        handle = mixture.get_submodule(name).register_forward_pre_hook(watch)
        with torch.no_grad():
            mixture(input_ids=tokens)
        handle.remove()
        table = diagnose(mixture, statistics, both, rank_fraction=0.5)
    inputs = torch.cat(seen["x"])
    group = statistics.groups[name]
    assert group.tokens == len(inputs)
    torch.testing.assert_close(group.input.mean.double(), inputs.mean(0), rtol=1e-3, atol=1e-4)
    row = next(row for row in table.rows if row["group"] == name)
    assert (row["expert"], row["tokens"]) == (2, len(inputs))
    assert row["rho"] > 0
    assert row["predicted_loss"]["fasc"] <= row["predicted_loss"]["svd"]
    per_block = [row["tokens"] for row in table.rows if row["block"] == 0 and row["kind"] == "gate_up_proj"]
    assert sum(per_block) == 2 * tokens.numel(), "each token goes to two experts"


@pytest.fixture
def mixed(mixture, tokens):
    """A mixture, its moments, and a plan that drops an expert that says little and makes others smaller."""
    with torch.no_grad():
        mixture.get_submodule("model.layers.0.mlp.experts").down_proj[2] *= 1e-4
    statistics = fasc.collect(
        mixture, corpus=tokens, needs=diagnosis_needs(BOTH) | needs_for(BOTH[0], None), sequences=24, sequence_length=20
    )
    made = plan(mixture, statistics, param_fraction=0.6, layouts="dense,experts,factors", damping=1e-2)
    return mixture, statistics, made


def test_every_expert_has_one_row_that_adds_up_its_groups(mixed, tmp_path):
    mixture, statistics, made = mixed
    found = fasc.diagnose(mixture, statistics, "fasc,svd", plan=made)
    assert [(one["block"], one["expert"]) for one in found.experts] == [(block, one) for block in (0, 1) for one in range(4)]
    for one in found.experts:
        rows = [row for row in found.rows if row["group"].startswith(f"{one['name']}.")]
        assert len(rows) == 2
        assert {one["tokens"]} == {row["tokens"] for row in rows}
        assert one["share"] == pytest.approx(one["tokens"] / 480)
        assert one["rho"] == {row["kind"]: row["rho"] for row in rows}
        assert one["predicted_loss"]["fasc"] == pytest.approx(sum(row["predicted_loss"]["fasc"] for row in rows))
    raw = json.loads(found.save(tmp_path / "d.json").read_text())
    assert raw["experts"] == json.loads(json.dumps(found.experts))
    assert checked("diagnosis", raw, "d")["experts"] == raw["experts"]
    with pytest.raises(StorageError, match="row 0 of `experts`"):
        checked("diagnosis", raw | {"experts": [{"block": 0}]}, "d")


def test_what_a_plan_makes_of_experts_adds_up_to_the_plan(mixed):
    mixture, statistics, made = mixed
    found = fasc.diagnose(mixture, statistics, "fasc", plan=made).experts
    of_experts = [edit for edit in made.edits[1:] if "experts" in edit.touches[-1]]
    assert any(one["dropped"] for one in found) and any(one["ranks"] for one in found)
    size = sum(layer.parameters for layer in made.layers if layer.name.startswith(f"{found[0]['name']}."))
    assert sum((1 - one["kept"]) * size for one in found) == pytest.approx(sum(edit.saved for edit in of_experts))
    assert sum(one["plan_loss"] or 0 for one in found) == pytest.approx(sum(edit.predicted_loss for edit in of_experts))
    assert {one["name"] for one in found if one["left"] == "its mean"} == {e.sublayer for e in of_experts if e.edit == "skip"}


def test_a_plan_of_another_model_is_refused(mixed, model):
    _, _, made = mixed
    with pytest.raises(ModelError, match="belongs to another model|no linear layer of this model|no such experts"):
        fasc.diagnose(model, collect_moments(model, torch.arange(3, 63)[None], diagnosis_needs(BOTH)), "fasc", plan=made)


def test_a_dense_model_has_no_table_of_experts(diagnosis):
    assert diagnosis.experts == []


def test_the_terminal_shows_each_expert_or_each_block_where_they_are_many(mixed, capsys, monkeypatch):
    mixture, statistics, made = mixed
    found = fasc.diagnose(mixture, statistics, "fasc", plan=made)
    print_diagnosis(found)
    out = capsys.readouterr().out
    one = found.experts[5]
    (row,) = [
        line
        for line in out.splitlines()
        if line.split("│")[1:4] and [x.strip() for x in line.split("│")[1:4]] == ["1", "1", f"{one['tokens']:,}"]
    ]
    assert one["left"] in row and f"{one['predicted_loss']['fasc']:.2e}" in row
    monkeypatch.setattr(diagnosis_table, "_MANY", 7)
    print_diagnosis(found)
    out = capsys.readouterr().out
    dropped = sum(one["dropped"] for one in found.experts if one["block"] == 0)
    assert f"{dropped} their mean" in out and "0 – 3" in out
