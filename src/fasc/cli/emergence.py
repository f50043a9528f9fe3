"""``fasc emergence``."""

from pathlib import Path
from typing import Annotated

import typer

from fasc.cli import options as opt
from fasc.evaluation.options import EvaluationConfig
from fasc.model.options import ModelConfig
from fasc.statistics.options import CalibrationConfig

PEOPLE, STEPS, SEEDS = 100, 1200, "0,1"


def emergence(
    people: Annotated[
        int | None,
        typer.Option(
            "--people", min=2, help=f"People of the made text, with four facts each. [default: {PEOPLE}]", show_default=False
        ),
    ] = None,
    steps: Annotated[
        int | None, typer.Option("--steps", min=1, help=f"Steps of training. [default: {STEPS}]", show_default=False)
    ] = None,
    seeds: Annotated[
        str | None,
        typer.Option("--seeds", help=f"Seeds, separated by commas; each trains twice. [default: {SEEDS}]", show_default=False),
    ] = None,
    checkpoints: Annotated[
        str | None,
        typer.Option(
            "--checkpoints",
            help="Instead of training: checkpoints of one model, the earliest first, separated by commas.",
            show_default=False,
        ),
    ] = None,
    corpus: opt.Corpus = None,
    sequences: opt.Sequences = None,
    data_dir: opt.DataDir = None,
    limit: Annotated[int | None, opt.option(EvaluationConfig, "limit", "--limit")] = None,
    figure: Annotated[
        Path | None, typer.Option("--figure", help="Also draw the curves into this PNG.", show_default=False)
    ] = None,
    json: opt.Json = None,
    dtype: opt.DTypeName = None,
    device: opt.Device = None,
) -> None:
    """Does ρ rise as a model learns facts? Train a small one on made biographies, and on shuffled ones as a control."""
    given = locals()
    names = opt.names(checkpoints)
    numbers = opt.seeds(SEEDS if seeds is None else seeds)
    opt.unused(given, ("corpus", "sequences", "data_dir", "limit", "dtype"), "without --checkpoints", when=names is None)
    opt.unused(given, ("people", "steps", "seeds"), "beside --checkpoints", when=names is not None)
    calibration = opt.take(CalibrationConfig, given)
    config = opt.take(EvaluationConfig, given, benchmarks=("facts",), corpus=None)
    source = opt.take(ModelConfig, given)
    from fasc.outputs import write_artifact
    from fasc.provenance import provenance
    from fasc.reporting.emergence import draw_emergence, print_emergence
    from fasc.stages.emergence import of_checkpoints, of_training

    opt.check_files(json, figure, inputs=(corpus, *(names or ())), kind="emergence")
    if names is None:
        result = of_training(people or PEOPLE, steps or STEPS, numbers, device=source.device)
    else:
        result = of_checkpoints(names, calibration, config, source)
    if json is not None:
        write_artifact(json, "emergence", result | {"provenance": provenance()})
    if figure is not None:
        draw_emergence(result, figure)
    print_emergence(result)
