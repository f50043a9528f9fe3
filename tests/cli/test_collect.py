"""``fasc collect``."""

from fasc.statistics.moments import Need, Statistics
from tests.cli.conftest import CALIBRATION, refused


def test_results_go_to_stdout_and_progress_to_stderr(done, model_folder, text_file, tmp_path):
    file = tmp_path / "s.safetensors"
    out, err = done("collect", model_folder, "--methods", "fasc,svd", "--corpus", text_file, *CALIBRATION, "--out", file)
    assert out.strip() == str(file)
    assert "measuring moments" in err
    assert "left" in err


def test_a_diagnosis_needs_more_moments(done, model_folder, text_file, tmp_path):
    needs = {}
    for option in ([], ["--diagnosis"]):
        file = tmp_path / f"{len(option)}.safetensors"
        done("collect", model_folder, "--methods", "svd", "--corpus", text_file, *CALIBRATION, *option, "--out", file)
        needs[len(option)] = {Need(*need) for need in Statistics.load(file).meta["needs"]}
    assert needs[1] - needs[0] >= {Need("cross", "group"), Need("sequences", "group")}


def test_text_that_is_sampled_has_no_order_to_skip_in(fasc, model_folder, tmp_path):
    refused(fasc("collect", model_folder, "--corpus", "self", "--skip", "4", "--out", tmp_path / "x"), "another --seed")


def test_an_existing_file_is_replaced_only_if_that_is_asked_for(fasc, done, statistics, model_folder, text_file):
    before = statistics.read_bytes()
    again = ["collect", model_folder, "--corpus", text_file, *CALIBRATION, "--seed", "1", "--out", statistics]
    lines = refused(fasc(*again), "already exists", "--overwrite")
    assert len(lines) == 2, "no work was started"
    assert statistics.read_bytes() == before
    done(*again, "--overwrite")
    assert statistics.read_bytes() != before
