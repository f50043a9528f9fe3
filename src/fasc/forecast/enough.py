"""Whether the calibration has tokens enough for a forecast to mean anything."""

from collections.abc import Sequence
from math import ceil

from fasc.model.groups import InputGroup
from fasc.statistics.moments import Statistics

ENOUGH = 4
"""Tokens for each input of a layer. With fewer than one the inputs leave directions out, and what lies there looks free to
remove; with n tokens and d inputs the error of a fit looks smaller on its own tokens by (1 − d/n) and is larger on others by
(1 + d/n): at 4 a factor of 1.7 lies between the two."""


def too_few_tokens(groups: Sequence[InputGroup], statistics: Statistics) -> str | None:
    """What to say of statistics that heard too few tokens for the widest group; ``None`` if they are enough.

    Args:
        groups: that are compressed.
        statistics: measured on the text that also chooses the subspaces.
    """
    heard = [(group, statistics.groups[group.name].tokens) for group in groups if group.name in statistics.groups]
    short = [(tokens / group.d_in, tokens, group) for group, tokens in heard if tokens < ENOUGH * group.d_in]
    if not short:
        return None
    ratio, tokens, group = min(short, key=lambda one: one[0])
    sequences = ceil(statistics.groups[group.name].sequences * ENOUGH / ratio)
    return (
        f"`{group.name}` reads {group.d_in:,} inputs, and the calibration has {tokens:,} tokens for it: with fewer than "
        f"{ENOUGH * group.d_in:,} the forecast is far too low. Calibrate with --sequences {sequences:,} or more, or forecast "
        "with --held-out"
    )
