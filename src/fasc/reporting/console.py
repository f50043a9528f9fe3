"""Results on stdout, as wide as the terminal, or wide enough not to break where there is none."""

from rich.console import Console, RenderableType

_WIDTH = 220


def print_results(*results: RenderableType) -> None:
    """Print tables and lines one below the other."""
    console = Console(width=None if Console().is_terminal else _WIDTH)
    for result in results:
        console.print(result)
