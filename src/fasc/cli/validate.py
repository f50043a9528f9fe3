"""``fasc validate``."""

from pathlib import Path
from typing import Annotated, Literal

import typer

from fasc.cli import options as opt
from fasc.cli.collect import DEFAULT_METHODS
from fasc.evaluation.options import EvaluationConfig
from fasc.model.options import LayersConfig, ModelConfig
from fasc.statistics.options import CalibrationConfig

_FRACTIONS = "0.95,0.9,0.8,0.7,0.6"


def validate(  # noqa: PLR0915 - a statement for each part of what was asked
    model: opt.Model,
    methods: opt.Methods = None,
    rank_fractions: Annotated[
        str, typer.Option("--rank-fractions", help="Rank fractions of single groups, separated by commas, or `none`.")
    ] = "0.3,0.5,0.7",
    param_fractions: Annotated[
        str | None,
        typer.Option(
            "--param-fractions",
            help=f"Parameter fractions of whole models of the first method, or `none`. [default: {_FRACTIONS}, with --bits none]",
            show_default=False,
        ),
    ] = None,
    max_kls: Annotated[
        str,
        typer.Option("--max-kls", help="Forecast losses of whole models of the first method, or `none`; the budgets for --bits."),
    ] = "none",
    layouts: opt.Layouts = None,
    bits: opt.Bits = None,
    by: Annotated[Literal["group", "block"], typer.Option("--by", help="What is compressed at a time.")] = "group",
    benchmarks: Annotated[
        str | None,
        typer.Option(
            "--benchmarks", help="Score each on these as well, item by item beside the dense model.", show_default=False
        ),
    ] = None,
    limit: Annotated[int | None, opt.option(EvaluationConfig, "limit", "--limit")] = None,
    held_out: Annotated[int, typer.Option("--held-out", min=1, help="Held-out sequences, from the same corpus.")] = 8,
    statistics: opt.StatisticsFile = None,
    json: opt.Json = None,
    figure: Annotated[
        Path | None, typer.Option("--figure", help="Draw the scatter plots into this PNG.", show_default=False)
    ] = None,
    report: opt.Report = None,
    corpus: opt.Corpus = None,
    sequences: opt.Sequences = None,
    sequence_length: opt.SequenceLength = None,
    seed: opt.Seed = None,
    labels: opt.LabelsName = None,
    chat_template: opt.ChatTemplate = None,
    data_dir: opt.DataDir = None,
    batch_tokens: opt.BatchTokens = None,
    expert_floor: opt.ExpertFloor = None,
    route_all: opt.RouteAll = None,
    damping: opt.Damping = None,
    include: opt.Include = None,
    exclude: opt.Exclude = None,
    dtype: opt.DTypeName = None,
    device: opt.Device = None,
) -> None:
    """Compress one group or block at a time, measure the true KL on held-out text, and report how well ρ and ½J predicted it.

    Then the whole model at several sizes: forecast against measured.
    """
    given = locals()
    calibration = opt.take(CalibrationConfig, given)
    first, *others = opt.names(methods) or DEFAULT_METHODS
    alone = {**given, "layouts": None, "bits": None}
    chosen = [opt.method(given, first), *(opt.method(alone, name) for name in others)]
    ranks = [budget.rank_fraction or 0.5 for budget in opt.fractions(rank_fractions, "rank_fraction")]
    opt.unused(given, ("param_fractions",), "beside --bits, whose budgets are --max-kls", when=bool(bits))
    whole = opt.fractions("none" if bits else param_fractions or _FRACTIONS, "param_fraction")
    budgets = [*whole, *opt.fractions(max_kls, "max_kl")]
    source = opt.take(ModelConfig, given)
    layers = opt.take(LayersConfig, given)
    scored = opt.names(benchmarks)
    evaluation = None
    opt.unused(given, ("limit",), "without --benchmarks", when=not scored)
    opt.unused(given, ("sequences", "labels", "expert_floor", "route_all"), "beside --statistics", when=statistics is not None)
    if scored:
        evaluation = opt.build(EvaluationConfig, benchmarks=scored, limit=limit, data_dir=data_dir)
    from fasc.outputs import write_artifact
    from fasc.provenance import provenance
    from fasc.reporting.console import print_line
    from fasc.reporting.validation import print_parts, print_plans, print_validation, validation_figure
    from fasc.stages.compress import load, needs_of
    from fasc.stages.diagnose import validate as measure

    needs_of(tuple(chosen))
    inputs = (model, statistics, calibration.corpus)
    opt.check_files(json, figure, inputs=inputs, kind="validation")
    opt.check_report(report, inputs=inputs, beside=(json, figure))
    result = measure(
        load(source),
        chosen,
        ranks,
        budgets,
        statistics=statistics,
        held_out=held_out,
        calibration=calibration,
        layers=layers,
        by=by,
        evaluation=evaluation,
    )
    result["provenance"] = provenance(model=model, calibration=result.pop("calibration"))
    if json is not None:
        write_artifact(json, "validation", result)
    if result["rows"]:
        print_validation(result["summary"])
    if by == "block" or scored:
        print_parts(result["rows"])
    if result["plans"]:
        print_plans(result["plans"])
    if figure is not None and result["rows"]:
        print_line(validation_figure(result["rows"], figure))
    if report is not None:
        from fasc.reporting.page.sources import Source

        title = f"How well forecasts predict {Path(model).name}"
        opt.write_report(report, Source(title, validation=result, provenance=result["provenance"]))
