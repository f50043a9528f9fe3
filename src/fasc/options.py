"""The base of everything a run can be told, and pydantic's report in one line.

Options live beside what they configure (``statistics/options.py``, ``planning/options.py``, …); the recipe is their union. The
modules that define them load neither torch nor transformers, so that ``fasc --help`` is fast.
"""

from collections.abc import Mapping
from typing import Any, Literal, TypeVar

from pydantic import BaseModel, ByteSize, TypeAdapter, ValidationError

from fasc.errors import UsageError

DType = Literal["auto", "float32", "bfloat16", "float16"]

Part = TypeVar("Part", bound=BaseModel)


class Options(BaseModel, frozen=True, extra="forbid", use_attribute_docstrings=True):
    """Frozen, without unknown fields; the string under a field is its help."""


def explain(problem: ValidationError, where: str) -> UsageError:
    """Turn pydantic's report into one line: where, which field, what is wrong."""
    first = problem.errors()[0]
    field = ".".join(str(part) for part in first["loc"])
    reason = first["msg"].removeprefix("Value error, ").replace("Input should be", "it must be")
    hint = "`fasc VERB --help` says what each option may be; recipes have the same names, with _ for -"
    if "outside (0, 1]" in reason:
        hint = "0.5 keeps half; 1 keeps all of it"
    if "is not a number" in reason:
        hint = "sizes look like 400MB or 380MiB, increases like 5% or 0.05"
    if first["type"] == "extra_forbidden":
        reason = "no such field"
    return UsageError(": ".join(part for part in (where, f"`{field}`" if field else "", reason) if part), hint)


_SIZE = TypeAdapter(ByteSize)


def bytes_of(given: str | int | None) -> int:
    """A number of bytes, or one with kB, MB, GB, KiB, MiB, GiB.

    Raises:
        ValueError: it is none.
    """
    try:
        return int(_SIZE.validate_python(given.strip() if isinstance(given, str) else given))
    except (ValidationError, OverflowError, ValueError):
        raise ValueError(f"`{given}` is not a number of bytes") from None


def size(option: str, given: str | int) -> int:
    """Bytes, from ``24GB``.

    Args:
        option: as typed, for the error.
        given: what was given with it.

    Raises:
        UsageError: it is no size, or nothing.
    """
    try:
        found = bytes_of(given)
    except ValueError as problem:
        raise UsageError(f"{option}: {problem}", "a size looks like 24GB") from None
    if found < 1:
        raise UsageError(f"{option}: {given} is no memory at all", "a size looks like 24GB")
    return found


def parse(part: type[Part], values: Mapping[str, Any], where: str) -> Part:
    """Validate plain values as a part of the recipe.

    Raises:
        UsageError: an unknown field or a value out of range; one line that names the field.
    """
    try:
        return part.model_validate(dict(values))
    except ValidationError as problem:
        raise explain(problem, where) from problem
