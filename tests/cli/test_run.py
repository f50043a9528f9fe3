"""``fasc run`` and ``fasc report``: a run reports, goes on where it stopped, heals, and touches nothing that is not its own."""

import json
import subprocess
import sys

import pytest

from tests.cli.conftest import refused
from tests.conftest import kill_when


def write_recipe(path, model_folder, text_file, more=""):
    path.write_text(f"""
[source]
model = "{model_folder}"
[calibration]
corpus = "{text_file}"
sequences = 20
sequence_length = 16
[[methods]]
name = "svd"
[[methods]]
name = "fasc"
damping = 1e-3
{more}
[evaluation]
benchmarks = ["facts", "kl", "perplexity"]
corpus = "{text_file}"
context = 16
limit = 10
""")
    return path


@pytest.fixture
def recipe(model_folder, text_file, tmp_path):
    return write_recipe(tmp_path / "recipe.toml", model_folder, text_file)


@pytest.fixture(scope="module")
def finished(model_folder, tmp_path_factory):
    """A run that nobody disturbed, by another process."""
    folder = tmp_path_factory.mktemp("finished")
    text = folder / "text.txt"
    text.write_text(" ".join(f"word{i * i % 97} and {i % 13} more." for i in range(600)))
    recipe = write_recipe(folder / "recipe.toml", model_folder, text)
    command = [sys.executable, "-m", "fasc", "run", str(recipe), "--out", str(folder / "run")]
    subprocess.run(command, check=True, capture_output=True)
    return recipe, folder / "run"


def weights(run):
    return {file.relative_to(run): file.read_bytes() for file in sorted(run.rglob("*/model/*.safetensors"))}


def scores(run):
    return {file.parent.name: json.loads(file.read_text())["scores"] for file in sorted(run.glob("*/scores.json"))}


def times(run):
    return {file: file.stat().st_mtime_ns for file in run.rglob("*.safetensors")}


def test_a_run_reports_and_goes_on_where_it_stopped(fasc, done, recipe, tmp_path):
    out = tmp_path / "run"
    table, _ = done("run", recipe, "--out", out)
    assert all(name in table for name in ("dense", "svd", "fasc", f"report: {out / 'report.md'}"))
    report = (out / "report.md").read_text()
    assert "| fasc |" in report
    assert "How it was made" in report
    assert (out / "figures" / "summary.png").read_bytes().startswith(b"\x89PNG")
    before = times(out)
    (out / "fasc" / "scores.json").unlink()
    _, err = done("run", recipe, "--out", out)
    assert times(out) == before
    assert "measuring moments" not in err
    assert "going on where it stopped" in err
    assert (out / "fasc" / "scores.json").is_file()


def test_another_recipe_needs_overwrite_and_replaces_only_what_the_run_wrote(fasc, done, recipe, tmp_path):
    out = tmp_path / "run"
    done("run", recipe, "--out", out)
    (out / "notes.txt").write_text("precious")
    recipe.write_text(recipe.read_text() + "[[budgets]]\nrank_fraction = 0.25\n")
    lines = refused(fasc("run", recipe, "--out", out), "another recipe", "--overwrite")
    assert len(lines) == 2, "no work was started"
    for place in ("fasc/mine.txt", "fasc/model/mine.txt", "figures/mine.txt"):
        (out / place).write_text("precious")
        refused(fasc("run", recipe, "--out", out, "--overwrite"), "mine.txt")
        assert (out / place).read_text() == "precious"
        (out / place).unlink()
    done("run", recipe, "--out", out, "--overwrite")
    assert json.loads((out / "fasc" / "plan.json").read_text())["totals"]["rank_fraction"] == pytest.approx(0.25)
    assert (out / "notes.txt").read_text() == "precious"
    assert {file.name for file in tmp_path.iterdir()} == {"recipe.toml", "run", "text.txt"}


def test_what_a_user_has_put_into_a_damaged_result_is_not_removed(fasc, done, recipe, tmp_path):
    out = tmp_path / "run"
    done("run", recipe, "--out", out)
    note = out / "fasc" / "model" / "NOTES.md"
    note.write_text("precious")
    (out / "fasc" / "plan.json").unlink()
    refused(fasc("run", recipe, "--out", out), "NOTES.md")
    assert note.read_text() == "precious"


def test_a_run_is_refused_before_the_work_where_it_reads_or_finds_no_rival(fasc, recipe, model_folder, text_file, tmp_path):
    refused(fasc("run", recipe, "--out", model_folder / "run"), "lies inside the model that the command reads")
    recipe.write_text(f'rivals = ["{tmp_path / "nothing"}"]\n' + recipe.read_text())
    assert len(refused(fasc("run", recipe, "--out", tmp_path / "run"), "nothing")) == 2
    assert not (tmp_path / "run").exists()


def test_a_failed_overwrite_leaves_the_old_run(fasc, done, recipe, tmp_path):
    out = tmp_path / "run"
    done("run", recipe, "--out", out)
    before = {file: file.read_bytes() for file in out.rglob("*") if file.is_file()}
    recipe.write_text(recipe.read_text().replace("sequences = 20", "sequences = 99999"))
    refused(fasc("run", recipe, "--out", out, "--overwrite"), "too short")
    assert {file: file.read_bytes() for file in out.rglob("*") if file.is_file()} == before


@pytest.mark.parametrize("overwrite", [[], ["--overwrite"]], ids=["plain", "overwrite"])
def test_a_folder_that_holds_no_run_is_left_alone(fasc, recipe, model_folder, tmp_path, overwrite):
    """Even if it holds files of the names that a run has."""
    mine = tmp_path / "project"
    for name in ("recipe.toml", "package.json", "fasc/plan.json", "svd/work/x"):
        (mine / name).parent.mkdir(parents=True, exist_ok=True)
        (mine / name).write_text("precious")
    lines = refused(fasc("run", recipe, "--out", mine, *overwrite), "holds no run")
    assert len(lines) == 2, "no work was started"
    assert {str(file.relative_to(mine)) for file in mine.rglob("*") if file.is_file()} == {
        "recipe.toml", "package.json", "fasc/plan.json", "svd/work/x",
    }  # fmt: skip
    assert all(file.read_text() == "precious" for file in mine.rglob("*") if file.is_file())


def test_what_the_user_put_where_the_next_run_writes_is_not_replaced(fasc, done, recipe, tmp_path):
    out = tmp_path / "run"
    done("run", recipe, "--out", out)
    (out / "whitened").mkdir()
    (out / "whitened" / "mine.txt").write_text("precious")
    recipe.write_text(recipe.read_text() + '[[methods]]\nname = "whitened"\n')
    refused(fasc("run", recipe, "--out", out, "--overwrite"), "whitened", "is not the run's")
    assert (out / "whitened" / "mine.txt").read_text() == "precious"


@pytest.mark.parametrize(
    "label",
    ["..", ".", "../../x", "/tmp/x", "a/b", "figures", "dense", "Dense", "report.md", "recipe.toml", "", " ", "x" * 200, "a\nb"],
)
def test_a_label_that_is_no_name_of_a_result_is_refused(fasc, recipe, tmp_path, label):
    recipe.write_text(recipe.read_text() + f'[[methods]]\nname = "fasc"\nlabel = {json.dumps(label)}\n')
    before = {file.name for file in tmp_path.iterdir()}
    lines = refused(fasc("run", recipe, "--out", tmp_path / "run"))
    assert len(lines) == 2
    assert {file.name for file in tmp_path.iterdir()} == before


def test_two_results_of_one_name_are_refused(fasc, recipe, tmp_path):
    plain = recipe.read_text()
    recipe.write_text(plain + '[[methods]]\nname = "fasc"\ndamping = 1e-2\n')
    refused(fasc("run", recipe, "--out", tmp_path / "run"), "`fasc`", "label")
    recipe.write_text(plain + '[[methods]]\nname = "fasc"\nlabel = "FASC"\n')
    refused(fasc("run", recipe, "--out", tmp_path / "run"), "label")
    recipe.write_text(plain + '[[methods]]\nname = "fasc"\nlabel = "svd-recovered"\n[recovery]\n')
    refused(fasc("run", recipe, "--out", tmp_path / "run"), "`svd-recovered`")
    assert not (tmp_path / "run").exists()


def test_a_run_recovers_what_the_recipe_says_and_scores_it_beside_the_rest(done, recipe, text_file, tmp_path):
    out = tmp_path / "run"
    recipe.write_text(
        recipe.read_text()
        + '[[methods]]\nname = "magnitude"\n[[budgets]]\nparam_fraction = 0.6\n'
        + f'[recovery]\ncorpus = "{text_file}"\nsequences = 40\nsequence_length = 16\nbatch_tokens = 64\nlearning_rate = 3e-3\n'
    )
    table, _ = done("run", recipe, "--out", out)
    rows = {folder.parent.name for folder in out.glob("*/scores.json")}
    assert rows == {"dense", "svd", "svd-recovered", "fasc", "fasc-recovered", "magnitude"}, "masks have no layers to train"
    assert all(row in table for row in rows)
    kl = {
        name: next(s for s in found if s["benchmark"] == "kl")["value"] for name, found in scores(out).items() if name != "dense"
    }
    assert kl["fasc-recovered"] < kl["fasc"]
    assert "recovery" not in json.loads((out / "fasc" / "model" / "fasc_provenance.json").read_text())
    assert json.loads((out / "fasc-recovered" / "model" / "fasc_provenance.json").read_text())["recovery"]["tokens"] == 640
    before = times(out)
    (out / "fasc-recovered" / "scores.json").unlink()
    done("run", recipe, "--out", out)
    assert times(out) == before
    assert (out / "fasc-recovered" / "scores.json").is_file()


def test_a_run_writes_what_the_models_say_and_times_them_where_the_recipe_asks(done, recipe, tmp_path):
    out = tmp_path / "run"
    recipe.write_text(recipe.read_text() + 'prompts = ["the quick", "five"]\ncontinuation = 4\nspeed = true\n')
    table, _ = done("run", recipe, "--out", out)
    assert "what each model writes" in table
    assert "the quick …" in table
    assert "decoding" in table
    for name in ("dense", "svd", "fasc"):
        samples = json.loads((out / name / "samples.json").read_text())["samples"]
        assert [sample["prompt"] for sample in samples] == ["the quick", "five"]
    assert not (out / "dense" / "speed.json").exists()
    assert all(row["ratio"] > 0 for row in json.loads((out / "fasc" / "speed.json").read_text())["comparisons"])


@pytest.mark.parametrize("damage", ["removed", "truncated", "no config"])
def test_a_run_whose_checkpoint_was_damaged_or_removed_heals(done, finished, tmp_path, damage):
    import shutil

    recipe, whole = finished
    out = tmp_path / "run"
    shutil.copytree(whole, out)
    file = out / "fasc" / "model" / "model.safetensors"
    if damage == "removed":
        shutil.rmtree(out / "fasc" / "model")
    elif damage == "truncated":
        file.write_bytes(file.read_bytes()[:1000])
    else:
        (out / "fasc" / "model" / "config.json").unlink()
    others = times(out / "svd")
    done("run", recipe, "--out", out)
    assert weights(out) == weights(whole)
    assert scores(out) == scores(whole)
    assert times(out / "svd") == others, "the rest was not made again"


@pytest.mark.parametrize(
    "moment",
    [
        "statistics.safetensors",
        "diagnosis.json",
        "dense/scores.json",
        "svd/model/config.json",
        "svd/plan.json",
        "fasc/scores.json",
    ],
)
def test_a_run_that_is_killed_at_any_moment_ends_as_one_that_nobody_disturbed(done, finished, tmp_path, moment):
    """SIGKILL as soon as a file stands; the same command finishes the run, and its weights and scores are the same bits."""
    recipe, whole = finished
    out = tmp_path / "run"
    kill_when([sys.executable, "-m", "fasc", "run", str(recipe), "--out", str(out)], out, moment)
    assert (out / moment).exists()
    _, err = done("run", recipe, "--out", out)
    assert weights(out) == weights(whole)
    assert scores(out) == scores(whole)
    assert {file.name for file in tmp_path.iterdir()} == {"run"}
    names = {str(file.relative_to(out)) for file in out.rglob("*") if "partial" in file.name or file.name == "work"}
    assert not names, "no litter"


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("[calibration]\nsequence = 3\n", ["calibration.sequence", "no such field"]),
        ("[calibration\n", ["not valid TOML", "line 1"]),
        ("[[budgets]]\nrank_fraction = 2.0\n", ["outside (0, 1]"]),
        ("[[methods]]\nname = 'fas'\n", ["unknown method"]),
        ("[[methods]]\nname = 'fasc'\ngate = 'rho'\n", ["method `fasc`", "`gate`", "no such field"]),
        ("methods = []\n", ["methods"]),
        ("\ufeff[calibration]\nsequence = 3\n", ["calibration.sequence"]),
    ],
)
def test_bad_recipes_name_the_field(fasc, tmp_path, text, words):
    (tmp_path / "r.toml").write_text(text)
    refused(fasc("run", tmp_path / "r.toml", "--out", tmp_path / "out"), *words)
    assert not (tmp_path / "out").exists()


def test_a_rival_is_scored_beside_and_weighs_what_it_weighs(fasc, done, model_folder, text_file, tmp_path):
    from fasc.reporting.entries import read_entries
    from tests.conftest import tiny_model

    other = tmp_path / "rival"
    larger = tiny_model(layers=3)
    larger.save_pretrained(other)
    for file in model_folder.glob("*token*"):
        (other / file.name).write_bytes(file.read_bytes())
    recipe = write_recipe(tmp_path / "recipe.toml", model_folder, text_file)
    recipe.write_text(f'rivals = ["{other}"]\n' + recipe.read_text())
    out = tmp_path / "run"
    table, _ = done("run", recipe, "--out", out)
    assert "rival" in table
    rival = {entry.name: entry for entry in read_entries(out)}["rival"]
    assert rival.rival.parameters == larger.num_parameters()
    assert rival.rival.bytes == larger.num_parameters() * larger.dtype.itemsize
    assert {score["benchmark"] for score in rival.scores} == {"facts", "perplexity"}
    page, _ = done("report", out, "--out", tmp_path / "page")
    assert "rival" in (tmp_path / "page" / "report.md").read_text()
    (out / "rival" / "rival.json").write_text('{"model": "x", "parameters": -1}')
    refused(fasc("report", out, "--out", tmp_path / "again"), "rival.json")


def test_two_models_of_one_name_cannot_be_rivals(fasc, model_folder, text_file, tmp_path):
    recipe = write_recipe(tmp_path / "recipe.toml", model_folder, text_file)
    recipe.write_text('rivals = ["a/same", "b/same"]\n' + recipe.read_text())
    refused(fasc("run", recipe, "--out", tmp_path / "run"), "would be called `same`")
