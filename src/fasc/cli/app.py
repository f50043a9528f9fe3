"""The ``fasc`` command: verbs in, one line out when something is wrong."""

import os
import sys
import traceback
from collections.abc import Callable
from typing import Annotated, NoReturn

import typer
from rich.console import Console

from fasc.cli import (
    bench,
    collect,
    compare,
    compress,
    diagnose,
    emergence,
    evaluate,
    export,
    overlap,
    plan,
    processes,
    pull,
    recover,
    run,
    validate,
)
from fasc.errors import FascError
from fasc.progress import INTERRUPT
from fasc.storage import is_full

app = typer.Typer(
    name="fasc",
    help="Knowledge-aware low-rank compression of language models by Fisher-aligned subspaces (arXiv:2601.07197).",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _version(*, value: bool) -> None:
    if value:
        from fasc import __version__

        typer.echo(__version__)
        raise typer.Exit


@app.callback()
def _global_options(
    context: typer.Context,
    version: Annotated[
        bool,
        typer.Option("--version", help="Print the version and stop.", callback=lambda v: _version(value=v), is_eager=True),
    ] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error; may stand anywhere.")] = False,
) -> None:
    processes.require_shared(context.invoked_subcommand)


_VERBS: dict[Callable[..., None], str] = {
    run.demo: "Compress a real 135M model; show what was kept.",
    run.run: "Carry out a recipe; goes on where it stopped.",
    pull.pull: "Fetch the embedded default model into the cache.",
    collect.collect: "Measure what compressing needs to know, on text.",
    diagnose.diagnose: "Show ρ, spectra and forecasts by group of layers.",
    validate.validate: "Measure how well ρ and ½J forecast the real loss.",
    overlap.subspace_overlap: "Compare what a method chooses on several texts.",
    plan.plan: "Show what a compressed model will weigh and lose.",
    compress.compress: "Compress a model and write a checkpoint.",
    evaluate.evaluate: "Score a checkpoint, with 95 % intervals.",
    compare.compare: "Say what each model kept, item by item.",
    bench.bench: "Time a compressed model beside the dense one.",
    recover.recover: "Train a compressed model towards the dense one.",
    emergence.emergence: "Show ρ and facts over a training.",
    export.export: "Write a model for llama.cpp and other engines.",
    run.report: "Compare runs and checkpoints in one page.",
}
"""Each with the line that ``fasc --help`` shows."""

for _verb, _summary in _VERBS.items():
    app.command(short_help=_summary)(_verb)


def _fail(message: str, hint: str, code: int, problem: Exception | None = None) -> NoReturn:
    told = processes.voice(message, problem, interrupted=code == processes.INTERRUPTED)
    if told is None:
        processes.leave(processes.SILENT)
    console = Console(stderr=True, highlight=False, soft_wrap=True)
    console.print("error:", style="bold red", end=" ")
    console.print(told, markup=False)
    console.print("hint:", style="bold cyan", end=" ")
    console.print(hint, markup=False)
    processes.leave(code)


def main() -> NoReturn:
    """Entry point: 0 done, 2 something the user can mend, 130 interrupted, 1 a bug of ours."""
    arguments = sys.argv[1:]
    debug = "--debug" in arguments
    arguments = [argument for argument in arguments if argument != "--debug"]
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    INTERRUPT.install()
    code: int | None = processes.INTERRUPTED
    try:
        code = processes.together(lambda: app(arguments, prog_name="fasc", standalone_mode=False))
    except (BrokenPipeError, SystemExit):  # whoever read our output has had enough; click and rich make an exit of it
        code = 0
    except (KeyboardInterrupt, typer.Abort):
        INTERRUPT.ignore()
        if debug:
            traceback.print_exc()
    except Exception as problem:  # noqa: BLE001 - the boundary to the person at the terminal
        INTERRUPT.ignore()
        if debug:
            traceback.print_exc()
        _let_go_of_stdout()
        _fail(*_explain(problem), problem)
    if not _let_go_of_stdout() and code is None:
        _fail("the result could not be printed", "standard output is closed or full; print to another place", 2)
    if code == processes.INTERRUPTED:
        _fail("interrupted", "nothing half-written was left behind; the same command starts or continues the work", code)
    processes.leave(code or 0)


def _let_go_of_stdout() -> bool:
    """Write what is left to be printed; where that fails, the interpreter shall not fail once more at its end."""
    try:
        sys.stdout.flush()
    except OSError as problem:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return isinstance(problem, BrokenPipeError)
    return True


def _explain(problem: Exception) -> tuple[str, str, int]:
    """Message, hint and exit code of anything that was raised."""
    if isinstance(problem, FascError):
        return problem.message, problem.hint, 2
    if hasattr(problem, "format_message"):  # a usage error of click, or of the copy that newer typers carry
        context = getattr(problem, "ctx", None)
        verb = context.command_path if context else "fasc"
        text = " ".join(problem.format_message().split())
        several = (
            "lists take commas and no spaces, such as a,b, and patterns an option each; or "
            if "unexpected extra argument" in text
            else ""
        )
        return text, f"{several}see `{verb} --help`", 2
    if isinstance(problem, OSError):
        full = is_full(problem)
        hint = "free some space or choose another --out" if full else "check the path and its permissions"
        return ("no space left: " if full else "") + str(problem), hint, 2
    if isinstance(problem, MemoryError) or "out of memory" in str(problem).lower():
        return "out of memory", "lower --batch-tokens, or use --gradient-checkpointing", 2
    text = " ".join(str(problem).split())[:300]
    return f"internal error: {type(problem).__name__}: {text}", "run again with --debug and report the traceback", 1
