"""``fasc collect``."""

from typing import Annotated

import typer

from fasc.cli import options as opt
from fasc.model.options import LayersConfig, ModelConfig
from fasc.planning.options import MethodConfig
from fasc.statistics.options import CalibrationConfig

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
    chat_template: opt.ChatTemplate = None,
    data_dir: opt.DataDir = None,
    batch_tokens: opt.BatchTokens = None,
    gradient_checkpointing: opt.Checkpointing = None,
    mixed_precision: opt.MixedCalibration = None,
    expert_floor: opt.ExpertFloor = None,
    route_all: opt.RouteAll = None,
    diagnosis: Annotated[
        bool, typer.Option("--diagnosis", help="Also measure what ρ, its interval, ½J and selections need.")
    ] = False,
    include: opt.Include = None,
    exclude: opt.Exclude = None,
    dtype: opt.DTypeName = None,
    device: opt.Device = None,
    nproc: opt.Nproc = None,
    overwrite: opt.Overwrite = False,
) -> None:
    """Measure the moments that the methods need and write them to --out (.safetensors)."""
    given = locals()
    calibration = opt.take(CalibrationConfig, given)
    layers = opt.take(LayersConfig, given)
    source = opt.take(ModelConfig, given)
    from contextlib import nullcontext

    from fasc.cli.processes import first, launched
    from fasc.outputs import output
    from fasc.reporting.console import print_line
    from fasc.stages.compress import load, needs_of
    from fasc.stages.diagnose import collect_for

    chosen = tuple(MethodConfig(name=name) for name in opt.names(methods) or DEFAULT_METHODS)
    needs_of(chosen)
    if launched(nproc, source.device, calibration.sequences):
        return
    with output(out, overwrite=overwrite, inputs=(model, calibration.corpus)) if first() else nullcontext(out) as target:
        statistics = collect_for(load(source), chosen, calibration, layers, diagnosis=diagnosis)
        if first():
            statistics.save(target)
    print_line(out)
