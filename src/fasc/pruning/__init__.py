"""Weights and statistics → which weights or parts go: what is no subspace. One method, one file.

Baselines of the paper and of the field that run through the same chain as the methods of ``fasc.methods``. Every module here
whose name has no leading underscore is imported when a name is first looked up, and what it registers can be given to
``--method``.
"""

from fasc.pruning._registry import (
    PRUNINGS,
    Pruning,
    Structured,
    Unstructured,
    find_method,
    get_structured,
    get_unstructured,
    register,
)

__all__ = ["PRUNINGS", "Pruning", "Structured", "Unstructured", "find_method", "get_structured", "get_unstructured", "register"]
