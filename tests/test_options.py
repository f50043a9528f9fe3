"""Options: frozen, no unknown fields, and pydantic's report in one line that says where."""

import subprocess
import sys

import pytest
from pydantic import Field, ValidationError

from fasc.compression.options import RecoveryConfig
from fasc.errors import UsageError
from fasc.evaluation.options import EvaluationConfig, SpeedConfig
from fasc.methods import METHODS
from fasc.model.options import LayersConfig, ModelConfig
from fasc.options import Options, parse
from fasc.planning.options import BudgetConfig, MethodConfig
from fasc.statistics.options import CalibrationConfig

PARTS = (
    ModelConfig, LayersConfig, CalibrationConfig, MethodConfig, BudgetConfig, RecoveryConfig, EvaluationConfig, SpeedConfig,
)  # fmt: skip


class Inner(Options):
    size: int = Field(default=1, ge=1)


class Outer(Options):
    parts: tuple[Inner, ...] = ()


@pytest.mark.parametrize("part", [*PARTS, *(METHODS[name].options for name in sorted(METHODS))], ids=lambda part: part.__name__)
def test_every_field_has_a_default_and_says_what_it_is(part):
    part()
    for name, field in part.model_fields.items():
        assert field.description, name


def test_options_do_not_change():
    with pytest.raises(ValidationError):
        Inner().size = 3


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"parts": [{"size": 1}, {"size": 0}]}, "here: `parts.1.size`: it must be greater than or equal to 1"),
        ({"parts": [{"sizes": 1}]}, "here: `parts.0.sizes`: no such field"),
        ({"other": 1}, "here: `other`: no such field"),
    ],
)
def test_a_problem_is_one_line_with_its_place(values, message):
    with pytest.raises(UsageError) as refused:
        parse(Outer, values, "here")
    assert refused.value.message == message
    assert refused.value.hint


def test_valid_values_are_parsed():
    assert parse(Outer, {"parts": [{"size": 3}]}, "here") == Outer(parts=(Inner(size=3),))


def test_options_load_neither_torch_nor_transformers():
    modules = ", ".join({part.__module__ for part in PARTS} | {"fasc.recipe"})
    script = f"import sys, {modules}; assert not {{'torch', 'transformers', 'scipy'}} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", script], check=True)
