"""Scores on the terminal."""

from collections.abc import Sequence

from rich.table import Table

from fasc.evaluation.score import FEW, Score
from fasc.progress import say
from fasc.reporting.console import print_results
from fasc.reporting.table import format_score


def print_scores(scores: Sequence[Score]) -> None:
    """Every score with its interval and n; groups of few items are counted, not shown."""
    table = Table()
    for title in ("benchmark", "metric", "value [95 % interval]", "n"):
        table.add_column(title, justify="left" if title in ("benchmark", "metric") else "right", overflow="fold")
    shown = [score for score in scores if "/" not in score.metric or "=" not in score.metric or score.n >= FEW]
    for score in shown:
        table.add_row(score.benchmark, score.metric, format_score(score.to_dict()), f"{score.n:,}")
    print_results(table)
    if len(shown) < len(scores):
        say(f"{len(scores) - len(shown)} groups of fewer than {FEW} items are not shown; --json holds them")
