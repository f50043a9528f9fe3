"""``fasc validate``."""

import json

from tests.cli.conftest import CALIBRATION


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
