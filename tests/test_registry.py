"""Registries: filled by the modules of a package and by entry points, when a name is first looked up."""

import subprocess
import sys
from importlib.metadata import EntryPoint

import pytest

from fasc import registry
from fasc.edits import EDITS
from fasc.errors import UnknownNameError
from fasc.evaluation.registry import BENCHMARKS
from fasc.layouts import LAYOUTS
from fasc.methods import METHODS
from fasc.pruning import PRUNINGS
from fasc.registry import Registry


@pytest.fixture
def package(tmp_path, monkeypatch):
    """A package of one module that registers something, one whose name has an underscore, and an entry point."""
    folder = tmp_path / "shapes"
    folder.mkdir()
    (folder / "__init__.py").write_text("from fasc.registry import Registry\nSHAPES = Registry('shape', 'shapes')\n")
    (folder / "square.py").write_text("from shapes import SHAPES\nSHAPES.add('square', 4)\n")
    (folder / "_hidden.py").write_text("from shapes import SHAPES\nSHAPES.add('hidden', 0)\n")
    (tmp_path / "elsewhere.py").write_text("from shapes import SHAPES\nSHAPES.add('circle', 1)\n")
    monkeypatch.syspath_prepend(tmp_path)
    entry = EntryPoint("circle", "elsewhere", "shapes")
    monkeypatch.setattr(registry, "entry_points", lambda group: [entry] if group == "shapes" else [])
    yield
    for name in [name for name in sys.modules if name.partition(".")[0] in ("shapes", "elsewhere")]:
        del sys.modules[name]


def test_modules_and_entry_points_are_imported_at_the_first_look_up(package):
    from shapes import SHAPES

    assert "shapes.square" not in sys.modules
    assert SHAPES.find("square") == 4
    assert dict(SHAPES) == {"square": 4, "circle": 1}
    assert "shapes._hidden" not in sys.modules


def test_what_is_added_is_found_and_the_last_of_a_name_wins(package):
    from shapes import SHAPES

    SHAPES.add("line", 2)
    assert (len(SHAPES), SHAPES["line"]) == (3, 2)
    SHAPES.add("line", 3)
    assert SHAPES["line"] == 3
    SHAPES.remove("line")
    assert "line" not in SHAPES
    SHAPES.remove("line")


def test_an_unknown_name_is_answered_with_the_nearest_and_the_known_ones(package):
    from shapes import SHAPES

    with pytest.raises(UnknownNameError, match="unknown shape `squareness`") as refused:
        SHAPES.find("squareness")
    assert refused.value.hint == "did you mean `square`? known: circle, square"
    with pytest.raises(KeyError):
        SHAPES["squareness"]


@pytest.mark.parametrize("known", [METHODS, LAYOUTS, BENCHMARKS, EDITS, PRUNINGS], ids=lambda known: known._what)
def test_the_registries_of_the_project_are_filled_and_keyed_by_the_things_own_names(known):
    assert isinstance(known, Registry)
    assert len(known) >= 2
    for name, thing in known.items():
        own = getattr(thing, "name", None)
        assert own is None or own == name


def test_the_papers_methods_come_by_entry_points():
    assert {"fasc-eq6", "fasc-sketch", "two-sided-sketch"} <= set(METHODS)
    script = (
        "from fasc.methods import METHODS; import sys; assert 'fasc.paper.eq6' not in sys.modules; assert 'fasc-eq6' in METHODS"
    )
    subprocess.run([sys.executable, "-c", script], check=True)
