"""``fasc collect``."""

from typing import Annotated

import typer

from fasc.cli import options as opt
from fasc.model.options import LayersConfig, ModelConfig
from fasc.options import size
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
    device_map: opt.DeviceMapName = None,
    nproc: opt.Nproc = None,
    max_memory: Annotated[
        str | None,
        typer.Option(
            "--max-memory",
            help="Memory for everything, such as `24GB`: as many passes over the text as that takes, each over a range of "
            "blocks. --out is then a folder. A killed call goes on with the next range.",
            show_default=False,
        ),
    ] = None,
    block_replay: Annotated[
        bool,
        typer.Option(
            "--block-replay",
            help="One block at a time, each run again on what it read: a device then holds one block, its sums, and the head, "
            "whatever the depth. --out is then a folder. A killed call measures only what is missing.",
        ),
    ] = False,
    overwrite: opt.Overwrite = False,
) -> None:
    """Measure the moments that the methods need and write them to --out (.safetensors)."""
    given = locals()
    calibration = opt.take(CalibrationConfig, given)
    layers = opt.take(LayersConfig, given)
    source = opt.take(ModelConfig, given)
    opt.unused(given, ("max_memory", "gradient_checkpointing"), "beside --block-replay", when=block_replay)
    limit = None if max_memory is None else size("--max-memory", max_memory)
    from fasc.cli.processes import first, launched, output_of_the_first
    from fasc.reporting.console import print_line
    from fasc.stages.calibrate import calibrate_by_block, calibrate_in_passes
    from fasc.stages.compress import load, needs_of
    from fasc.stages.diagnose import collect_for, needs_to_collect
    from fasc.statistics.shards import require_own_shards

    chosen = tuple(MethodConfig(name=name) for name in opt.names(methods) or DEFAULT_METHODS)
    needs_of(chosen)
    if launched(nproc, source.device, calibration.sequences):
        return
    inputs, folder = (model, calibration.corpus), block_replay or limit is not None
    owned = require_own_shards if folder else None
    with output_of_the_first(out, overwrite=overwrite, inputs=inputs, folder=folder, owned=owned) as target:
        needs = needs_to_collect(chosen, diagnosis=diagnosis)
        if block_replay:
            calibrate_by_block(load(source), needs, calibration, layers, out=target, overwrite=overwrite)
        elif limit is not None:
            calibrate_in_passes(load(source), needs, calibration, layers, limit=limit, out=target, overwrite=overwrite)
        else:
            statistics = collect_for(load(source), chosen, calibration, layers, diagnosis=diagnosis)
            if first():
                statistics.save(target)
    print_line(out)
