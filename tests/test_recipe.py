"""Recipes: the union of all options, read from TOML; those of the project are whole."""

import re
import tomllib
from pathlib import Path

import pytest
import tomli_w

from fasc.cli.run import DEMO
from fasc.errors import UsageError
from fasc.evaluation.registry import BENCHMARKS
from fasc.planning.needs import needs_for
from fasc.planning.options import MethodConfig
from fasc.recipe import Recipe, read_recipe
from fasc.study import is_study

ROOT = Path(__file__).parents[1]
EVERY = sorted((ROOT / "recipes").rglob("*.toml"))
RECIPES = [
    path for path in EVERY if path.parent.name == "recipes" and not is_study(tomllib.loads(path.read_text(encoding="utf-8")))
]


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
class TestRecipesOfTheProject:
    def test_it_is_read_and_every_method_can_serve_every_budget(self, path):
        recipe = read_recipe(path)
        for options in recipe.methods:
            for budget in recipe.budgets:
                assert needs_for(options, budget)
        assert set(recipe.evaluation.benchmarks) <= set(BENCHMARKS)

    def test_no_two_results_share_a_name(self, path):
        from fasc.runner import _require_own_folders

        recipe = read_recipe(path)
        names = _require_own_folders(recipe)
        recovered = 2 if recipe.recovery else 1
        assert len(set(names)) == len(recipe.methods) * len(recipe.budgets) * recovered

    def test_it_says_how_it_is_run(self, path):
        text = path.read_text(encoding="utf-8")
        assert f"fasc run recipes/{path.name} --out runs/{path.stem}" in text

    def test_what_the_results_depend_on_does_not_change_with_a_default(self, path):
        """Plans that are allocated by the loss say which penalty their products had."""
        raw = tomllib.loads(path.read_text(encoding="utf-8"))
        recipe = read_recipe(path)
        from fasc.planning.needs import allocation_of

        for given, budget in zip(raw["budgets"], recipe.budgets, strict=True):
            globally = [
                options for options in recipe.methods if options.name == "fasc" and allocation_of(options, budget) == "fisher"
            ]
            assert "overhead" in given or not globally, path.name


def test_every_recipe_that_a_page_names_is_there():
    names = {path.relative_to(ROOT / "recipes").as_posix() for path in EVERY}
    for page in (ROOT / "README.md", *(ROOT / "docs").glob("*.md")):
        for name in re.findall(r"recipes/([\w/-]+\.toml)", page.read_text(encoding="utf-8")):
            assert name in names, f"{page.name}: recipes/{name}"


def test_a_recipe_survives_its_file(tmp_path):
    for recipe in (Recipe(), DEMO, *(read_recipe(path) for path in RECIPES)):
        file = tmp_path / "recipe.toml"
        file.write_text(tomli_w.dumps(recipe.to_dict()), encoding="utf-8")
        assert read_recipe(file) == recipe


def test_every_part_has_a_default_and_methods_take_options_of_their_own(tmp_path):
    file = tmp_path / "r.toml"
    file.write_text('[[methods]]\nname = "fasc-eq6"\nreading = "oblique"\n')
    recipe = read_recipe(file)
    assert recipe.methods == (MethodConfig(name="fasc-eq6", reading="oblique"),)
    assert recipe.methods[0].own == {"reading": "oblique"}
    assert [(budget.kind, budget.rank_fraction) for budget in recipe.budgets] == [("rank_fraction", 0.5)]
    assert recipe.recovery is None


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"[calibration]\nsequence = 3\n", ["`calibration.sequence`", "no such field"]),
        (b"[calibration]\nsequences = 0\n", ["`calibration.sequences`"]),
        (b"[calibration\n", ["not valid TOML", "line 1"]),
        (b"[[budgets]]\nrank_fraction = 2.0\n", ["outside (0, 1]"]),
        (b"[[budgets]]\nrank_fraction = 0.5\nmax_kl = 0.1\n", ["are both budgets"]),
        (b"[[budgets]]\nmax_bytes = nan\n", ["max_bytes"]),
        (b"[[methods]]\nselection = 'maybe'\n", ["`methods.0.selection`"]),
        (b"budgets = []\n", ["`budgets`"]),
        (b"[source]\nmodel = 3\n", ["`source.model`"]),
        (b"x = " + b"[" * 10_000, ["not valid TOML"]),
        (b"# caf\xe9\n", ["not UTF-8 (byte 5)"]),
    ],
    ids=lambda value: None if isinstance(value, list) else value[:24].decode("latin1"),
)
def test_a_recipe_that_makes_no_sense_is_refused_by_file_and_field(tmp_path, content, words):
    file = tmp_path / "r.toml"
    file.write_bytes(content)
    with pytest.raises(UsageError) as refused:
        read_recipe(file)
    assert all(word in refused.value.message for word in ("r.toml", *words))
    assert refused.value.hint


def test_a_recipe_that_is_not_there_is_refused(tmp_path):
    with pytest.raises(UsageError, match="does not exist"):
        read_recipe(tmp_path / "nowhere.toml")
    with pytest.raises(UsageError, match="is a folder"):
        read_recipe(tmp_path)


def test_a_byte_order_mark_is_no_matter(tmp_path):
    (tmp_path / "r.toml").write_bytes(b"\xef\xbb\xbf[calibration]\nsequences = 3\n")
    assert read_recipe(tmp_path / "r.toml").calibration.sequences == 3


def test_recipes_printed_in_the_documentation_are_read(tmp_path):
    blocks = [
        block
        for page in (ROOT / "README.md", *(ROOT / "docs").glob("*.md"))
        for block in re.findall(r"^```toml\n(.*?)^```", page.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)
        if "[[methods]]" in block
    ]
    assert blocks
    for block in blocks:
        (tmp_path / "r.toml").write_text(block, encoding="utf-8")
        read_recipe(tmp_path / "r.toml")
