"""``fasc collect`` and ``fasc diagnose``."""

from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from fasc.cli import options as opt
from fasc.model.options import LayersConfig, ModelConfig
from fasc.planning.options import BudgetConfig, MethodConfig
from fasc.statistics.options import CalibrationConfig
from fasc.errors import UsageError

if TYPE_CHECKING:
    from fasc.statistics.moments import Need, Statistics
    from fasc.model.load import LoadedModel

DEFAULT_METHODS = ("fasc", "svd")


def collect(
    model: opt.Model,
    out: opt.Out,
    methods: opt.Methods = None,
    corpus: opt.Corpus = None,
    sequences: opt.Sequences = None,
    sequence_length: opt.SequenceLength = None,
    skip: opt.Skip = None,
    seed: opt.Seed = None,
    labels: opt.LabelsName = None,
    data_dir: opt.DataDir = None,
    batch_tokens: opt.BatchTokens = None,
    gradient_checkpointing: opt.Checkpointing = None,
    mixed_precision: opt.MixedCalibration = None,
    diagnosis: Annotated[
        bool, typer.Option("--diagnosis", help="Also measure what ρ, its interval, ½J and the gates need.")
    ] = False,
    include: opt.Include = None,
    exclude: opt.Exclude = None,
    dtype: opt.DTypeName = None,
    device: opt.Device = None,
    overwrite: opt.Overwrite = False,
) -> None:
    """Measure the moments that the methods need and write them to --out (.safetensors)."""
    given = locals()
    calibration = opt.take(CalibrationConfig, given)
    layers = opt.take(LayersConfig, given)
    source = opt.take(ModelConfig, given)
    from fasc import pipeline
    from fasc.diagnosis.diagnose import diagnosis_needs
    from fasc.model.experts import expert_layers
    from fasc.storage import refuse_existing

    refuse_existing(out, overwrite=overwrite)
    chosen = [MethodConfig(name=name) for name in opt.names(methods) or DEFAULT_METHODS]
    needs = pipeline.needs_of(chosen)
    if diagnosis:
        needs |= diagnosis_needs(chosen)
    loaded = pipeline.load(source)
    with expert_layers(loaded.model) if diagnosis else nullcontext():
        statistics = pipeline.calibrate(loaded.model, loaded.tokenizer, needs, calibration, layers)
    typer.echo(statistics.save(out))


def diagnose(
    model: opt.Model,
    methods: opt.Methods = None,
    rank_fraction: opt.RankFraction = None,
    statistics: opt.StatisticsFile = None,
    exclusions: Annotated[
        str, typer.Option("--exclusions", help="Groups marked as excluded: `paper` (see docs/method.md) or `none`.")
    ] = "paper",
    json: opt.Json = None,
    csv: Annotated[Path | None, typer.Option("--csv", help="Also write a flat table to this file.", show_default=False)] = None,
    figures: Annotated[
        Path | None, typer.Option("--figures", help="Draw ρ and angles into this folder.", show_default=False)
    ] = None,
    corpus: opt.Corpus = None,
    sequences: opt.Sequences = None,
    sequence_length: opt.SequenceLength = None,
    seed: opt.Seed = None,
    labels: opt.LabelsName = None,
    data_dir: opt.DataDir = None,
    batch_tokens: opt.BatchTokens = None,
    damping: opt.Damping = None,
    dtype: opt.DTypeName = None,
    device: opt.Device = None,
) -> None:
    """Print, per input group: ρ and its noise floor, spectra, the ranks that keep most of the energy, the forecast loss.

    Every expert of a mixture of experts has rows of its own.
    """
    given = locals()
    calibration = opt.take(CalibrationConfig, given)
    chosen = [opt.take(MethodConfig, given, name=name) for name in opt.names(methods) or DEFAULT_METHODS]
    budget = opt.build(BudgetConfig, rank_fraction=rank_fraction)
    source = opt.take(ModelConfig, given)
    from fasc import pipeline
    from fasc.diagnosis.diagnose import diagnose as diagnose_groups
    from fasc.diagnosis.diagnose import diagnosis_needs
    from fasc.model.experts import expert_layers
    from fasc.reporting.diagnosis_table import print_diagnosis
    from fasc.storage import write_json

    if exclusions not in ("paper", "none"):
        raise UsageError(f"--exclusions is `{exclusions}`", "known: paper, none")
    needs = diagnosis_needs(chosen)
    loaded = pipeline.load(source)
    policy: Literal["paper", "none"] = "paper" if exclusions == "paper" else "none"
    with expert_layers(loaded.model):
        found = measured_statistics(statistics, loaded, needs, calibration, LayersConfig())
        diagnosis = diagnose_groups(loaded.model, found, chosen, rank_fraction=budget.rank_fraction or 0.5, policy=policy)
    print_diagnosis(diagnosis)
    if json is not None:
        write_json(json, list(diagnosis.rows))
    if csv is not None:
        diagnosis.save_csv(csv)
    if figures is not None:
        from fasc.reporting.dependence_figures import dependence_figures

        for path in dependence_figures(diagnosis.rows, figures):
            typer.echo(path)


def measured_statistics(
    file: Path | None, loaded: "LoadedModel", needs: "frozenset[Need]", calibration: CalibrationConfig, layers: LayersConfig
) -> "Statistics":
    """Statistics from a file if there is one, measured otherwise."""
    from fasc import pipeline

    if file is not None:
        return stored_statistics(file, loaded)
    return pipeline.calibrate(loaded.model, loaded.tokenizer, needs, calibration, layers)


def stored_statistics(file: Path, loaded: "LoadedModel") -> "Statistics":
    """Statistics from a file, checked to be of this model, of the layers that it has now: experts may not be layers of it."""
    from fasc.statistics.moments import Statistics
    from fasc.model.load import model_fingerprint

    found = Statistics.load(file)
    found.require_model(model_fingerprint(loaded.model))
    return found.present_in(loaded.model)
