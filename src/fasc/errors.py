"""Everything that can go wrong and that a user can do something about.

FascError                       one line of what, where and the number; one hint; exit code 2
├── UsageError                  an option, a name or a recipe that does not make sense
│   └── UnknownNameError        not a registered method, corpus, benchmark, …
├── ModelError                  a model or checkpoint that cannot be used
├── CorpusError                 text that cannot be used
├── StatisticsError             statistics that are missing, or belong to something else
├── NumericalError              a matrix or a batch that breaks the arithmetic
│   ├── NonFiniteError
│   └── NotPositiveDefiniteError
├── BudgetError                 a rank budget that cannot be kept
├── ProcessError                a process that shared the work and ended
└── StorageError                a file or folder that cannot be read or written
"""

from collections.abc import Iterable
from difflib import get_close_matches


class FascError(Exception):
    """A problem the user can act on.

    Attributes:
        message: what went wrong, where, and the number; one line.
        hint: what to do about it; one line.
    """

    def __init__(self, message: str, hint: str) -> None:
        super().__init__(message)
        self.message = " ".join(message.split())
        self.hint = " ".join(hint.split())

    def __str__(self) -> str:
        return f"{self.message} (hint: {self.hint})"


class UsageError(FascError):
    """An option, a name or a recipe that does not make sense."""


class UnknownNameError(UsageError):
    """A name that is not registered; the message suggests the nearest one."""

    def __init__(self, what: str, name: str, known: Iterable[str], *, or_else: str = "") -> None:
        known = sorted(known)
        close = get_close_matches(name, known, n=1, cutoff=0.5)
        guess = f"did you mean `{close[0]}`? " if close else ""
        super().__init__(f"unknown {what} `{name}`", f"{guess}known: {', '.join(known)}{or_else}")


class ModelError(FascError):
    """A model or checkpoint that cannot be used."""


class CorpusError(FascError):
    """Text that cannot be used for calibration or evaluation."""


class StatisticsError(FascError):
    """Statistics that are missing, or that belong to another model, corpus or method."""


class NumericalError(FascError):
    """A matrix or a batch that breaks the arithmetic."""


class NonFiniteError(NumericalError):
    """NaN or infinity where a finite number is needed."""

    def __init__(self, where: str, hint: str) -> None:
        super().__init__(f"{where} is not finite (NaN or infinity)", hint)


class NotPositiveDefiniteError(NumericalError):
    """A covariance cannot be factorised."""

    def __init__(self, where: str, smallest: float, tokens: int) -> None:
        super().__init__(
            f"{where}: covariance is not positive definite (smallest eigenvalue {smallest:.1e}, {tokens:,} tokens)",
            "calibrate on more tokens (--sequences) or raise --damping",
        )


class BudgetError(FascError):
    """A rank budget that cannot be kept."""


class ProcessError(FascError):
    """A process that shared the work and ended."""


class StorageError(FascError):
    """A file or folder that cannot be read or written."""
