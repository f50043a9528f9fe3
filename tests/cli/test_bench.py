"""``fasc bench``."""

import json

from fasc.planning.options import BudgetConfig
from fasc.stages.evaluate import budget_of
from tests.cli.conftest import refused

SMALL = ["--prefill", "16", "--prompt", "4", "--decode", "4", "--batches", "1,2", "--repeats", "2"]


def test_a_compressed_model_is_timed_beside_the_dense_one(fasc, done, model_folder, statistics, tmp_path):
    out, file = tmp_path / "o", tmp_path / "b.json"
    done("compress", model_folder, "--param-fraction", "0.7", "--damping", "1e-2", "--statistics", statistics, "--out", out)
    shown, _ = done("bench", out, *SMALL, "--json", file)
    raw = json.loads(file.read_text())
    assert raw["written_by"] == "fasc speed"
    assert raw["provenance"]["speed"]["prefill"] == 16
    rows = {row["what"]: row for row in raw["comparisons"]}
    assert {"prefill, 1 × 16", "prefill, blocks alone", "decode, batch 1", "decode, batch 2", "weights on disk"} <= set(rows)
    assert all(row["low"] <= row["ratio"] <= row["high"] for row in rows.values())
    assert rows["weights on disk"]["ratio"] < 1
    assert "fewer parameters" in shown
    assert budget_of(str(out)) == BudgetConfig(param_fraction=0.7)
    assert budget_of(str(model_folder)) is None
    refused(fasc("bench", model_folder), "does not say", "--dense")


def test_layers_that_lie_on_disk_are_timed_too(done, compressed, places, tmp_path):
    done("bench", compressed, *SMALL, "--device-map", places, "--json", tmp_path / "b.json")
    rows = json.loads((tmp_path / "b.json").read_text())["comparisons"]
    assert all(row["ratio"] > 0 for row in rows)
