"""Weights and statistics → fewer weights: what is no subspace. One method, one file.

Baselines of the paper and of the field that run through the same chain as the methods of ``fasc.methods``. Every module here
whose name has no leading underscore is imported, and what it registers can be given to ``--method``.
"""

from importlib import import_module
from pkgutil import iter_modules

from fasc.pruning._registry import PRUNINGS, Pruning, find_method

for _module in iter_modules(__path__):
    if not _module.name.startswith("_"):
        import_module(f"{__name__}.{_module.name}")

__all__ = ["PRUNINGS", "Pruning", "find_method"]
