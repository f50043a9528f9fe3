"""``fasc run``, ``fasc demo`` and ``fasc report``."""

from functools import partial
from pathlib import Path
from typing import Annotated

import typer

from fasc.cli import options as opt
from fasc.evaluation.options import EvaluationConfig
from fasc.planning.options import BudgetConfig, MethodConfig
from fasc.recipe import Recipe, recipe_values
from fasc.statistics.options import CalibrationConfig

DEMO = Recipe(
    calibration=CalibrationConfig(corpus="self", sequences=64, sequence_length=64),
    methods=(
        MethodConfig(name="whitened", layouts=("dense", "factors"), label="svd-llm"),
        MethodConfig(name="fasc"),
    ),
    budgets=(BudgetConfig(param_fraction=0.8),),
    evaluation=EvaluationConfig(
        benchmarks=("facts", "kl", "perplexity"),
        corpus="self",
        windows=32,
        context=64,
        prompts=("The capital of France is", "Water boils at a temperature of", "Once upon a time, there was a"),
        speed=True,
    ),
)
"""No data is needed: the model's own text calibrates, and other text of its own, drawn by another seed, evaluates."""


def run(
    recipe: Annotated[Path, typer.Argument(help="A recipe (TOML); recipes/ holds examples.")],
    out: Annotated[
        Path | None, typer.Option("--out", help="Its folder. [default: runs/ and the recipe's name]", show_default=False)
    ] = None,
    scale: Annotated[
        str, typer.Option("--scale", help="Of a recipe with scales: `small` (one small model, two cores) or `paper`.")
    ] = "small",
    model: Annotated[str | None, typer.Option("--model", help="Instead of the recipe's model.", show_default=False)] = None,
    verdicts: Annotated[
        bool, typer.Option("--verdicts", help="Of a recipe that lists others: only write the verdicts on the results there are.")
    ] = False,
    keep: Annotated[
        bool,
        typer.Option("--keep", help="With --verdicts: what the page says of parts without a result here stays, and is named."),
    ] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Start over even if the folder holds a run.")] = False,
) -> None:
    """Carry out a recipe: calibrate, diagnose, compress with each method, evaluate, report. Goes on where it stopped.

    A recipe may also name another verb with its options, or list other recipes: recipes/paper.toml makes the paper's tables.
    """
    given = {"keep": keep or None, "model": model, "overwrite": overwrite or None}
    opt.unused(given, ("keep",), "without --verdicts", when=not verdicts)
    opt.unused(given, ("model", "overwrite"), "beside --verdicts", when=verdicts)
    folder, values = out or Path("runs") / recipe.stem, recipe_values(recipe)
    from fasc import study

    if verdicts or study.is_study(values):
        from fasc.reporting.console import print_line

        judge = partial(study.judge_study, keep=keep) if verdicts else partial(study.run_study, model=model, overwrite=overwrite)
        print_line(judge(recipe, folder, scale=scale))
        return
    (work, *others) = study.works(recipe, scale, model)
    for one in (work, *others):
        if one.recipe is not None:
            _run(one.recipe, folder / study.folder_of(one, several=True) if others else folder, overwrite=overwrite)


def demo(
    out: Annotated[Path, typer.Option("--out", help="Where the result goes.")] = Path("fasc-demo"),
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Start over even if the folder holds a run.")] = False,
) -> None:
    """Compress a real 135M model to 80 %, with SVD-LLM's algorithm and with fasc; show what was kept and lost. Needs no data."""
    _run(DEMO, out, overwrite=overwrite)


def _run(recipe: Recipe, out: Path, *, overwrite: bool) -> None:
    from fasc import runner

    _show(runner.run(recipe, out, overwrite=overwrite))


def _show(path: Path) -> None:
    from fasc.reporting.console import print_line, print_results
    from fasc.reporting.entries import read_entries
    from fasc.reporting.headline import headline
    from fasc.reporting.table import samples_table, terminal_table

    entries = read_entries(path.parent)
    samples = samples_table(entries)
    print_results(terminal_table(entries), *([] if samples is None else [samples]), headline(entries))
    print_line(f"report: {path}")
    print_line(f"figure: {path.parent / 'figures' / 'summary.png'}")


def report(
    runs: Annotated[list[Path], typer.Argument(metavar="RUN...", help="Folders that `fasc run` or `fasc compress` left.")],
    out: Annotated[
        Path | None,
        typer.Option("--out", help="Its folder. [default: that of a single run, else fasc-report]", show_default=False),
    ] = None,
    dense: Annotated[
        Path | None,
        typer.Option(
            "--dense",
            help="The dense model's scores beside checkpoints: file of `fasc evaluate DENSE --json`.",
            show_default=False,
        ),
    ] = None,
) -> None:
    """Compare runs and checkpoints in one page that opens from the disk: report.html, report.md, and plots as SVG and PNG.

    A checkpoint's scores and the like lie beside it: `small.scores.json` for the folder `small`; so `speed`, `diagnosis` and
    `validation`.
    """
    from fasc.reporting.console import print_line, print_results
    from fasc.reporting.page.write import MARKDOWN
    from fasc.reporting.page.write import report as write_report

    page = write_report(*runs, out=out, dense=dense)
    text = (page.parent / MARKDOWN).read_text(encoding="utf-8").splitlines()
    print_results(next(line for line in text if line.startswith("**")).strip("*"))
    print_line(f"report: {page}")
    print_line(f"as text: {page.parent / MARKDOWN}")
