"""What a forecast turned out to be on this model: Σ½J of some plans against the KL divergence that was measured.

½J is the quadratic loss of independent errors with averaged moments. What whole plans lose is more, by a factor that differs
from model to model and hardly from plan to plan (docs/method.md). So it is measured on a few plans (``fasc validate``), and the
forecast of another is read off the line through them, log KL against log Σ½J, with its prediction interval.
"""

from collections.abc import Mapping, Sequence
from math import exp, log
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import numpy as np
from pydantic import BaseModel, Field, FiniteFloat, NonNegativeFloat
from scipy.stats import t as student

from fasc.errors import BudgetError
from fasc.options import parse
from fasc.storage import read_json

_LINE = 3
"""Plans from which a slope is fitted; of fewer the factor is one number."""

Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]


class Expected(BaseModel, frozen=True, extra="forbid"):
    """The KL divergence to expect of a plan, with a 95 % prediction interval; nats per token."""

    kl: Positive
    low: NonNegativeFloat
    high: Annotated[float, Field(gt=0)]
    plans: Annotated[int, Field(ge=1)]
    """From so many."""

    text: str | None = None
    """On which they were measured."""


class Measured(NamedTuple):
    """One plan."""

    half_j: float
    kl: float
    kl_error: float
    """Standard error."""


class _Row(BaseModel, extra="ignore"):
    half_j: FiniteFloat | None = None
    kl: FiniteFloat
    kl_error: FiniteFloat = 0.0


class Correction:
    """A line through measured plans.

    Args:
        plans: at least one, with positive forecast and divergence.
        text: on which they were measured.
    """

    def __init__(self, plans: Sequence[Measured], text: str | None = None) -> None:
        self.plans, self.text = tuple(plans), text
        self._x = np.log([one.half_j for one in plans])
        y = np.log([one.kl for one in plans])
        self._slope = 1.0
        if len(plans) >= _LINE and float(np.ptp(self._x)) > log(1.5):
            self._slope = float(np.clip(np.polyfit(self._x, y, 1)[0], 0.5, 2.0))
        self._offset = float(np.mean(y - self._slope * self._x))
        self._free = len(plans) - (2 if self._slope != 1.0 else 1)
        residual = float(np.square(y - self._offset - self._slope * self._x).sum()) / max(self._free, 1)
        self._variance = residual + float(np.mean([(one.kl_error / one.kl) ** 2 for one in plans]))

    def of(self, half_j: float) -> Expected:
        """What to expect of a plan with this forecast."""
        x = log(max(half_j, 1e-12))
        spread = float(np.square(self._x - self._x.mean()).sum())
        away = (x - float(self._x.mean())) ** 2 / spread if spread > 0 and self._slope != 1.0 else 0.0
        width = float(student.ppf(0.975, max(self._free, 1)) if self._free else 1.96)
        reach = min(width * (self._variance * (1 + 1 / len(self.plans) + away)) ** 0.5, 50.0)
        middle = self._offset + self._slope * x
        return Expected(kl=exp(middle), low=exp(middle - reach), high=exp(middle + reach), plans=len(self.plans), text=self.text)

    def half_j_of(self, kl: float) -> float:
        """The forecast of plans of which this divergence is to be expected."""
        return exp((log(kl) - self._offset) / self._slope)


def read_correction(path: str | Path) -> Correction:
    """From a file of ``fasc validate --json``.

    Raises:
        BudgetError: it is none, or holds no plan that was measured.
        StorageError: it cannot be read.
    """
    raw: Any = read_json(Path(path))
    rows = raw.get("plans") if isinstance(raw, Mapping) else None
    if not isinstance(rows, list):
        raise BudgetError(f"`{path}` is no validation", "write one with `fasc validate MODEL --json FILE`")
    read = [parse(_Row, row, f"`{path}`, plan {index}") for index, row in enumerate(rows)]
    plans = [Measured(row.half_j, row.kl, row.kl_error) for row in read if row.half_j and row.half_j > 0 and row.kl > 0]
    if not plans:
        raise BudgetError(
            f"`{path}` holds no plan whose loss was forecast and measured", "run `fasc validate` with --param-fractions"
        )
    made = raw.get("provenance")
    calibration = made.get("calibration") if isinstance(made, Mapping) else None
    corpus = calibration.get("corpus") if isinstance(calibration, Mapping) else None
    return Correction(plans, corpus if isinstance(corpus, str) else None)
