"""Results on stdout, as wide as the terminal, or wide enough not to break where there is none."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from rich.console import Console, RenderableType

from fasc.errors import StorageError

_WIDTH = 220


def print_results(*results: RenderableType) -> None:
    """Print tables and lines one below the other.

    Raises:
        StorageError: stdout is full or closed.
    """
    console = Console(width=None if Console().is_terminal else _WIDTH)
    with _printing():
        for result in results:
            console.print(result)


def print_line(text: str | Path) -> None:
    """Print one line as it is, such as the path of a result, for scripts to read.

    Raises:
        StorageError: stdout is full or closed.
    """
    with _printing():
        sys.stdout.write(f"{text}\n")
        sys.stdout.flush()


@contextmanager
def _printing() -> Iterator[None]:
    try:
        yield
    except BrokenPipeError:  # whoever read it has had enough
        raise
    except OSError as problem:
        raise StorageError(
            f"the result could not be printed: {problem.strerror}",
            "what --out and --json name is written; print to another place",
        ) from problem
