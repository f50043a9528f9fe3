"""How options are read: named as they are typed, with the help and defaults of the recipe's own fields."""

import pytest
from pydantic import BaseModel

from fasc.cli import options as opt
from fasc.errors import UsageError
from fasc.planning.options import BudgetConfig, MethodConfig
from fasc.statistics.options import CalibrationConfig
from tests.cli.conftest import refused


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--selection", "maybe"], "error: --selection: "),
        (["--damping", "-1"], "error: Invalid value for '--damping': "),
        (["--allocation", "best"], "error: --allocation: "),
        (["--rank-multiple", "0"], "error: --rank-multiple: "),
        (["--floor", "1"], "error: --floor: "),
        (["--overhead", "-1"], "error: --overhead: "),
        (["--method-option", "oblique"], "error: --method-option is `oblique`"),
        (["--param-fraction", "2"], "error: --param-fraction is 2, outside (0, 1]"),
        (["--param-fraction", "0.8", "--layouts", "dense"], "error: a fraction of 0.8 leaves no direction"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else None,
)
def test_an_option_is_named_as_it_is_typed(fasc, model_folder, arguments, says):
    lines = refused(fasc("plan", model_folder, *arguments))
    assert lines[-2].startswith(says)


def test_an_unknown_layout_is_answered_with_the_known_ones(fasc, model_folder):
    refused(fasc("plan", model_folder, "--layouts", "nope"), "layout `nope`", "pivoted")


def test_unset_options_leave_the_recipes_default(monkeypatch):
    given = {"sequences": None, "seed": 3, "unrelated": 7}
    assert opt.take(CalibrationConfig, given) == CalibrationConfig(seed=3)
    assert opt.take(BudgetConfig, {}) == BudgetConfig()


def test_a_problem_of_several_options_names_each_as_it_is_typed():
    with pytest.raises(UsageError, match="--param-fraction and --max-kl are both budgets"):
        opt.build(BudgetConfig, param_fraction=0.5, max_kl=0.1)


def test_help_is_that_of_the_field_with_its_default():
    class Part(BaseModel, use_attribute_docstrings=True):
        size: int = 3
        """How
        large."""

        names: tuple[str, ...] = ("a", "b")
        """Which."""

        quick: bool = False
        """Whether."""

        note: str | None = None
        """What."""

    helps = [opt.option(Part, field, f"--{field}").help for field in Part.model_fields]
    assert helps == ["How large. [default: 3]", "Which. [default: a,b]", "Whether. [default: off]", "What."]


def test_names_are_separated_by_commas():
    assert opt.names(None) is None
    assert opt.names(" a, b ,,c") == ("a", "b", "c")
    with pytest.raises(UsageError, match="empty list of names"):
        opt.names(" , ")


def test_the_methods_own_options_are_names_and_values():
    assert opt.own_options(["reading=oblique", "some-thing = a=b"]) == {"reading": "oblique", "some_thing": "a=b"}
    assert opt.own_options(None, damping=0.5) == {"damping": 0.5}
    chosen = opt.method({"method": "fasc-eq6", "layouts": "factors,dense", "method_option": ["reading=oblique"], "damping": None})
    assert chosen == MethodConfig(name="fasc-eq6", layouts=("factors", "dense"), reading="oblique")


def test_fractions_are_budgets_or_none():
    assert opt.fractions("none", "rank_fraction") == []
    assert opt.fractions("0.3, 0.5", "param_fraction") == [BudgetConfig(param_fraction=0.3), BudgetConfig(param_fraction=0.5)]
    with pytest.raises(UsageError, match=r"--param-fraction is 3, outside \(0, 1\]"):
        opt.fractions("3", "param_fraction")
    with pytest.raises(UsageError, match="--rank-fraction"):
        opt.fractions("half", "rank_fraction")
