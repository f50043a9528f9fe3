"""``fasc evaluate``."""

from typing import Annotated

import typer

from fasc.cli import options as opt
from fasc.evaluation.options import EvaluationConfig
from fasc.model.options import ModelConfig


def evaluate(
    checkpoint: opt.Model,
    benchmarks: opt.Benchmarks = None,
    corpus: Annotated[str | None, opt.option(EvaluationConfig, "corpus", "--corpus")] = None,
    limit: Annotated[int | None, opt.option(EvaluationConfig, "limit", "--limit")] = None,
    shots: Annotated[int | None, opt.option(EvaluationConfig, "shots", "--shots")] = None,
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
    device_map: opt.DeviceMapName = None,
    nproc: opt.Nproc = None,
) -> None:
    """Score a checkpoint, dense or compressed, with 95 % intervals."""
    given = locals()
    config = opt.take(EvaluationConfig, given, benchmarks=opt.names(benchmarks))
    source = opt.take(ModelConfig, given, model=checkpoint)
    from fasc.cli.processes import first, launched
    from fasc.evaluation.evaluate import Record
    from fasc.reporting.kept_card import write_scores_into_card
    from fasc.reporting.score_table import print_scores
    from fasc.reporting.scores import require_other_scores_nowhere, write_scores
    from fasc.stages.evaluate import score_checkpoint, texts_seen

    opt.check_files(json, inputs=(checkpoint, dense, config.corpus), kind="scores")
    if json is not None:
        require_other_scores_nowhere(json, checkpoint)
    if launched(nproc, source.device):
        return
    record = Record(texts_seen(checkpoint))
    scores = score_checkpoint(source, config, dense, record)
    if json is not None and first():
        write_scores(json, scores, config, record)
    if first():
        write_scores_into_card(checkpoint, scores)
    print_scores(scores)
