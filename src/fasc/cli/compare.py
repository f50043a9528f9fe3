"""``fasc compare``."""

from pathlib import Path
from typing import Annotated

import typer

from fasc.cli import options as opt
from fasc.evaluation.options import EvaluationConfig
from fasc.model.options import ModelConfig


def compare(
    models: Annotated[list[str], typer.Argument(metavar="MODEL...", help="Checkpoints, dense or compressed.")],
    dense: Annotated[
        str | None,
        typer.Option("--dense", help="What they are compared with. [default: the first model]", show_default=False),
    ] = None,
    benchmarks: opt.Benchmarks = None,
    corpus: Annotated[str | None, opt.option(EvaluationConfig, "corpus", "--corpus")] = None,
    limit: Annotated[int | None, opt.option(EvaluationConfig, "limit", "--limit")] = None,
    shots: Annotated[int | None, opt.option(EvaluationConfig, "shots", "--shots")] = None,
    windows: Annotated[int | None, opt.option(EvaluationConfig, "windows", "--windows")] = None,
    context: Annotated[int | None, opt.option(EvaluationConfig, "context", "--context")] = None,
    seed: Annotated[int | None, opt.option(EvaluationConfig, "seed", "--seed")] = None,
    figure: Annotated[
        Path | None, typer.Option("--figure", help="Also draw the differences into this PNG file.", show_default=False)
    ] = None,
    report: opt.Report = None,
    card: Annotated[
        bool, typer.Option("--card/--no-card", help="Write what was kept into the cards of checkpoints of ours.")
    ] = True,
    json: opt.Json = None,
    data_dir: opt.DataDir = None,
    batch_tokens: Annotated[int | None, opt.option(EvaluationConfig, "batch_tokens", "--batch-tokens")] = None,
    dtype: opt.DTypeName = None,
    device: opt.Device = None,
) -> None:
    """Compare models item by item: what each lost and gained, and whether so many items can tell."""
    given = locals()
    config = opt.take(EvaluationConfig, given, benchmarks=opt.names(benchmarks))
    source = opt.take(ModelConfig, given, model=models[0])
    from fasc.outputs import write_artifact
    from fasc.provenance import provenance
    from fasc.reporting.compared import draw_compared, print_compared, short
    from fasc.reporting.kept_card import write_certificates
    from fasc.stages.compare import compare as compared

    inputs = (*models, dense, config.corpus)
    opt.check_files(json, figure, inputs=inputs, kind="comparison")
    opt.check_report(report, inputs=inputs, beside=(json, figure))
    result = compared(models, config, source, dense=dense)
    made = provenance(evaluation=config.model_dump(mode="json", exclude_none=True))
    if json is not None:
        write_artifact(json, "comparison", result.to_dict() | {"provenance": made})
    if figure is not None:
        draw_compared(result, figure)
    if card:
        write_certificates(result)
    print_compared(result)
    if report is not None:
        from fasc.reporting.page.sources import Source

        title = f"What {', '.join(short(name) for name in result.names[1:])} kept of {short(result.names[0])}"
        opt.write_report(report, Source(title, comparison=result, provenance=made))
