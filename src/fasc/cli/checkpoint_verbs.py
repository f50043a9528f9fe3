"""``fasc plan``, ``fasc compress`` and ``fasc evaluate``."""

from pathlib import Path
from typing import Annotated

import typer

from fasc.cli import options as opt
from fasc.cli.calibration_verbs import stored_statistics
from fasc.config import (
    BudgetConfig,
    CalibrationConfig,
    EvaluationConfig,
    LayersConfig,
    MethodConfig,
    ModelConfig,
    Recipe,
)


def plan(
    model: opt.Model,
    method: opt.MethodName = None,
    rank_fraction: opt.RankFraction = None,
    include: opt.Include = None,
    exclude: opt.Exclude = None,
    json: opt.Json = None,
    dtype: opt.DTypeName = None,
) -> None:
    """Print what a compressed model will weigh, before any calibration."""
    budget = opt.build(BudgetConfig, rank_fraction=rank_fraction)
    options = opt.build(MethodConfig, name=method)
    source = opt.build(ModelConfig, model=model, dtype=dtype, device="cpu")
    layers = opt.build(LayersConfig, include=include, exclude=exclude)
    from fasc import pipeline
    from fasc.methods import get_method
    from fasc.reporting.plan_table import print_plan
    from fasc.storage import write_json

    get_method(options.name)
    found = pipeline.plan(pipeline.load(source).model, options.name, budget, layers=layers)
    print_plan(found)
    if json is not None:
        write_json(json, found.to_dict())


def compress(
    model: opt.Model,
    out: opt.Out,
    method: opt.MethodName = None,
    rank_fraction: opt.RankFraction = None,
    corpus: opt.Corpus = None,
    sequences: opt.Sequences = None,
    sequence_length: opt.SequenceLength = None,
    seed: opt.Seed = None,
    labels: opt.LabelsName = None,
    data_dir: opt.DataDir = None,
    statistics: opt.StatisticsFile = None,
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
    dtype: opt.DTypeName = None,
    device: opt.Device = None,
    overwrite: opt.Overwrite = False,
) -> None:
    """Compress a model and write a Hugging Face checkpoint to --out."""
    recipe = Recipe(
        source=opt.build(ModelConfig, model=model, dtype=dtype, device=device),
        calibration=opt.build(
            CalibrationConfig,
            corpus=corpus,
            sequences=sequences,
            sequence_length=sequence_length,
            seed=seed,
            labels=labels,
            data_dir=data_dir,
            batch_tokens=batch_tokens,
            gradient_checkpointing=gradient_checkpointing,
        ),
        layers=opt.build(LayersConfig, include=include, exclude=exclude),
        methods=(opt.build(MethodConfig, name=method, damping=damping, reading=reading),),
        budgets=(opt.build(BudgetConfig, rank_fraction=rank_fraction),),
    )
    from fasc import pipeline
    from fasc.budget.plan import read_plan
    from fasc.reporting.plan_table import print_totals
    from fasc.storage import refuse_existing

    refuse_existing(out, overwrite=overwrite)
    needs = pipeline.needs_of(recipe.methods)
    rank_plan = None if plan is None else read_plan(plan, recipe.methods[0].name)
    loaded = pipeline.load(recipe.source)
    if statistics is None:
        found = pipeline.calibrate(loaded.model, loaded.tokenizer, needs, recipe.calibration, recipe.layers)
    else:
        found = stored_statistics(statistics, loaded)
    done = pipeline.compress_and_save(loaded, found, recipe, out, rank_plan=rank_plan, merged=merge, overwrite=overwrite)
    print_totals(done)
    typer.echo(out)


def evaluate(
    checkpoint: opt.Model,
    benchmarks: opt.Benchmarks = None,
    corpus: Annotated[str | None, opt.option(EvaluationConfig, "corpus", "--corpus")] = None,
    limit: Annotated[int | None, opt.option(EvaluationConfig, "limit", "--limit")] = None,
    dense: Annotated[
        str | None,
        typer.Option("--dense", help="The dense model, for kl. [default: what the checkpoint says]", show_default=False),
    ] = None,
    data_dir: opt.DataDir = None,
    context: Annotated[int | None, opt.option(EvaluationConfig, "context", "--context")] = None,
    windows: Annotated[int | None, opt.option(EvaluationConfig, "windows", "--windows")] = None,
    seed: Annotated[int | None, opt.option(EvaluationConfig, "seed", "--seed")] = None,
    batch_tokens: Annotated[int | None, opt.option(EvaluationConfig, "batch_tokens", "--batch-tokens")] = None,
    json: opt.Json = None,
    dtype: opt.DTypeName = None,
    device: opt.Device = None,
) -> None:
    """Score a checkpoint, dense or compressed, with 95 % intervals."""
    config = opt.build(
        EvaluationConfig,
        benchmarks=opt.names(benchmarks),
        corpus=corpus,
        limit=limit,
        data_dir=data_dir,
        context=context,
        windows=windows,
        seed=seed,
        batch_tokens=batch_tokens,
    )
    source = opt.build(ModelConfig, model=checkpoint, dtype=dtype, device=device)
    from fasc import pipeline
    from fasc.evaluation import get_benchmark
    from fasc.evaluation.evaluate import evaluate as measure
    from fasc.reporting.score_table import print_scores
    from fasc.storage import write_json

    found = [get_benchmark(name) for name in config.benchmarks]
    reference = dense or pipeline.dense_of(checkpoint)
    loaded = pipeline.load(source)
    dense_model = None
    if reference is not None and any(one.needs_dense for one in found):
        dense_model = pipeline.load(source.model_copy(update={"model": reference})).model
    calibrated_on = pipeline.calibration_digest(checkpoint)
    scores = measure(loaded.model, loaded.tokenizer, config, dense=dense_model, calibrated_on=calibrated_on)
    print_scores(scores)
    if json is not None:
        write_json(json, [score.to_dict() for score in scores])
