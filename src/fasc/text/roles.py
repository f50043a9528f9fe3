"""What text is for. What calibrates is never what evaluates."""

from collections.abc import Iterable, Iterator
from typing import Literal, TypeVar

Role = Literal["calibration", "evaluation"]

T = TypeVar("T")


def half(documents: Iterable[T], role: Role) -> Iterator[T]:
    """Every second document: the first, third, … calibrate, the others evaluate."""
    for index, document in enumerate(documents):
        if (index % 2 == 0) == (role == "calibration"):
            yield document
