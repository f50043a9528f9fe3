"""What compressing takes in memory beside the dense model and the moments."""

from collections.abc import Sequence

from fasc.edits import Edit
from fasc.edits.narrow import Narrow
from fasc.model.coupling import Coupling
from fasc.model.groups import InputGroup
from fasc.planning.plan import ModelSize

_CHOOSING = 10
"""Matrices of the size of an MLP's covariance that choosing its channels holds in float64, workspace of the library among them:
measured with 1,536 and 3,072 channels (docs/log.md)."""


def bytes_to_choose(channels: int) -> int:
    """What choosing among so many channels of an MLP takes."""
    return 8 * _CHOOSING * channels**2


def memory_to_compress(
    groups: Sequence[InputGroup], couplings: Sequence[Coupling], edits: Sequence[Edit], size: ModelSize
) -> dict[str, int]:
    """Bytes by part.

    ``decomposition``: the largest unit in float64, or the MLP with the most channels to choose from. ``channels``: moments of
    what MLPs keep, which replace no file's. ``compressed``: the new weights.
    """
    largest = max((group.d_in * group.d_out + 4 * group.d_in**2 for group in groups), default=0)
    widest = max((bytes_to_choose(one.parts) for one in couplings), default=0)
    return {
        "decomposition": max(8 * largest, widest),
        "channels": sum(4 * edit.width**2 for edit in edits if isinstance(edit, Narrow)),
        "compressed": sum(edit.new_bytes(size.bytes_per_parameter) for edit in edits),
    }
