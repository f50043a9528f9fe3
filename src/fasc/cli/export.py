"""``fasc export``."""

from pathlib import Path
from typing import Annotated

import typer

from fasc.cli import options as opt
from fasc.errors import UsageError
from fasc.model.options import ModelConfig
from fasc.planning.options import BudgetConfig
from fasc.statistics.options import CalibrationConfig


def export(
    model: opt.Model,
    form: Annotated[
        str, typer.Option("--format", help="gguf (llama.cpp, Ollama, LM Studio) or block-configs (DeciLM).")
    ] = "gguf",
    out: Annotated[Path | None, typer.Option("--out", help="Where it goes. [default: after MODEL]", show_default=False)] = None,
    kind: Annotated[
        str | None,
        typer.Option("--type", help="One of llama.cpp's types for all matrices: Q8_0, Q6_K, Q4_K, ….", show_default=False),
    ] = None,
    max_bytes: opt.MaxBytes = None,
    max_kl: opt.MaxKl = None,
    corpus: opt.Corpus = None,
    sequences: opt.Sequences = None,
    sequence_length: opt.SequenceLength = None,
    seed: opt.Seed = None,
    labels: opt.LabelsName = None,
    chat_template: opt.ChatTemplate = None,
    data_dir: opt.DataDir = None,
    statistics: opt.StatisticsFile = None,
    dtype: opt.DTypeName = None,
    overwrite: opt.Overwrite = False,
) -> None:
    """Write a model for an engine that does not know fasc: dense, merged, or with fewer MLP channels (`--for llama.cpp`).

    Tokenizer and chat template travel with it. With --max-bytes or --max-kl every matrix gets the type of llama.cpp that loses
    least by ½J; this needs --corpus or --statistics, and the extra `fasc[gguf]`.
    """
    given = locals()
    budget = None if max_bytes is None and max_kl is None else opt.take(BudgetConfig, given)
    if budget is None and kind is None and (corpus is not None or statistics is not None):
        raise UsageError("a corpus chooses types, and there is no budget", "give --max-bytes, --max-kl or --type")
    text = tuple(CalibrationConfig.model_fields)
    opt.unused(given, text, "beside --statistics", when=statistics is not None)
    opt.unused(given, text, "without --corpus", when=corpus is None)
    calibration = None if corpus is None else opt.take(CalibrationConfig, given)
    from fasc.outputs import output
    from fasc.reporting.console import print_line
    from fasc.stages.export import FORMATS, FewerBits, export_model, usual_name

    usual_name(form, model)
    bits = None if budget is None and kind is None else FewerBits(kind, budget, statistics, calibration)
    place = out or usual_name(form, model)
    source = opt.take(ModelConfig, locals(), device="cpu")
    with output(place, overwrite=overwrite, inputs=(model, statistics, corpus), folder=FORMATS[form].folder) as target:
        line = export_model(source, form, target, bits)
    typer.echo(line, err=True)
    print_line(place)
