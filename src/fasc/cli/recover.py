"""``fasc recover``."""

from pathlib import Path
from typing import Annotated

import typer

from fasc.cli import options as opt
from fasc.compression.options import RecoveryConfig
from fasc.model.options import ModelConfig

_FEW = 20
"""Steps, below which training has hardly begun."""


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
    nproc: opt.Nproc = None,
    overwrite: opt.Overwrite = False,
) -> None:
    """Train the replaced layers of a compressed model towards the dense one, on unlabelled text, and write a new checkpoint.

    The size stays the same. Minimises the KL divergence to the dense model; a few tens of thousands of tokens bring back much of
    what compressing lost. The same command goes on where a killed one was, at most five minutes before.
    """
    given = locals()
    config = opt.take(RecoveryConfig, given)
    source = opt.take(ModelConfig, given, model=str(checkpoint))
    from fasc.cli.processes import launched, output_of_the_first
    from fasc.progress import say
    from fasc.reporting.console import print_line
    from fasc.serving.checkpoint import require_own_checkpoint
    from fasc.stages.recover import recover_checkpoint

    if launched(nproc, source.device):
        return
    sources = (checkpoint, dense, config.corpus)
    with output_of_the_first(out, overwrite=overwrite, inputs=sources, folder=True, owned=require_own_checkpoint) as target:
        result = recover_checkpoint(source, target, config, dense=dense, overwrite=overwrite)
    print_line(
        f"KL to the dense model on {result.held_out:,} tokens that were not trained on: "
        f"{result.before:.4f} → {result.after:.4f} nats/token "
        f"({len(result.losses)} steps; the weights went {result.share:.0%} of the way)"
    )
    if len(result.losses) < _FEW:
        say(f"{len(result.losses)} steps are few: more --sequences bring back more")
    print_line(out)
    say(f"next: `fasc evaluate {out}` measures what it kept now")
