"""``fasc validate``."""

from pathlib import Path
from typing import Annotated

import typer

from fasc.cli import options as opt
from fasc.cli.calibration_verbs import DEFAULT_METHODS, measured_statistics
from fasc.model.options import LayersConfig, ModelConfig
from fasc.planning.options import MethodConfig
from fasc.statistics.options import CalibrationConfig


def validate(
    model: opt.Model,
    methods: opt.Methods = None,
    rank_fractions: Annotated[
        str, typer.Option("--rank-fractions", help="Rank fractions of single groups, separated by commas, or `none`.")
    ] = "0.3,0.5,0.7",
    param_fractions: Annotated[
        str, typer.Option("--param-fractions", help="Parameter fractions of whole models of the first method, or `none`.")
    ] = "0.95,0.9,0.8,0.7,0.6",
    held_out: Annotated[int, typer.Option("--held-out", min=1, help="Held-out sequences, from the same corpus.")] = 8,
    statistics: opt.StatisticsFile = None,
    json: opt.Json = None,
    figure: Annotated[
        Path | None, typer.Option("--figure", help="Draw the scatter plots into this PNG.", show_default=False)
    ] = None,
    corpus: opt.Corpus = None,
    sequences: opt.Sequences = None,
    sequence_length: opt.SequenceLength = None,
    seed: opt.Seed = None,
    labels: opt.LabelsName = None,
    data_dir: opt.DataDir = None,
    batch_tokens: opt.BatchTokens = None,
    damping: opt.Damping = None,
    include: opt.Include = None,
    exclude: opt.Exclude = None,
    dtype: opt.DTypeName = None,
    device: opt.Device = None,
) -> None:
    """Compress one group at a time, measure the true KL on held-out text, and report how well ρ and ½J predicted it.

    Then the whole model at several sizes: forecast against measured.
    """
    given = locals()
    calibration = opt.take(CalibrationConfig, given)
    chosen = [opt.take(MethodConfig, given, name=name) for name in opt.names(methods) or DEFAULT_METHODS]
    ranks = [budget.rank_fraction or 0.5 for budget in opt.fractions(rank_fractions, "rank_fraction")]
    budgets = opt.fractions(param_fractions, "param_fraction")
    source = opt.take(ModelConfig, given)
    layers = opt.take(LayersConfig, given)
    from fasc import pipeline
    from fasc.diagnosis.validate import held_out_moments, summarise, validate_plans
    from fasc.diagnosis.validate import validate as measure
    from fasc.diagnosis.diagnose import diagnosis_needs
    from fasc.provenance import provenance
    from fasc.reporting.validation import print_plans, print_validation, validation_figure
    from fasc.storage import write_json

    needs = diagnosis_needs(chosen)
    if budgets:
        needs |= pipeline.needs_of(chosen[:1], budgets)
    loaded = pipeline.load(source)
    found = measured_statistics(statistics, loaded, needs, calibration, layers)
    tokens = pipeline.held_out(loaded, calibration, held_out)
    unseen = held_out_moments(loaded.model, found, tokens, calibration)
    rows = measure(loaded.model, found, tokens, chosen, ranks, held_out=unseen) if ranks else []
    summary = summarise(rows)
    if rows:
        print_validation(summary)
    plans = validate_plans(loaded.model, found, tokens, chosen[0], budgets, held_out=unseen)
    if plans:
        print_plans(plans)
    if json is not None:
        made = provenance(calibration=dict(found.meta["calibration"]))
        write_json(json, {"rows": rows, "summary": summary, "plans": plans, "provenance": made})
    if figure is not None and rows:
        typer.echo(validation_figure(rows, figure))
