"""The structure of a compressed checkpoint as ``config.json`` holds it: a list of edits, as plain JSON values.

Imports nothing of transformers but the base class, because it is imported while transformers is (see ``_fasc_transformers.py``).
"""

from collections.abc import Mapping, Sequence
from typing import Any

from transformers.utils.quantization_config import QuantizationConfigMixin

from fasc.errors import ModelError

FORMAT = 6
"""Version of the structure. 6: every replaced layer holds a mark (decision 0015); older ones are refused."""


class FascConfig(QuantizationConfigMixin):
    """``quantization_config`` of a compressed model: which edits were made, in order.

    Args:
        edits: as plain JSON values.
        format: version of this structure.
    """

    def __init__(self, edits: Sequence[Mapping[str, Any]] = (), format: Any = None, **_others: Any) -> None:
        self.quant_method = "fasc"
        if format != FORMAT:
            newer = isinstance(format, int) and format > FORMAT
            raise ModelError(
                f"the checkpoint has format {format}, and this fasc reads {FORMAT}",
                "upgrade fasc" if newer else "compress the dense model again with this version",
            )
        if not isinstance(edits, (list, tuple)):
            raise ModelError("config.json: `edits` is no list", "the checkpoint is damaged; copy it again")
        self.format = format
        self.edits = [dict(edit) if isinstance(edit, Mapping) else edit for edit in edits]
