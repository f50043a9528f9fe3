"""``fasc validate``."""

from pathlib import Path
from typing import Annotated

import typer

from fasc.cli import options as opt
from fasc.cli.calibration_verbs import DEFAULT_METHODS, stored_statistics
from fasc.config import BudgetConfig, CalibrationConfig, LayersConfig, MethodConfig, ModelConfig


def validate(
    model: opt.Model,
    methods: opt.Methods = None,
    rank_fractions: Annotated[str, typer.Option("--rank-fractions", help="Rank fractions, separated by commas.")] = "0.3,0.5,0.7",
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
    """Compress one group at a time, measure the true KL on held-out text, and report how well ρ and ½J predicted it."""
    calibration = opt.build(
        CalibrationConfig,
        corpus=corpus,
        sequences=sequences,
        sequence_length=sequence_length,
        seed=seed,
        labels=labels,
        data_dir=data_dir,
        batch_tokens=batch_tokens,
    )
    chosen = [opt.build(MethodConfig, name=name, damping=damping) for name in opt.names(methods) or DEFAULT_METHODS]
    fractions = [opt.build(BudgetConfig, rank_fraction=text).rank_fraction or 0.5 for text in opt.names(rank_fractions) or ()]
    source = opt.build(ModelConfig, model=model, dtype=dtype, device=device)
    layers = opt.build(LayersConfig, include=include, exclude=exclude)
    from fasc import pipeline
    from fasc.compression.validate import summarise
    from fasc.compression.validate import validate as measure
    from fasc.diagnosis.diagnose import diagnosis_needs
    from fasc.provenance import provenance
    from fasc.reporting.validation import print_validation, validation_figure
    from fasc.storage import write_json

    needs = diagnosis_needs(chosen)
    loaded = pipeline.load(source)
    if statistics is None:
        found = pipeline.calibrate(loaded.model, loaded.tokenizer, needs, calibration, layers)
    else:
        found = stored_statistics(statistics, loaded)
    rows = measure(loaded.model, found, pipeline.held_out(loaded, calibration, held_out), chosen, fractions)
    summary = summarise(rows)
    print_validation(summary)
    if json is not None:
        write_json(
            json, {"rows": rows, "summary": summary, "provenance": provenance(calibration=dict(found.meta["calibration"]))}
        )
    if figure is not None:
        typer.echo(validation_figure(rows, figure))
