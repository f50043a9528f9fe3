"""``fasc evaluate``, ``fasc bench`` and ``fasc recover``."""

from pathlib import Path
from typing import Annotated

import typer

from fasc.cli import options as opt
from fasc.compression.options import RecoveryConfig
from fasc.evaluation.options import EvaluationConfig, SpeedConfig
from fasc.model.options import ModelConfig
from fasc.errors import UsageError


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
    given = locals()
    config = opt.take(EvaluationConfig, given, benchmarks=opt.names(benchmarks))
    source = opt.take(ModelConfig, given, model=checkpoint)
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
    seen = pipeline.texts_seen(checkpoint)
    scores = measure(loaded.model, loaded.tokenizer, config, dense=dense_model, seen=seen)
    print_scores(scores)
    if json is not None:
        write_json(json, [score.to_dict() for score in scores])


def bench(
    checkpoint: opt.Model,
    dense: Annotated[
        str | None, typer.Option("--dense", help="The dense model. [default: what the checkpoint says]", show_default=False)
    ] = None,
    prefill: Annotated[int | None, opt.option(SpeedConfig, "prefill", "--prefill")] = None,
    prompt: Annotated[int | None, opt.option(SpeedConfig, "prompt", "--prompt")] = None,
    decode: Annotated[int | None, opt.option(SpeedConfig, "decode", "--decode")] = None,
    batches: Annotated[str | None, opt.option(SpeedConfig, "batches", "--batches")] = None,
    repeats: Annotated[int | None, opt.option(SpeedConfig, "repeats", "--repeats")] = None,
    json: opt.Json = None,
    dtype: opt.DTypeName = None,
    device: opt.Device = None,
) -> None:
    """Time a compressed model and the dense one on this machine, in turn, and say what was gained and why not more."""
    given = locals()
    config = opt.take(SpeedConfig, given, batches=opt.names(batches))
    source = opt.take(ModelConfig, given, model=checkpoint)
    from fasc import pipeline
    from fasc.evaluation.speed import compare_speed
    from fasc.provenance import provenance
    from fasc.reporting.speed_table import print_speed
    from fasc.storage import write_json

    reference = dense or pipeline.dense_of(checkpoint)
    if reference is None:
        raise UsageError(f"`{checkpoint}` does not say which model it was compressed from", "pass --dense MODEL")
    budget = pipeline.budget_of(checkpoint)
    report = compare_speed(checkpoint, reference, config, budget=budget, dtype=source.dtype, device=source.device)
    print_speed(report)
    if json is not None:
        rows = [one.to_dict() for one in report.comparisons]
        made = provenance(speed=config.model_dump(mode="json"))
        write_json(json, {"comparisons": rows, "ideal": report.ideal, "remarks": list(report.remarks), "provenance": made})


def recover(
    checkpoint: Annotated[Path, typer.Argument(metavar="CHECKPOINT", help="A folder that `fasc compress` wrote.")],
    out: opt.Out,
    dense: Annotated[
        str | None, typer.Option("--dense", help="The dense model. [default: what the checkpoint says]", show_default=False)
    ] = None,
    corpus: Annotated[str | None, opt.option(RecoveryConfig, "corpus", "--corpus")] = None,
    sequences: Annotated[int | None, opt.option(RecoveryConfig, "sequences", "--sequences")] = None,
    sequence_length: Annotated[int | None, opt.option(RecoveryConfig, "sequence_length", "--sequence-length")] = None,
    batch_tokens: Annotated[int | None, opt.option(RecoveryConfig, "batch_tokens", "--batch-tokens")] = None,
    learning_rate: Annotated[float | None, opt.option(RecoveryConfig, "learning_rate", "--learning-rate")] = None,
    mixed_precision: Annotated[
        bool | None, opt.option(RecoveryConfig, "mixed_precision", "--mixed-precision/--no-mixed-precision")
    ] = None,
    seed: Annotated[int | None, opt.option(RecoveryConfig, "seed", "--seed")] = None,
    data_dir: opt.DataDir = None,
    device: opt.Device = None,
    overwrite: opt.Overwrite = False,
) -> None:
    """Train the replaced layers of a compressed model towards the dense one, on unlabelled text, and write a new checkpoint.

    The size stays the same. Minimises the KL divergence to the dense model; a few tens of thousands of tokens bring back much of
    what compressing lost. The same command goes on where a killed one was, at most five minutes before.
    """
    given = locals()
    config = opt.take(RecoveryConfig, given)
    source = opt.take(ModelConfig, given, model=str(checkpoint))
    from fasc import pipeline
    from fasc.storage import refuse_existing

    refuse_existing(out, overwrite=overwrite)
    done = pipeline.recover_and_save(source, out, config, dense=dense, overwrite=overwrite)
    typer.echo(
        f"KL to the dense model on {done.held_out:,} held-out tokens: {done.before:.4f} → {done.after:.4f} nats/token, by "
        f"{len(done.losses)} steps and {done.share:.2f} of the way they went"
    )
    typer.echo(out)
