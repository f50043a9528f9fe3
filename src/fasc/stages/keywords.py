"""Keyword arguments of the public verbs → parts of the recipe."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel

from fasc.errors import UnknownNameError
from fasc.options import parse

Part = TypeVar("Part", bound=BaseModel)

Names = str | tuple[str, ...] | list[str]
"""One name, several separated by commas, or a list of names."""

Corpus = str | Path | Sequence[str | Path]
"""A corpus or several: each a name, a hub id or a path; one string may hold several, separated by commas."""


def names_in(names: Names) -> tuple[str, ...]:
    """One name, several separated by commas, or a list → a tuple."""
    if isinstance(names, str):
        return tuple(name.strip() for name in names.split(",") if name.strip())
    return tuple(names)


def corpus_in(corpus: Corpus) -> str:
    """A corpus, or a list of them, as the recipe writes it."""
    return str(corpus) if isinstance(corpus, str | Path) else ",".join(map(str, corpus))


def take(part: type[Part], given: dict[str, Any], **fixed: Any) -> Part:
    """A part of the recipe from the keyword arguments that are its fields, which are removed from ``given``.

    Raises:
        UsageError: a value is out of range; names the field.
    """
    own = {key: _plain(given.pop(key), part.model_fields[key].default) for key in list(given) if key in part.model_fields}
    return parse(part, {key: value for key, value in {**own, **fixed}.items() if value is not None}, "")


def _plain(value: Any, default: Any) -> Any:
    """A path as a string; one name as a list of one where the field is a list."""
    text = str(value) if isinstance(value, Path) else value
    return names_in(text) if isinstance(text, str) and isinstance(default, tuple) else text


def refuse_rest(given: Mapping[str, Any], *parts: type[BaseModel]) -> None:
    """Refuse keyword arguments that nothing has taken.

    Raises:
        UnknownNameError: names the first and suggests the nearest.
    """
    for name in given:
        raise UnknownNameError("argument", name, [field for part in parts for field in part.model_fields])
