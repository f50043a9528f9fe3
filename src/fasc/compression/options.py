"""How a checkpoint is recovered."""

from pathlib import Path
from typing import Annotated

from pydantic import Field, PositiveInt

from fasc.options import Options


class RecoveryConfig(Options):
    """How the replaced layers of a checkpoint are trained towards the dense model."""

    corpus: str | None = None
    """The text, as for calibration; several corpora, separated by commas, take turns. Left out: that of the calibration."""

    sequences: Annotated[int, Field(ge=2)] = 512
    """How many sequences; each is used once, and one in sixteen is held out to say how far to go."""

    sequence_length: Annotated[int, Field(ge=2)] = 128
    """Tokens per sequence."""

    batch_tokens: PositiveInt = 1024
    """Tokens per step."""

    learning_rate: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 3e-5
    """Of AdamW at its highest. At too high a rate nothing is gained: docs/results.md."""

    mixed_precision: bool = False
    """Multiply in bfloat16, where the processor has that; weights, steps and the divergence stay in float32."""

    seed: Annotated[int, Field(ge=0, lt=2**63)] = 0
    """Seed of the choice of sequences and of their order."""

    data_dir: Path | None = None
    """Folder that holds the named corpora; the hub is asked otherwise. Also read from FASC_DATA."""
