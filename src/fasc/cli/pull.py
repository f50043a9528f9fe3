"""``fasc pull``."""

from typing import Annotated

import typer


def pull(
    alias: Annotated[str, typer.Argument(help="Which embedded model.")] = "smollm2-135m",
    force: Annotated[bool, typer.Option("--force", help="Fetch it again even if it is in the cache.")] = False,
) -> None:
    """Fetch the embedded default model into the cache and print where it is."""
    from fasc.errors import UnknownNameError
    from fasc.model import embedded
    from fasc.reporting.console import print_line

    if alias not in embedded.EMBEDDED:
        raise UnknownNameError("embedded model", alias, embedded.EMBEDDED)
    print_line(embedded.pull(alias, force=force))
