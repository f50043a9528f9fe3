"""``fasc evaluate`` and ``fasc bench``."""

from typing import Annotated

import typer

from fasc.cli import options as opt
from fasc.config import EvaluationConfig, ModelConfig


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
