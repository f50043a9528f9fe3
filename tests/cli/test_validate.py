"""``fasc validate``."""

import json

from tests.cli.conftest import CALIBRATION, refused


def test_forecasts_are_held_against_measurements(done, model_folder, text_file, tmp_path):
    png, file = tmp_path / "v.png", tmp_path / "v.json"
    options = ["--corpus", text_file, *CALIBRATION, "--damping", "1e-2", "--held-out", "4"]
    out, _ = done("validate", model_folder, *options, "--rank-fractions", "0.5", "--figure", png, "--json", file)
    raw = json.loads(file.read_text())
    assert raw["written_by"] == "fasc validation"
    assert len(raw["rows"]) == 8 * 2
    assert all(row["kl"] > 0 and row["half_j"] > 0 and row["half_j_held_out"] > 0 for row in raw["rows"])
    assert {"pearson", "spearman", "median_ratio"} <= set(raw["summary"][0])
    assert [plan["budget"] for plan in raw["plans"]] == [f"params{f}" for f in (0.95, 0.9, 0.8, 0.7, 0.6)]
    assert raw["provenance"]["calibration"]["sequences"] == 20
    assert png.stat().st_size > 1000
    assert "how well forecasts predicted" in out
    assert "the forecast of the whole model" in out
    assert out.strip().splitlines()[-1] == str(png)


def test_either_half_may_be_left_out(done, model_folder, text_file, tmp_path):
    file = tmp_path / "v.json"
    options = ["--corpus", text_file, *CALIBRATION, "--damping", "1e-2", "--held-out", "2", "--json", file]
    out, _ = done("validate", model_folder, *options, "--rank-fractions", "none", "--param-fractions", "0.7")
    assert (json.loads(file.read_text())["rows"], len(json.loads(file.read_text())["plans"])) == ([], 1)
    assert "how well forecasts predicted" not in out
    out, _ = done("validate", model_folder, *options, "--rank-fractions", "0.5", "--param-fractions", "none")
    assert (len(json.loads(file.read_text())["rows"]), json.loads(file.read_text())["plans"]) == (16, [])
    assert "the forecast of the whole model" not in out


def test_plans_of_few_bits_are_measured_and_say_what_to_expect_of_another(fasc, done, model_folder, text_file, tmp_path):
    moments, validation, made = tmp_path / "s.safetensors", tmp_path / "v.json", tmp_path / "p.json"
    done("collect", model_folder, "--corpus", text_file, *CALIBRATION, "--out", moments)
    options = ["--layouts", "dense", "--bits", "3,4,6", "--damping", "1e-2", "--statistics", moments]
    measure = ["--held-out", "2", "--rank-fractions", "none", "--max-kls", "0.05,0.2,0.6"]
    refused(fasc("validate", model_folder, *options, *measure, "--param-fractions", "0.8"), "means nothing beside --bits")
    done("validate", model_folder, *options, *measure, "--json", validation)
    rows = json.loads(validation.read_text())["plans"]
    assert [row["budget"] for row in rows] == ["kl0.05", "kl0.2", "kl0.6"]
    assert all(row["half_j_held_out"] is None for row in rows)
    out, _ = done("plan", model_folder, *options, "--max-kl", "0.3", "--validation", validation, "--json", made)
    assert "by 3 measured plans of this model" in out
    expected = json.loads(made.read_text())["expected"]
    assert expected["low"] <= expected["kl"] <= 0.3 * (1 + 1e-9)
