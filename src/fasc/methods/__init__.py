"""Weights and statistics → :class:`~fasc.linalg.decomposition.Decomposition`. One method, one file.

To add a method, add a file: every module here whose name has no leading underscore is imported, and its ``@method``
function is registered.
"""

from importlib import import_module
from pkgutil import iter_modules

from fasc.methods._registry import METHODS, Method, Sketch, Sketched, get_method, method
from fasc.methods._unit import LayerUnit, Unit, decompose_unit, stacked_weight, unit_energies, unit_in

for _module in iter_modules(__path__):
    if not _module.name.startswith("_"):
        import_module(f"{__name__}.{_module.name}")

__all__ = [
    "METHODS",
    "LayerUnit",
    "Method",
    "Sketch",
    "Sketched",
    "Unit",
    "decompose_unit",
    "get_method",
    "method",
    "stacked_weight",
    "unit_energies",
    "unit_in",
]
