"""``fasc subspace-overlap``."""

import json

from tests.cli.conftest import CALIBRATION, refused


def test_corpora_and_seeds_are_compared_beside_chance_and_the_hessian(done, model_folder, text_file, tmp_path):
    file = tmp_path / "overlap.json"
    options = ["--corpora", f"{text_file},facts", "--seeds", "0,1", *CALIBRATION, "--damping", "1e-3"]
    out, _ = done("subspace-overlap", model_folder, *options, "--hessian", "3", "--hessian-groups", "2", "--json", file)
    raw = json.loads(file.read_text())
    assert raw["written_by"] == "fasc overlap"
    assert len(raw["summary"]) == 6 * 3
    assert len(raw["hessian"]) == 2
    assert set(raw["provenance"]["calibrations"]) == {f"{corpus} #{seed}" for corpus in (text_file, "facts") for seed in (0, 1)}
    assert "chance" in out


def test_one_calibration_leaves_nothing_to_compare(fasc, model_folder, text_file):
    lines = refused(fasc("subspace-overlap", model_folder, "--corpora", text_file, "--seeds", "0"), "leaves nothing to compare")
    assert len(lines) == 2, "no work was started"
