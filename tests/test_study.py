"""Recipes that name a verb or list others: two scales by the same code, resumable, with a page of verdicts made from results."""

import json
import shutil
import subprocess
import sys
import time
import tomllib
from pathlib import Path

import pytest

from fasc import study
from fasc.errors import FascError, StorageError, UsageError
from fasc.reporting.claims import JUDGES
from tests.conftest import kill_when
from tests.evaluation.benchmarks.test_files import ROWS, write

ROOT = Path(__file__).parents[1]
OF_THE_PROJECT = sorted([*(ROOT / "recipes" / "paper").glob("*.toml"), ROOT / "recipes" / "emergence.toml"])

TABLE_1 = """
[source]
model = "other"
[calibration]
corpus = "{text}"
sequences = 8
sequence_length = 16
[[methods]]
name = "fasc"
[[methods]]
name = "svd"
[[methods]]
name = "fasc-eq6"
[[budgets]]
rank_fraction = 0.5
[evaluation]
benchmarks = ["kl", "lama", "mmlu"]
corpus = "{text}"
context = 16
limit = 4
data_dir = "{data}"
[scale.paper]
models = ["owner/large"]
[scale.paper.evaluation]
limit = 5000
"""
TABLE_9 = """
verb = "validate"
[options]
methods = "fasc,svd"
rank-fractions = "0.5"
param-fractions = "none"
corpus = "{text}"
sequences = 8
sequence-length = 16
held-out = 2
"""


@pytest.fixture
def recipes(tmp_path, text_file):
    """A recipe that lists a run and a verb."""
    for name, rows in ROWS.items():
        write(tmp_path / "data", name, rows)
    places = {"text": text_file, "data": tmp_path / "data"}
    (tmp_path / "table-1.toml").write_text(TABLE_1.format(**places))
    (tmp_path / "table-9.toml").write_text(TABLE_9.format(**places))
    (tmp_path / "paper.toml").write_text('parts = ["table-1.toml", "table-9.toml"]')
    return tmp_path


def test_parts_are_carried_out_once_and_the_verdicts_name_what_is_missing(recipes, model_folder):
    out = recipes / "out"
    page = study.run_study(recipes / "paper.toml", out, model=str(model_folder))
    text = page.read_text(encoding="utf-8")
    assert "At half rank, FASC keeps more facts than SVD" in text
    assert "ρ predicts where FASC beats SVD" in text
    assert "emergence was not run" in text
    results = json.loads((out / "results.json").read_text())
    assert len(results["verdicts"]) + len(results["missing"]) == len(JUDGES)
    assert results["tables"]["table-1"]["fasc"]["scores"]
    (kept := recipes / "kept").mkdir()
    with pytest.raises(UsageError, match="is no page that could be kept"):
        study.judge_study(recipes / "paper.toml", kept, keep=True)
    shutil.copy(out / "results.json", kept)
    with pytest.raises(UsageError, match="is of scale small, not paper"):
        study.judge_study(recipes / "paper.toml", kept, scale="paper", keep=True)
    assert "ρ predicts where FASC beats SVD" in study.judge_study(recipes / "paper.toml", kept, keep=True).read_text()
    assert set(json.loads((kept / "results.json").read_text())["kept"]) == set(results["verdicts"])
    with pytest.raises(StorageError, match="verdicts of parts that have no result here"):
        study.judge_study(recipes / "paper.toml", kept)
    with pytest.raises(UsageError, match="lists no others"):
        study.judge_study(recipes / "table-1.toml", kept)
    before = {file: file.stat().st_mtime_ns for file in (out / "table-9").rglob("*.json")}
    study.run_study(recipes / "paper.toml", out, model=str(model_folder))
    assert {file: file.stat().st_mtime_ns for file in before} == before


def test_a_scale_is_laid_over_the_rest(recipes):
    (small,) = study.works(recipes / "table-1.toml", "small", None)
    (large,) = study.works(recipes / "table-1.toml", "paper", None)
    assert (small.model, small.recipe.evaluation.limit) == ("other", 4)
    assert (large.model, large.recipe.evaluation.limit, large.recipe.source.model) == ("owner/large", 5000, "owner/large")
    assert small.recipe.evaluation.context == large.recipe.evaluation.context


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('verb = "pull"', "unknown verb `pull`"),
        ('verb = "validate"\nwhat = 1', "unknown key `what`"),
        ('verb = "validate"\noptions = 3', "`options` is no table"),
        ('parts = "a.toml"', "`parts` is no list"),
        ('parts = ["gone.toml"]', "does not exist"),
        ('parts = ["a/x.toml", "b/x.toml"]', "two files called `x`"),
        ("[scale.huge]\n[source]", "scale `small` of huge"),
        ("[evaluation]\nlimit = 0", "limit"),
        ('source = "x"\nverb = "validate"', "`source` is no table"),
        ('models = 5\nverb = "validate"', "its models are no list of names"),
        ('models = ["--help"]\nverb = "validate"', "its models are no list of names"),
        ('models = "abc"\nverb = "validate"', "its models are no list of names"),
        ('verb = "validate"\nscale = 5', "`scale` is no table of tables"),
        ('verb = "validate"\n[scale]\nsmall = 5', "`scale` is no table of tables"),
        ('verb = "validate"\n[options]\nhelp = true', "option `help` cannot be True"),
        ('verb = "validate"\n[options]\nlimit = [1]', "option `limit` cannot be"),
        ("calibration = 3\n[scale.small.calibration]\nsequences = 8", "`calibration` is no table"),
        ('options = 3\nverb = "validate"\n[sweep]\nseed = [1]', "`options` is no table"),
        ('verb = "validate"\n[sweep]\ncorpus = ["a/b", "c"]', "cannot be the name of a result"),
        ("parts = []", "`parts` is no list"),
        ('parts = ["a/x.toml"]\nverb = "validate"', "`verb` means nothing there"),
        ('verb = "validate"\nsweep = 3', "`sweep` is no option with its values"),
        ('verb = "validate"\n[sweep]\nseed = 3', "`sweep` is no option with its values"),
        ('verb = "validate"\n[sweep]\nseed = [1]\nsequences = [8]', "`sweep` is no option with its values"),
    ],
)
def test_a_wrong_recipe_is_refused_before_anything_is_done(tmp_path, text, message):
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "x.toml").write_text('verb = "validate"')
    (tmp_path / "recipe.toml").write_text(text)
    with pytest.raises(UsageError, match=message):
        study.run_study(tmp_path / "recipe.toml", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_sweep_is_one_work_for_each_value(tmp_path):
    (tmp_path / "s.toml").write_text(
        'verb = "diagnose"\n[options]\nmethods = "svd"\n[sweep]\nseed = [1, 2]\n[scale.paper]\nmodels = ["a/b", "c/d"]'
    )
    small = study.works(tmp_path / "s.toml", "small", "owner/model")
    assert [work.name for work in small] == ["s-1", "s-2"]
    assert [work.command for work in small] == [
        ("diagnose", "owner/model", "--methods", "svd", "--seed", str(seed)) for seed in (1, 2)
    ]
    paper = [(work.name, work.model) for work in study.works(tmp_path / "s.toml", "paper", None)]
    assert paper == [("s-1", "a/b"), ("s-1", "c/d"), ("s-2", "a/b"), ("s-2", "c/d")]


def test_a_verb_that_fails_says_so_and_leaves_no_result(recipes, model_folder):
    for options, message in (('corpus = "nowhere.txt"', "nowhere.txt"), ('rank-fractions = "7"', "failed with exit code 2")):
        (recipes / "table-9.toml").write_text(f'verb = "validate"\n[options]\n{options}')
        with pytest.raises(FascError, match=message):
            study.run_study(recipes / "table-9.toml", recipes / "out", model=str(model_folder))
        assert not list((recipes / "out").rglob("result.json"))


@pytest.mark.parametrize("path", OF_THE_PROJECT, ids=lambda path: path.stem)
class TestRecipesOfThePaper:
    @pytest.mark.parametrize("scale", study.SCALES)
    def test_it_is_read_at_both_scales(self, path, scale):
        assert study.works(path, scale, None)

    def test_it_says_how_it_is_run(self, path):
        assert f"--out runs/{path.stem}" in path.read_text(encoding="utf-8")


def test_the_paper_lists_every_table():
    listed = tomllib.loads((ROOT / "recipes" / "paper.toml").read_text(encoding="utf-8"))["parts"]
    assert sorted(Path(part).name for part in listed) == sorted(path.name for path in OF_THE_PROJECT)


def test_what_is_not_ours_is_never_replaced(recipes, model_folder, tmp_path):
    for name in ("results.json", "verdicts.md"):
        out = tmp_path / f"with-{name}"
        out.mkdir()
        (out / name).write_text("mine")
        for act in (study.run_study, study.judge_study):
            with pytest.raises(StorageError, match=f"{name}` already exists and was not written by fasc"):
                act(recipes / "paper.toml", out, **({"model": str(model_folder)} if act is study.run_study else {}))
        assert [file.name for file in out.iterdir()] == [name]
        assert (out / name).read_text() == "mine"
    out = tmp_path / "verb"
    out.mkdir()
    (out / "result.json").write_text("mine")
    with pytest.raises(StorageError, match="holds no run of fasc"):
        study.run_study(recipes / "table-9.toml", out, model=str(model_folder))
    assert (out / "result.json").read_text() == "mine"


def test_a_result_of_other_contents_is_made_again_only_when_that_is_asked_for(recipes, model_folder, text_file):
    out = recipes / "out"
    study.run_study(recipes / "table-9.toml", out, model=str(model_folder))
    first = (out / "result.json").read_bytes()
    text_file.write_text(text_file.read_text() + " and other words " * 50)
    with pytest.raises(StorageError, match="text that has changed since"):
        study.run_study(recipes / "table-9.toml", out, model=str(model_folder))
    with pytest.raises(UsageError, match="failed with exit code 2"):
        study.run_study(recipes / "table-9.toml", out, model="no/such/model", overwrite=True)
    assert (out / "result.json").read_bytes() == first, "one that fails takes nothing away"
    study.run_study(recipes / "table-9.toml", out, model=str(model_folder), overwrite=True)
    assert (out / "result.json").read_bytes() != first


def test_contents_are_what_is_read_and_not_what_is_written(tmp_path, text_file, model_folder):
    read, written = tmp_path / "moments.safetensors", tmp_path / "front.svg"
    for file in (read, written):
        file.write_text("a")
    (tmp_path / "x.toml").write_text(
        f'verb = "validate"\n[options]\ncorpus = "{text_file}"\nstatistics = "{read}"\nfigure = "{written}"'
    )
    (work,) = study.works(tmp_path / "x.toml", "small", str(model_folder))

    def contents():
        return study._contents(work)

    first = contents()
    assert str(text_file) not in first, "a text counts by what is read of it"
    written.write_text("b")
    assert contents() == first
    read.write_text("b")
    assert contents() != first


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux ends a child with its parent")
def test_a_killed_run_leaves_no_child_that_writes_later(recipes, model_folder):
    out = recipes / "out"
    command = [
        sys.executable,
        "-m",
        "fasc",
        "run",
        str(recipes / "table-9.toml"),
        "--model",
        str(model_folder),
        "--out",
        str(out),
    ]
    kill_when(command, out, ".fasc-run.json")
    time.sleep(1)
    children = subprocess.run(["pgrep", "-f", str(out / "result.json")], capture_output=True, text=True, check=False)
    assert children.stdout == ""
    assert not (out / "result.json").exists()
