"""A budget as a limit on the cost of the candidates."""

from fasc.errors import BudgetError
from fasc.model.untouched import in_words
from fasc.planning.options import BudgetConfig
from fasc.planning.plan import Plan


def multiply_adds_limit(dense: Plan, fraction: float) -> float:
    """Multiply-adds of the layers for one token, at most."""
    return fraction * sum(layer.d_in * layer.d_out for layer in dense.layers)


def limit_of(dense: Plan, budget: BudgetConfig, *, whole: float, also: int = 0) -> float:
    """Ranks, parameters, bytes or multiply-adds that the layers may have.

    Args:
        dense: a plan without edits.
        budget: no limit of the loss.
        whole: rank of all units, for a rank fraction.
        also: parameters outside of the layers that are chosen from as well.

    Raises:
        BudgetError: what is never compressed is more than the budget.
    """
    if budget.rank_fraction is not None:
        return budget.rank_fraction * whole
    if budget.param_fraction is not None:
        return budget.param_fraction * dense.dense_parameters
    if budget.kind == "flop_fraction":
        return multiply_adds_limit(dense, budget.flop_fraction or 1.0)
    size = dense.model
    outside = size.parameters - dense.dense_parameters - also
    if budget.model_fraction is not None:
        limit = budget.model_fraction * size.parameters - outside
        what = f"model_fraction {budget.model_fraction:g}"
    else:
        limit = float(budget.bytes_limit - size.header_bytes - outside * size.bytes_per_parameter)
        what = f"max_bytes {budget.max_bytes}"
    if limit <= 0:
        share = outside / size.parameters
        parts = in_words(dense.outside or {}, size.parameters)
        raise BudgetError(
            f"{what} leaves nothing for the chosen layers: what is not touched ({parts}) is {share:.1%} of the model, "
            f"{outside * size.bytes_per_parameter / 1e6:,.1f} MB",
            f"ask for more than {share:.3f} of the model",
        )
    return limit
