"""``fasc plan``."""

import json

import pytest

from tests.cli.conftest import CALIBRATION, refused


def test_before_calibration_a_plan_is_uniform_and_has_no_forecast(done, model_folder, tmp_path):
    file = tmp_path / "plan.json"
    out, _ = done("plan", model_folder, "--param-fraction", "0.8", "--json", file)
    raw = json.loads(file.read_text())
    assert raw["written_by"] == "fasc plan"
    assert raw["allocation"] == "uniform"
    assert 0.75 < raw["totals"]["param_fraction"] <= 0.8
    assert raw["totals"]["predicted_loss"] is None
    assert "q_proj+k_proj+v_proj" in out
    assert "80.0% of dense" in out or "79." in out


@pytest.mark.parametrize(
    "budget",
    [
        ["--param-fraction", "0.8"],
        ["--model-fraction", "0.9"],
        ["--max-bytes", "90kB"],
        ["--max-perplexity-increase", "5%"],
        ["--max-kl", "0.5"],
    ],
    ids=lambda budget: budget[0].removeprefix("--"),
)
def test_with_statistics_every_budget_is_allocated_by_the_forecast(done, model_folder, statistics, tmp_path, budget):
    file = tmp_path / "plan.json"
    options = [*budget, "--statistics", statistics, "--damping", "1e-2", "--rank-multiple", "1", "--json", file]
    out, _ = done("plan", model_folder, *options)
    raw = json.loads(file.read_text())
    assert raw["allocation"] == "fisher"
    assert raw["totals"]["predicted_loss"] > 0
    assert raw["options"]["damping"] == 1e-2
    factors = [edit for edit in raw["edits"] if edit["edit"] == "factor"]
    assert factors
    assert all({"layout", "rank", "layers", "predicted_loss"} <= set(edit) for edit in factors)
    assert "perplexity of the calibration text" in out


def test_budgets_that_cannot_be_kept_are_refused(fasc, model_folder, statistics):
    refused(fasc("plan", model_folder, "--max-kl", "0.1"), "no statistics")
    refused(fasc("plan", model_folder, "--param-fraction", "0.5", "--max-kl", "0.1"), "--param-fraction", "are both budgets")
    refused(fasc("plan", model_folder, "--max-bytes", "lots"), "--max-bytes", "`lots`")
    refused(fasc("plan", model_folder, "--param-fraction", "1.2"), "--param-fraction is 1.2, outside (0, 1]")
    options = ["--method", "svd", "--param-fraction", "0.8", "--allocation", "fisher", "--statistics", statistics]
    refused(fasc("plan", model_folder, *options), "differs from layer to layer")


@pytest.mark.parametrize("value", ["nan", "1e400", "-1MB", "0", "inf", "12 apples"])
def test_sizes_that_are_no_sizes_are_refused(fasc, model_folder, value):
    refused(fasc("plan", model_folder, "--max-bytes", value), "--max-bytes")
    refused(fasc("plan", model_folder, "--max-perplexity-increase", value), "--max-perplexity-increase")


def test_a_plan_is_forecast_on_text_that_did_not_calibrate(fasc, done, model_folder, text_file, tmp_path):
    options = ["--corpus", text_file, "--sequence-length", "16", "--sequences"]
    seen, unseen = tmp_path / "seen.safetensors", tmp_path / "unseen.safetensors"
    done("collect", model_folder, *options, "40", "--out", seen, "--methods", "fasc")
    done("collect", model_folder, *options, "40", "--skip", "40", "--out", unseen, "--methods", "fasc")
    budget = ["--param-fraction", "0.7", "--rank-multiple", "1", "--damping", "1e-3", "--statistics", seen]
    losses = {}
    for name, more in {"seen": [], "unseen": ["--held-out", unseen]}.items():
        file = tmp_path / f"{name}.json"
        done("plan", model_folder, *budget, *more, "--json", file)
        losses[name] = json.loads(file.read_text())["totals"]["predicted_loss"]
    assert losses["unseen"] > losses["seen"] > 0, "a subspace looks better on the tokens that chose it"
    refused(fasc("plan", model_folder, *budget, "--held-out", seen), "the very tokens that calibrate")
    done("compress", model_folder, *budget, "--held-out", unseen, "--out", tmp_path / "out")
    raw = json.loads((tmp_path / "out" / "fasc_plan.json").read_text())
    assert raw["totals"]["predicted_loss"] == pytest.approx(losses["unseen"])


def test_a_selection_is_part_of_the_plan(fasc, done, model_folder, text_file, tmp_path):
    moments, file = tmp_path / "s.safetensors", tmp_path / "plan.json"
    done("collect", model_folder, "--corpus", text_file, *CALIBRATION, "--diagnosis", "--out", moments)
    options = ["--rank-fraction", "0.5", "--damping", "1e-2", "--selection"]
    for by in ("rho", "predicted"):
        done("plan", model_folder, *options, by, "--statistics", moments, "--json", file)
        assert {edit["selection"]["by"] for edit in json.loads(file.read_text())["edits"]} == {by}
    refused(fasc("plan", model_folder, *options, "kl", "--statistics", moments), "held-out", "fasc compress")
    refused(fasc("plan", model_folder, *options, "rho"), "no statistics")


def test_a_file_that_is_not_ours_is_not_replaced_by_the_json(fasc, done, model_folder, tmp_path):
    mine = tmp_path / "package.json"
    mine.write_text('{"name": "mine"}')
    lines = refused(fasc("plan", model_folder, "--json", mine), "was not written by fasc")
    assert len(lines) == 2, "no work was started"
    assert mine.read_text() == '{"name": "mine"}'
    ours = tmp_path / "plan.json"
    done("plan", model_folder, "--rank-fraction", "0.5", "--json", ours)
    done("plan", model_folder, "--rank-fraction", "0.25", "--json", ours)
    assert json.loads(ours.read_text())["totals"]["rank_fraction"] == pytest.approx(0.25)


def test_a_config_alone_says_what_a_run_needs(done, fasc, model_folder, tmp_path):
    file = tmp_path / "needs.json"
    config = tmp_path / "config.json"
    config.write_bytes((model_folder / "config.json").read_bytes())
    out, _ = done("plan", config, "--config-only", "--param-fraction", "0.8", "--memory", "24GB", "--json", file)
    assert "`fasc collect --max-memory 24GB` reads the text in 1 pass" in " ".join(out.split())
    found = json.loads(file.read_text())
    assert (found["passes"], found["limit"]) == (1, 24 * 10**9)
    assert found["stages"]["load the result"]["total"] == sum(found["stages"]["load the result"]["parts"].values())
    small, _ = done("plan", model_folder, "--config-only", "--memory", "1MB")
    assert "does not fit in any number of passes" in small
    refused(fasc("plan", config, "--config-only", "--memory", "much"), "--memory", "24GB")
    refused(fasc("plan", config, "--config-only", "--max-kl", "0.1"), "no statistics")
    refused(fasc("plan", config, "--config-only", "--statistics", config), "--statistics belongs to one")
    refused(fasc("plan", model_folder, "--memory", "24GB"), "--memory is for --config-only")


def test_a_list_with_spaces_is_told_of_commas(fasc, model_folder):
    refused(fasc("evaluate", model_folder, "--benchmarks", "facts", "kl"), "lists take commas and no spaces")


def test_a_compressed_model_is_not_planned_again(fasc, compressed):
    for more in ([], ["--config-only"]):
        refused(fasc("plan", compressed, "--param-fraction", "0.8", *more), "compressed already")


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    "sizes", [{"hidden_size": 0}, {"intermediate_size": 0}, {"num_key_value_heads": 10**12}, {"num_hidden_layers": 10**12}]
)
def test_a_config_of_impossible_sizes_is_refused(fasc, model_folder, tmp_path, sizes):
    file = tmp_path / "config.json"
    file.write_text(json.dumps(json.loads((model_folder / "config.json").read_text()) | sizes))
    refused(fasc("plan", file, "--config-only", "--param-fraction", "0.8"), "config.json")
