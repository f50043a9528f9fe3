"""Model → :class:`~fasc.evaluation.score.Score`; one benchmark, one file in ``benchmarks``. Importing this loads no torch."""

from fasc.evaluation.registry import BENCHMARKS, Benchmark, Subject, WindowScores, benchmark, get_benchmark

__all__ = ["BENCHMARKS", "Benchmark", "Subject", "WindowScores", "benchmark", "get_benchmark"]
