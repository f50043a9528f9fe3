"""``fasc plan`` and ``fasc compress``."""

from pathlib import Path
from typing import Annotated

import typer

from fasc.cli import options as opt
from fasc.cli.calibration_verbs import stored_statistics
from fasc.model.options import LayersConfig, ModelConfig
from fasc.planning.options import BudgetConfig, MethodConfig
from fasc.recipe import Recipe
from fasc.statistics.options import CalibrationConfig


def plan(
    model: opt.Model,
    method: opt.MethodName = None,
    rank_fraction: opt.RankFraction = None,
    param_fraction: opt.ParamFraction = None,
    model_fraction: opt.ModelFraction = None,
    max_bytes: opt.MaxBytes = None,
    max_perplexity_increase: opt.MaxPerplexityIncrease = None,
    max_kl: opt.MaxKl = None,
    allocation: opt.Allocation = None,
    layouts: opt.Layouts = None,
    rank_multiple: opt.RankMultiple = None,
    channel_multiple: opt.ChannelMultiple = None,
    floor: opt.Floor = None,
    overhead: opt.Overhead = None,
    statistics: opt.StatisticsFile = None,
    held_out: opt.HeldOutFile = None,
    damping: opt.Damping = None,
    gate: opt.Gate = None,
    gate_threshold: opt.GateThreshold = None,
    include: opt.Include = None,
    exclude: opt.Exclude = None,
    json: opt.Json = None,
    dtype: opt.DTypeName = None,
) -> None:
    """Print what a compressed model will weigh, and with --statistics what it is predicted to lose, before it is made.

    Without statistics the plan is uniform. Budgets: one of --rank-fraction, --param-fraction, --model-fraction, --max-bytes,
    --max-perplexity-increase, --max-kl.
    """
    given = locals()
    budget = opt.take(BudgetConfig, given)
    if statistics is None and allocation is None and not budget.limits_loss:
        allocation = "uniform"
    options = opt.take(MethodConfig, given, name=method, allocation=allocation, layouts=opt.names(layouts))
    source = opt.take(ModelConfig, given, device="cpu")
    layers = opt.take(LayersConfig, given)
    from fasc import pipeline
    from fasc.forecast.cache import kept_forecasts
    from fasc.provenance import file_digest
    from fasc.pruning import find_method
    from fasc.reporting.plan_table import print_plan
    from fasc.storage import write_json

    find_method(options.name)
    loaded = pipeline.load(source)
    found = None if statistics is None else stored_statistics(statistics, loaded)
    chosen = layers if found is None or include or exclude else None
    unseen = None if held_out is None else stored_statistics(held_out, loaded)
    digests = [None if file is None else file_digest(file) for file in (statistics, held_out)]
    with kept_forecasts(*digests) as known:
        result = pipeline.plan(loaded.model, options, budget, layers=chosen, statistics=found, known=known, held_out=unseen)
    print_plan(result)
    if json is not None:
        write_json(json, result.to_dict())


def compress(
    model: opt.Model,
    out: opt.Out,
    method: opt.MethodName = None,
    rank_fraction: opt.RankFraction = None,
    param_fraction: opt.ParamFraction = None,
    model_fraction: opt.ModelFraction = None,
    max_bytes: opt.MaxBytes = None,
    max_perplexity_increase: opt.MaxPerplexityIncrease = None,
    max_kl: opt.MaxKl = None,
    allocation: opt.Allocation = None,
    layouts: opt.Layouts = None,
    rank_multiple: opt.RankMultiple = None,
    channel_multiple: opt.ChannelMultiple = None,
    floor: opt.Floor = None,
    overhead: opt.Overhead = None,
    propagate: opt.Propagate = None,
    sketch: opt.Sketch = None,
    sketch_tolerance: opt.SketchTolerance = None,
    gate: opt.Gate = None,
    gate_threshold: opt.GateThreshold = None,
    corpus: opt.Corpus = None,
    sequences: opt.Sequences = None,
    sequence_length: opt.SequenceLength = None,
    seed: opt.Seed = None,
    labels: opt.LabelsName = None,
    data_dir: opt.DataDir = None,
    statistics: opt.StatisticsFile = None,
    held_out: opt.HeldOutFile = None,
    plan: Annotated[
        Path | None, typer.Option("--plan", help="Carry out this plan (from `fasc plan --json`).", show_default=False)
    ] = None,
    merge: Annotated[bool, typer.Option("--merge", help="Write an ordinary dense checkpoint, which loads without fasc.")] = False,
    damping: opt.Damping = None,
    reading: opt.Reading = None,
    include: opt.Include = None,
    exclude: opt.Exclude = None,
    batch_tokens: opt.BatchTokens = None,
    gradient_checkpointing: opt.Checkpointing = None,
    mixed_precision: opt.MixedCalibration = None,
    dtype: opt.DTypeName = None,
    device: opt.Device = None,
    overwrite: opt.Overwrite = False,
) -> None:
    """Compress a model and write a Hugging Face checkpoint to --out.

    Budgets: one of --rank-fraction, --param-fraction, --model-fraction, --max-bytes, --max-perplexity-increase, --max-kl. What an
    interrupted run has measured is kept beside --out, and the same command goes on from there.
    """
    given = locals()
    recipe = Recipe(
        source=opt.take(ModelConfig, given),
        calibration=opt.take(CalibrationConfig, given),
        layers=opt.take(LayersConfig, given),
        methods=(opt.take(MethodConfig, given, name=method, layouts=opt.names(layouts)),),
        budgets=(opt.take(BudgetConfig, given),),
    )
    from fasc import pipeline
    from fasc.planning.plan import read_plan
    from fasc.reporting.plan_table import print_totals
    from fasc.storage import refuse_existing

    refuse_existing(out, overwrite=overwrite)
    pipeline.needs_of(recipe.methods, recipe.budgets)
    rank_plan = None if plan is None else read_plan(plan, recipe.methods[0].name)
    done = pipeline.compress_model(
        recipe, out, statistics=statistics, held_out=held_out, rank_plan=rank_plan, merged=merge, overwrite=overwrite
    )
    print_totals(done)
    typer.echo(out)
