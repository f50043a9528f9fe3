"""Named things of one kind: methods, pruning methods, layouts, edits, benchmarks.

A package that holds one file for each of them makes a registry; every module of it whose name has no leading underscore is
imported when a name is first looked up, and registers what it defines. Other distributions add their own by an entry point.
"""

from collections.abc import Iterator, Mapping
from importlib import import_module
from importlib.metadata import entry_points
from pkgutil import iter_modules
from typing import TypeVar

from fasc.errors import UnknownNameError

T = TypeVar("T")


class Registry(Mapping[str, T]):
    """Name ↦ thing, filled by the modules of a package and by entry points of the group that bears the package's name.

    Args:
        what: the kind, for messages: "method".
        package: whose modules register them, such as ``fasc.methods``; also the group of entry points.
    """

    def __init__(self, what: str, package: str) -> None:
        self._what, self._package = what, package
        self._known: dict[str, T] = {}
        self._discovered = False

    def add(self, name: str, thing: T) -> T:
        """Make a thing known under a name; the last one of a name wins."""
        self._known[name] = thing
        return thing

    def remove(self, name: str) -> None:
        """Forget a name, for tests."""
        self._known.pop(name, None)

    def find(self, name: str) -> T:
        """The thing of that name.

        Raises:
            UnknownNameError: there is none; suggests the nearest.
        """
        if name not in self:
            raise UnknownNameError(self._what, name, self)
        return self[name]

    def _discover(self) -> dict[str, T]:
        if not self._discovered:
            self._discovered = True
            for module in iter_modules(import_module(self._package).__path__):
                if not module.name.startswith("_"):
                    import_module(f"{self._package}.{module.name}")
            for entry in entry_points(group=self._package):
                entry.load()
        return self._known

    def __getitem__(self, name: str) -> T:
        return self._discover()[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._discover())

    def __len__(self) -> int:
        return len(self._discover())
