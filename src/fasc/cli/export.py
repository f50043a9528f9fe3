"""``fasc export``."""

from pathlib import Path
from typing import Annotated

import typer

from fasc.cli import options as opt
from fasc.model.options import ModelConfig


def export(
    model: opt.Model,
    form: Annotated[str, typer.Option("--format", help="gguf: for llama.cpp, Ollama and LM Studio.")] = "gguf",
    out: Annotated[Path | None, typer.Option("--out", help="Where it goes. [default: MODEL.gguf]", show_default=False)] = None,
    dtype: opt.DTypeName = None,
    overwrite: opt.Overwrite = False,
) -> None:
    """Write a model for an engine that does not know fasc: dense, merged, or with fewer MLP channels (`--for llama.cpp`).

    Tokenizer and chat template travel with it.
    """
    from fasc.outputs import output
    from fasc.reporting.console import print_line
    from fasc.stages.export import FORMATS, export_model, usual_name

    usual_name(form, model)
    place = out or usual_name(form, model)
    source = opt.take(ModelConfig, locals(), device="cpu")
    with output(place, overwrite=overwrite, inputs=(model,), folder=FORMATS[form].folder) as target:
        line = export_model(source, form, target)
    typer.echo(line, err=True)
    print_line(place)
