"""Why something is not faster, in plain words, and which options might make it so."""

from collections.abc import Sequence

from fasc.evaluation.comparison import Comparison
from fasc.planning.options import BudgetConfig

_FASTER = 1.02
"""A ratio below it is not called faster."""

_OVERHEAD, _CHANNEL_MULTIPLE = 65536, 256
"""What made small models faster where they were not (docs/results.md, Speed)."""


def remarks(
    comparisons: Sequence[Comparison], ideal: float, more_products: int, devices: set[str], budget: BudgetConfig | None = None
) -> list[str]:
    """A sentence on each speed that the compressed model does not have.

    Args:
        comparisons: of speeds, compressed ÷ dense.
        ideal: parameters of the dense blocks ÷ those of the compressed ones.
        more_products: how many more matrix products a pass of the compressed model makes.
        devices: types of the devices they lie on.
        budget: the checkpoint's, if known: what it already asked for is not advised.
    """
    slower = [one for one in comparisons if one.ratio < _FASTER]
    one_token, many = _of_one_token(ideal, more_products, devices, budget), _of_many_tokens(ideal, more_products, budget)
    return [
        f"{one.what} is not faster ({one.ratio:.2f} ×): {one_token if one.what == 'decode, batch 1' else many}" for one in slower
    ]


def _of_one_token(ideal: float, more_products: int, devices: set[str], budget: BudgetConfig | None) -> str:
    text = f"a step reads every weight once, {ideal:.2f} × fewer in the blocks"
    if more_products <= 0:
        return f"{text}, but most of its time goes elsewhere, such as into attention, norms and the output head"
    calls = "kernel launches" if "cuda" in devices else "calls of small operations"
    text += f", but makes {more_products} more matrix products, each with its {calls}; with larger layers the reading wins"
    if budget is None or budget.overhead < _OVERHEAD:
        text += f", and `fasc compress --overhead {_OVERHEAD}` factors fewer"
    return text


def _of_many_tokens(ideal: float, more_products: int, budget: BudgetConfig | None) -> str:
    text = f"it is bound by arithmetic, of which the blocks have {ideal:.2f} × less, "
    if more_products <= 0:
        text += "and narrower products run at a lower rate; larger batches or layers gain more"
    else:
        text += "and two thin products run at a lower rate than one square product; larger batches or layers gain more"
    if budget is None or (budget.channel_multiple or 1) % _CHANNEL_MULTIPLE:
        text += f", and so may `fasc compress --channel-multiple {_CHANNEL_MULTIPLE}`"
    return text
