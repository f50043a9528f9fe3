"""Recipes that name a verb or list others: two scales by the same code, resumable, with a page of verdicts made from results."""

import json
import tomllib
from pathlib import Path

import pytest

from fasc import study
from fasc.errors import UsageError
from fasc.reporting.claims import JUDGES
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
    (recipes / "table-9.toml").write_text('verb = "validate"\n[options]\ncorpus = "nowhere.txt"')
    with pytest.raises(UsageError, match="failed with exit code 2"):
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
