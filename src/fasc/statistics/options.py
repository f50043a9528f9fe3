"""Which text the statistics are measured on, and how."""

from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, PositiveInt

from fasc.options import Options

Labels = Literal["corpus", "sampled"]


class CalibrationConfig(Options):
    """Which text the statistics are measured on, and how."""

    corpus: str = "self"
    """`self` (text sampled from the model), `wikitext2`, `c4`, `alpaca`; a file (.txt, .jsonl, .json, .csv, .tsv, .parquet; also
    .gz) or a folder of them; a data set of the hub (`owner/name`, `owner/name:config`, `owner/name:split`); or facts as
    sentences: `facts`, `negated-facts`, `lama`, `negated-lama`. Several, separated by commas, take turns; one that is named
    twice has two."""

    sequences: PositiveInt = 128
    """How many calibration sequences."""

    sequence_length: Annotated[int, Field(ge=2)] = 128
    """Tokens per sequence."""

    skip: Annotated[int, Field(ge=0)] = 0
    """Sequences of the draw that are passed over: moments of held-out text are those after the sequences that calibrate."""

    seed: Annotated[int, Field(ge=0, lt=2**63)] = 0
    """Seed of the choice of sequences, of the text sampled from the model and of sampled labels."""

    chat_template: bool | None = None
    """Whether chats are read through the tokenizer's chat template; by default where it has one. Without, turns are lines."""

    labels: Labels = "corpus"
    """Whose next token the gradients explain: `corpus` (empirical Fisher) or `sampled` from the model (true Fisher)."""

    data_dir: Path | None = None
    """Folder that holds the named corpora; the hub is asked otherwise. Also read from FASC_DATA."""

    expert_floor: Annotated[int, Field(ge=0)] = 0
    """Experts with fewer tokens than this have what they lack from the mean of their block's experts; 0 pools none."""

    route_all: bool = False
    """Let every expert of a mixture read every token, for the moments of its inputs; the model's outputs stay as they are."""

    batch_tokens: PositiveInt = 256
    """Tokens per forward and backward pass: memory against speed, no effect on the result."""

    gradient_checkpointing: bool = False
    """Recompute each block in the backward pass: less memory, about a third more time."""

    mixed_precision: bool = False
    """The model multiplies in bfloat16, where the processor has that; moments are still summed in float32."""
