"""``fasc diagnose``."""

import csv
import json

import pytest

from tests.cli.conftest import CALIBRATION, refused


def test_a_row_per_group_is_printed_written_and_drawn(done, model_folder, text_file, tmp_path):
    figures, table, file = tmp_path / "figures", tmp_path / "d.csv", tmp_path / "d.json"
    options = ["--corpus", text_file, *CALIBRATION, "--damping", "1e-2"]
    outputs = ["--figures", figures, "--csv", table, "--json", file]
    out, _ = done("diagnose", model_folder, *options, *outputs)
    raw = json.loads(file.read_text())
    assert set(raw) == {"written_by", "groups", "meta"}
    rows = raw["groups"]
    assert len(rows) == 8
    assert {"group", "block", "kind", "input", "gradient", "methods"} <= set(rows[0])
    assert all(0 < row["rho"] <= 1 and row["rho_floor"] > 0 and row["rho_low"] <= row["rho"] <= row["rho_high"] for row in rows)
    assert rows[0]["predicted_loss"]["fasc"] > 0
    assert rows[0]["excluded"] == "attention of blocks 0-2"
    curve = rows[0]["methods"]["fasc"]["curve"]
    assert curve[0] == pytest.approx(1)
    assert curve[-1] == pytest.approx(0, abs=1e-9)
    assert all(a >= b for a, b in zip(curve, curve[1:], strict=False))
    with table.open() as stream:
        assert [row["group"] for row in csv.DictReader(stream)] == [row["group"] for row in rows]
    assert {path.name for path in figures.iterdir()} == {"rho.png", "angles.png"}
    assert "of noise alone" in out
    assert out.strip().splitlines()[-2:] == [str(figures / "rho.png"), str(figures / "angles.png")]
    done("diagnose", model_folder, *options, *outputs)  # our own files may be replaced
    assert json.loads(file.read_text())["groups"] == rows


def test_stored_moments_need_no_calibration_and_nothing_is_excluded_on_request(done, model_folder, text_file, tmp_path):
    moments, file = tmp_path / "s.safetensors", tmp_path / "d.json"
    done("collect", model_folder, "--corpus", text_file, *CALIBRATION, "--diagnosis", "--out", moments)
    options = ["--statistics", moments, "--damping", "1e-2", "--exclusions", "none", "--json", file]
    _, err = done("diagnose", model_folder, *options)
    assert "measuring" not in err
    raw = json.loads(file.read_text())
    assert {row["excluded"] for row in raw["groups"]} == {None}
    assert all(row["rho"] > 0 for row in raw["groups"])


def test_files_of_the_user_are_not_replaced(fasc, model_folder, text_file, tmp_path):
    (tmp_path / "figures").mkdir()
    for option, value, name in (
        ("--csv", "salaries.csv", "salaries.csv"),
        ("--json", "package.json", "package.json"),
        ("--figures", "figures", "figures/rho.png"),
    ):
        mine = tmp_path / name
        mine.write_text("precious")
        refused(fasc("diagnose", model_folder, option, tmp_path / value), "was not written by fasc")
        assert mine.read_text() == "precious"
    lines = refused(fasc("diagnose", model_folder, "--corpus", text_file, "--csv", text_file), "what the command reads")
    assert len(lines) == 2, "no work was started"
