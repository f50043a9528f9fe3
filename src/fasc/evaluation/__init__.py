"""Model → :class:`Score`. One benchmark, one file; files are discovered as in ``fasc.methods``."""

from importlib import import_module
from pkgutil import iter_modules

from fasc.evaluation.registry import BENCHMARKS, Benchmark, Subject, benchmark, get_benchmark

for _module in iter_modules(__path__):
    if not _module.name.startswith("_"):
        import_module(f"{__name__}.{_module.name}")

__all__ = ["BENCHMARKS", "Benchmark", "Subject", "benchmark", "get_benchmark"]
