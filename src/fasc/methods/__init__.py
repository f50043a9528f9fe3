"""Weights and statistics → :class:`~fasc.linalg.decomposition.Decomposition`. One method, one file.

To add a method, add a file: every module here whose name has no leading underscore is imported when a method is first looked up,
and its ``@method`` function is registered. A distribution of yours adds methods by an entry point of the group ``fasc.methods``.
"""

from fasc.methods._registry import METHODS, AtRank, Method, Solver, get_method, method, solver

__all__ = ["METHODS", "AtRank", "Method", "Solver", "get_method", "method", "solver"]
