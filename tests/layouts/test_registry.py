"""The registry of layouts, and that nothing else knows a layout by its name."""

import ast
from pathlib import Path

import pytest

import fasc
from fasc.errors import UnknownNameError
from fasc.layouts import LAYOUTS, layouts_named

SOURCE = Path(fasc.__file__).parent
WORDS = {
    "dense": "an English word: the model that is not compressed, in tables and folders",
}
"""Names of layouts that may stand in a string of another meaning."""

ANOTHER_MEANING = {
    ("stages/recover.py", "merged"): "a key of the provenance: whether the checkpoint is an ordinary dense one again",
    ("reporting/page/sources.py", "merged"): "the same key, read",
    ("cli/run.py", "factors"): "the demo's recipe, as a user writes it",
}


def strings_of(tree):
    """Every string of the code with its line; docstrings, which are expressions of their own, are documentation."""
    documentation = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in documentation:
            yield node.value, node.lineno


def test_layouts_are_found_by_name():
    assert layouts_named(("factors", "dense")) == [LAYOUTS["factors"], LAYOUTS["dense"]]
    with pytest.raises(UnknownNameError, match=r"unknown layout `pivotted` .*did you mean `pivoted`"):
        layouts_named(("pivotted",))


def test_by_default_a_plan_may_use_all_that_are_meant_for_it():
    assert [layout.name for layout in layouts_named(None)] == [name for name, layout in LAYOUTS.items() if layout.default]
    assert {"dense", "factors", "shared", "pivoted", "pivoted-columns"} <= {layout.name for layout in layouts_named(None)}


def test_no_other_file_names_a_layout():
    """Adding, renaming or removing one is a matter of one file."""
    names = set(LAYOUTS) - set(WORDS)
    met = set()
    for file in sorted(SOURCE.rglob("*.py")):
        place = file.relative_to(SOURCE)
        if place.parts[0] == "layouts":
            continue
        for value, line in strings_of(ast.parse(file.read_text(encoding="utf-8"))):
            for name in names & {part.strip() for part in value.split(",")}:
                met.add((str(place), name))
                assert (str(place), name) in ANOTHER_MEANING, f"{place}:{line} names the layout `{name}`"
    assert met == set(ANOTHER_MEANING), "what is excused is there"


def test_that_search_sees_strings_and_passes_documentation_over():
    tree = ast.parse('"""factors"""\nx = "factors"\ndef f():\n    """shared"""\n    return ["pivoted", f"{x} merged"]\n')
    assert [value for value, _ in strings_of(tree)] == ["factors", "pivoted", " merged"]
