"""``fasc bench``."""

from typing import Annotated

import typer

from fasc.cli import options as opt
from fasc.evaluation.options import SpeedConfig
from fasc.model.options import ModelConfig


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
    report: opt.Report = None,
    dtype: opt.DTypeName = None,
    device: opt.Device = None,
    device_map: opt.DeviceMapName = None,
) -> None:
    """Time a compressed model and the dense one on this machine, in turn, and say what was gained and why not more."""
    given = locals()
    config = opt.take(SpeedConfig, given, batches=opt.names(batches))
    source = opt.take(ModelConfig, given, model=checkpoint)
    from fasc.outputs import write_artifact
    from fasc.provenance import provenance
    from fasc.reporting.speed_table import print_speed
    from fasc.stages.evaluate import bench as compare

    opt.check_files(json, inputs=(checkpoint, dense), kind="speed")
    opt.check_report(report, inputs=(checkpoint, dense), beside=(json,))
    found = compare(source, config, dense)
    made = provenance(speed=config.model_dump(mode="json"))
    if json is not None:
        write_artifact(json, "speed", found.to_dict() | {"provenance": made})
    print_speed(found)
    if report is not None:
        from fasc.reporting.page.sources import speed_source

        opt.write_report(report, speed_source(checkpoint, found.to_dict() | {"provenance": made}))
