"""Scores on the terminal."""

from collections.abc import Sequence

from rich.table import Table

from fasc.evaluation.score import Score
from fasc.reporting.console import print_results
from fasc.reporting.table import format_score


def print_scores(scores: Sequence[Score]) -> None:
    """Every score with its interval and n."""
    table = Table()
    for title in ("benchmark", "metric", "value [95 % interval]", "n"):
        table.add_column(title, justify="left" if title in ("benchmark", "metric") else "right", overflow="fold")
    for score in scores:
        table.add_row(score.benchmark, score.metric, format_score(score.to_dict()), f"{score.n:,}")
    print_results(table)
