"""``fasc report`` and ``--report``: what is compared, where it goes, and what is refused in one line."""

import json

import pytest

pytest.importorskip("vl_convert", reason="the report's plots need vl-convert-python")

from tests.cli.conftest import CALIBRATION, refused
from tests.reporting.page.conftest import scores_of, write, write_run


@pytest.fixture
def run(measured, tmp_path):
    return write_run(tmp_path / "run", measured, fractions=(0.8,))


def test_a_run_and_a_checkpoint_are_compared_in_a_folder_of_their_own(done, run, compressed, tmp_path):
    write(tmp_path / "compressed.scores.json", {"scores": scores_of(0.6)})
    files = sorted(compressed.iterdir())
    printed, _ = done("report", run, compressed, "--out", tmp_path / "both")
    assert f"report: {tmp_path / 'both' / 'report.html'}" in printed
    html = (tmp_path / "both" / "report.html").read_text()
    assert "fasc@params0.8" in html and ">compressed<" in html
    assert sorted(compressed.iterdir()) == files, "a checkpoint holds nothing else"
    done("report", run, compressed, "--out", tmp_path / "both")


def test_a_run_has_its_report_in_its_own_folder_and_again(done, run):
    for _ in range(2):
        done("report", run)
    assert (run / "report.html").is_file() and "| fasc@params0.8 |" in (run / "report.md").read_text()


def test_a_diagnosis_beside_a_run_is_taken_before_its_own(done, run, model_folder, text_file):
    whole = json.loads((run / "diagnosis.json").read_text())
    poor = {**whole, "groups": [row | {"rho": None, "rho_debiased": None} for row in whole["groups"]]}
    write(run / "diagnosis.json", poor)
    done("report", run)
    assert "dependence of inputs and gradients" not in (run / "report.html").read_text()
    done("diagnose", model_folder, "--corpus", text_file, *CALIBRATION, "--json", run.with_name("run.diagnosis.json"))
    done("report", run)
    assert "dependence of inputs and gradients" in (run / "report.html").read_text()


def test_a_checkpoint_without_scores_shows_its_plan_and_says_that_nothing_is_measured(done, compressed, tmp_path):
    done("report", compressed, "--out", tmp_path / "report")
    html = (tmp_path / "report" / "report.html").read_text()
    assert f"--json {compressed}.scores.json` writes the file that is looked for" in html and "rank kept" in html
    text = (tmp_path / "report" / "report.md").read_text()
    assert "1 compressed model; the dense one&#x27;s scores are not here" in text or "the dense one's scores are not here" in text
    assert "fasc_recipe.toml" in text and "fasc_provenance.json" in text


def test_the_dense_models_scores_stand_beside_checkpoints(fasc, done, compressed, model_folder, text_file, tmp_path):
    scores = tmp_path / "dense.json"
    asked = ["--benchmarks", "perplexity", "--corpus", text_file, "--context", "16"]
    done("evaluate", model_folder, *asked, "--json", scores)
    done("evaluate", compressed, *asked, "--json", tmp_path / "compressed.scores.json")
    out, _ = done("report", compressed, "--dense", scores, "--out", tmp_path / "report")
    assert "beside the dense one" in out
    text = (tmp_path / "report" / "report.md").read_text()
    assert "\n| dense |" in text
    assert "# What compression kept: tiny-llama\n" in text
    refused(fasc("report", compressed, "--dense", tmp_path / "absent.json", "--out", tmp_path / "report"), "absent.json")
    own = tmp_path / "compressed.scores.json"
    refused(fasc("report", compressed, "--dense", own, "--out", tmp_path / "report"), "which was compressed from")
    other = tmp_path / "other.json"
    told = json.loads(scores.read_text())
    other.write_text(json.dumps(told | {"model": told["model"] | {"name": "another", "fingerprint": "0"}}))
    refused(fasc("report", compressed, "--dense", other, "--out", tmp_path / "report"), "holds scores of another")
    own.write_text(scores.read_text())
    refused(fasc("report", compressed, "--out", tmp_path / "report"), "a dense model, where those of")


def test_what_was_measured_in_another_way_stands_in_a_column_of_its_own(done, compressed, model_folder, text_file, tmp_path):
    asked = ["--benchmarks", "facts,perplexity", "--corpus", text_file]
    done("evaluate", model_folder, *asked, "--context", "16", "--limit", "60", "--json", tmp_path / "dense.json")
    done("evaluate", compressed, *asked, "--context", "32", "--limit", "40", "--json", tmp_path / "compressed.scores.json")
    out, _ = done("report", compressed, "--dense", tmp_path / "dense.json", "--out", tmp_path / "report")
    assert "as many right answers" not in out, "of other items no ratio is made"
    text = (tmp_path / "report" / "report.md").read_text()
    (head,) = [line for line in text.splitlines() if line.startswith("| model |")]
    assert "| perplexity ↓ | perplexity (2) ↓ |" in head.replace("| facts ↑ ", "").replace("| facts (2) ↑ ", "")
    assert "- **perplexity (2)**" in text
    assert "context 32" in text and "context 16" in text


def test_what_is_no_run_and_no_checkpoint_is_refused(fasc, tmp_path):
    refused(fasc("report", tmp_path / "absent"), "is no folder")
    refused(fasc("report", tmp_path), "no scores")
    write(tmp_path / "x" / "scores.json", [1, 2])
    refused(fasc("report", tmp_path), "no scores of fasc")
    assert {file.name for file in tmp_path.iterdir()} == {"x"}


@pytest.mark.parametrize(
    ("part", "change", "words"),
    [
        ("scores", lambda rows: rows[0].update(value="many"), ["scores.json", "row 0", "value"]),
        ("scores", lambda rows: rows[1].pop("low"), ["row 1", "low"]),
        ("scores", lambda rows: rows.append(3), ["no object"]),
        ("speed", lambda rows: rows[0].pop("ratio"), ["speed.json", "ratio"]),
        ("samples", lambda rows: rows[0].update(prompt=None), ["samples.json", "prompt"]),
    ],
)
def test_a_damaged_row_is_named(fasc, run, part, change, words):
    file = run / "fasc@params0.8" / f"{part}.json"
    content = json.loads(file.read_text())
    change(next(iter(content.values())))
    write(file, content)
    refused(fasc("report", run), *words)
    assert not (run / "report.html").exists()


@pytest.mark.parametrize("number", ["NaN", "Infinity", "1e999"])
def test_a_number_that_is_not_finite_is_refused(fasc, run, number):
    file = run / "fasc@params0.8" / "scores.json"
    file.write_text(file.read_text().replace('"value": 25.0', f'"value": {number}'))
    refused(fasc("report", run), "scores.json", "no finite number")


def test_a_plan_of_another_version_and_scores_without_a_plan_are_refused(fasc, run):
    file = run / "fasc@params0.8" / "plan.json"
    content = json.loads(file.read_text())
    write(file, content | {"format": 1})
    refused(fasc("report", run), "plan.json", "format 1")
    file.unlink()
    refused(fasc("report", run), "no plan")


def test_a_folder_or_file_of_the_users_is_not_replaced(fasc, done, run, tmp_path):
    write(tmp_path / "mine" / "notes.json", [])
    refused(fasc("report", run, "--out", tmp_path / "mine"), "holds no report of fasc")
    (run / "report.html").write_text("<p>mine</p>")
    refused(fasc("report", run), "was not written by fasc")
    assert (run / "report.html").read_text() == "<p>mine</p>"


def test_without_the_plotting_library_one_line_says_what_to_install(fasc, run, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "vl_convert", None)
    refused(fasc("report", run), "vl-convert-python", "fasc[report]")


def test_verbs_write_their_part_as_a_page(done, model_folder, text_file, tmp_path):
    pages = {name: tmp_path / f"{name}.html" for name in ("compress", "diagnose", "validate", "bench")}
    small = tmp_path / "small"
    corpus = ("--corpus", text_file, *CALIBRATION, "--damping", "1e-2")
    done("compress", model_folder, "--param-fraction", "0.7", *corpus, "--out", small, "--report", pages["compress"])
    done("diagnose", model_folder, *corpus, "--report", pages["diagnose"])
    whole = ("--rank-fractions", "0.5", "--param-fractions", "0.7", "--held-out", "4")
    done("validate", model_folder, *corpus, *whole, "--report", pages["validate"])
    sizes = ("--prefill", "8", "--prompt", "4", "--decode", "4", "--batches", "1", "--repeats", "2")
    done("bench", small, *sizes, "--report", pages["bench"])
    wanted = {
        "compress": "rank kept",
        "diagnose": "Energy by rank",
        "validate": "Forecast and measured",
        "bench": "Speed and memory",
    }
    for name, words in wanted.items():
        html = pages[name].read_text()
        assert words in html and "How it was measured and made" in html
    done("diagnose", model_folder, *corpus, "--report", pages["diagnose"])  # a page of ours may be replaced


def test_a_page_inside_the_checkpoint_or_over_a_file_of_the_users_is_refused_before_the_work(
    fasc, model_folder, text_file, tmp_path
):
    small, mine = tmp_path / "small", tmp_path / "mine.html"
    start = ("compress", model_folder, "--param-fraction", "0.7", "--corpus", text_file, "--out", small, "--report")
    refused(fasc(*start, small / "report.html"), "inside --out")
    mine.write_text("<p>mine</p>")
    refused(fasc(*start, mine), "was not written by fasc")
    assert not small.exists()
