"""Figures as files that say that they are ours."""

from pathlib import Path

from matplotlib.figure import Figure

from fasc.outputs import PNG_AUTHOR
from fasc.storage import new_file


def save_png(figure: Figure, path: Path) -> Path:
    """Write a figure as PNG."""
    with new_file(path) as scratch:
        figure.savefig(scratch, format="png", metadata={"Software": PNG_AUTHOR})
    return path
