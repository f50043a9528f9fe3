"""``fasc diagnose``."""

from pathlib import Path
from typing import Annotated

import typer

from fasc.cli import options as opt
from fasc.cli.collect import DEFAULT_METHODS
from fasc.errors import UsageError
from fasc.model.options import ModelConfig
from fasc.planning.options import BudgetConfig
from fasc.statistics.options import CalibrationConfig


def diagnose(
    model: opt.Model,
    methods: opt.Methods = None,
    rank_fraction: opt.RankFraction = None,
    statistics: opt.StatisticsFile = None,
    exclusions: Annotated[
        str, typer.Option("--exclusions", help="Groups marked as excluded: `paper` (see docs/method.md) or `none`.")
    ] = "paper",
    plan: Annotated[
        Path | None,
        typer.Option(
            "--plan", help="File of `fasc plan --json`: what it makes of each expert of a mixture is shown.", show_default=False
        ),
    ] = None,
    json: opt.Json = None,
    csv: Annotated[Path | None, typer.Option("--csv", help="Also write a flat table to this file.", show_default=False)] = None,
    figures: Annotated[
        Path | None, typer.Option("--figures", help="Draw ρ and angles into this folder.", show_default=False)
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
    dtype: opt.DTypeName = None,
    device: opt.Device = None,
) -> None:
    """Print, per input group: ρ and its noise floor, spectra, the ranks that keep most of the energy, the forecast loss.

    Every expert of a mixture of experts has rows of its own, and one in a table of experts: tokens heard, ρ, forecast loss.
    """
    given = locals()
    calibration = opt.take(CalibrationConfig, given)
    chosen = [opt.method(given, name) for name in opt.names(methods) or DEFAULT_METHODS]
    budget = opt.build(BudgetConfig, rank_fraction=rank_fraction)
    source = opt.take(ModelConfig, given)
    if exclusions not in ("paper", "none"):
        raise UsageError(f"--exclusions is `{exclusions}`", "known: paper, none")
    opt.unused(given, tuple(CalibrationConfig.model_fields), "beside --statistics", when=statistics is not None)
    from fasc.planning.plan import Plan
    from fasc.reporting.console import print_line
    from fasc.reporting.diagnosis_table import print_diagnosis
    from fasc.stages.compress import load, needs_of
    from fasc.stages.diagnose import diagnose_model

    needs_of(tuple(chosen))
    drawings = () if figures is None else (figures / "rho.png", figures / "angles.png")
    inputs = (model, statistics, plan, calibration.corpus)
    opt.check_files(json, csv, *drawings, inputs=inputs, kind="diagnosis")
    opt.check_report(report, inputs=inputs, beside=(json, csv, *drawings))
    made = None if plan is None else Plan.load(plan)
    diagnosis = diagnose_model(
        load(source),
        chosen,
        rank_fraction=budget.rank_fraction or 0.5,
        exclusions="paper" if exclusions == "paper" else "none",
        statistics=statistics,
        calibration=calibration,
        plan=made,
    )
    if json is not None:
        diagnosis.save(json)
    if csv is not None:
        diagnosis.save_csv(csv)
    print_diagnosis(diagnosis)
    if figures is not None:
        from fasc.reporting.dependence_figures import dependence_figures

        for path in dependence_figures(diagnosis.rows, diagnosis.meta["angles_between"], figures):
            print_line(path)
    if report is not None:
        from fasc.provenance import provenance
        from fasc.reporting.page.sources import Source

        found = {"groups": diagnosis.rows, "experts": diagnosis.experts, "meta": diagnosis.meta}
        about = provenance(model=model, statistics=dict(diagnosis.meta))
        opt.write_report(report, Source(f"Diagnosis of {Path(model).name}", diagnosis=found, provenance=about))
