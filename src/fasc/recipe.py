"""Everything a run is told: the union of the options of its stages."""

import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field

from fasc.compression.options import RecoveryConfig
from fasc.errors import UsageError
from fasc.evaluation.options import EvaluationConfig
from fasc.model.options import LayersConfig, ModelConfig
from fasc.options import Options, parse
from fasc.planning.options import BudgetConfig, MethodConfig
from fasc.statistics.options import CalibrationConfig


class Recipe(Options):
    """Everything a run was told."""

    source: ModelConfig = ModelConfig()
    """The model."""

    calibration: CalibrationConfig = CalibrationConfig()
    """The text and how the statistics are measured."""

    layers: LayersConfig = LayersConfig()
    """Which layers."""

    methods: Annotated[tuple[MethodConfig, ...], Field(min_length=1)] = (MethodConfig(),)
    """One checkpoint is made for each method and budget."""

    budgets: Annotated[tuple[BudgetConfig, ...], Field(min_length=1)] = (BudgetConfig(),)
    """How much is kept; each method is run at each budget, from the same statistics."""

    recovery: RecoveryConfig | None = None
    """If given, a run also trains each compressed checkpoint towards the dense model and scores it as one more row."""

    evaluation: EvaluationConfig = EvaluationConfig()
    """How the checkpoints and the dense model are scored."""

    rivals: tuple[str, ...] = ()
    """Other models, scored as they are on the same benchmarks but `kl`: what a dense model of another size keeps. Their own
    tokenizers cut the text."""

    def to_dict(self) -> dict[str, Any]:
        """The recipe as plain JSON/TOML values, unset ones left out."""
        return self.model_dump(mode="json", exclude_none=True)


def read_recipe(path: Path) -> Recipe:
    """Read a recipe from TOML.

    Raises:
        UsageError: missing file, invalid TOML (names the line), unknown key or value out of range (names the field).
    """
    return recipe_of(recipe_values(path), path)


def recipe_of(values: Mapping[str, Any], path: Path) -> Recipe:
    """A recipe from the values of its file.

    Raises:
        UsageError: unknown key or value out of range (names the field).
    """
    return parse(Recipe, dict(values), f"recipe `{path}`")


def recipe_values(path: Path) -> dict[str, Any]:
    """What a TOML file says, as plain values.

    Raises:
        UsageError: missing file or invalid TOML (names the line).
    """
    try:
        return tomllib.loads(path.read_text(encoding="utf-8-sig"))
    except FileNotFoundError as problem:
        raise UsageError(f"recipe `{path}` does not exist", "recipes/ holds examples") from problem
    except IsADirectoryError as problem:
        raise UsageError(f"recipe `{path}` is a folder", "name the .toml file") from problem
    except UnicodeDecodeError as problem:
        raise UsageError(f"recipe `{path}`: not UTF-8 (byte {problem.start})", "save the file as UTF-8") from problem
    except (tomllib.TOMLDecodeError, RecursionError) as problem:
        raise UsageError(f"recipe `{path}`: not valid TOML: {problem}", "recipes/ holds examples") from problem
