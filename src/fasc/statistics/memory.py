"""How much memory measuring moments takes, before it is done."""

from collections.abc import Sequence

from transformers import PreTrainedModel

from fasc.model.groups import InputGroup
from fasc.statistics.extras import FORWARD_ONLY
from fasc.statistics.options import CalibrationConfig
from fasc.statistics.unit import Need, units_of


def memory_forecast(
    model: PreTrainedModel, groups: Sequence[InputGroup], needs: frozenset[Need], batch_tokens: int | None = None
) -> dict[str, int]:
    """Bytes that measuring the moments takes beside the program itself, by part.

    Args:
        model: dense, loaded.
        groups: its input groups.
        needs: the moments.
        batch_tokens: of one batch, if not so many as by default.

    Returns:
        ``model`` (the weights), ``moments`` (float32 sums), ``totals`` (float64, from ``FLUSH_TOKENS`` tokens on), ``batch``
        (what one batch leaves for its backward pass: about the inputs and outputs of every layer, and the
        logits, their logarithms and the gradients of both).
    """
    weights = sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())
    entries = sum(entries_of(group, needs) for group in groups)
    backward = not {need.moment for need in needs} <= {"input", *FORWARD_ONLY}
    per_group = [sum(layer.d_in + layer.d_out for layer in group.layers) for group in groups]
    per_token = (sum(per_group) if backward else max(per_group, default=0)) + 4 * model.get_input_embeddings().num_embeddings
    tokens = batch_tokens or CalibrationConfig().batch_tokens
    return {
        "model": weights,
        "moments": 4 * entries,
        "totals": 8 * entries,
        "batch": tokens * per_token * model.dtype.itemsize,
    }


def entries_of(group: InputGroup, needs: frozenset[Need]) -> int:
    """Numbers in the sums of one group."""
    entries = group.d_in**2
    for scope, layers in units_of(group, needs):
        side = min(group.d_in, sum(layer.d_out for layer in layers))
        entries += side**2 + (group.d_in * side if Need("cross", scope) in needs else 0)
    return entries
