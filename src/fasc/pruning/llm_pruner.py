"""LLM-Pruner: whole heads and channels by a first-order Taylor estimate of what they carry."""

from collections.abc import Sequence
from copy import deepcopy
from dataclasses import replace

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from fasc.planning.candidates import unit_of
from fasc.planning.plan import RankPlan, UnitPlan
from fasc.statistics.moments import Statistics
from fasc.errors import BudgetError, ModelError
from fasc.model.groups import InputGroup
from fasc.progress import progress
from fasc.pruning._coupling import Coupling, Part, couplings, head_sizes, narrow
from fasc.pruning._registry import Pruning, register


def make_plan(model: PreTrainedModel, groups: Sequence[InputGroup], limit: float, multiple: int) -> tuple[UnitPlan, ...]:
    """The same number of heads and of channels in every block, as near to the same share of both as the budget allows.

    The number has to be the same everywhere, because a config has one number for all blocks.

    Raises:
        BudgetError: one head and ``multiple`` channels are too many.
        ModelError: see :func:`~fasc.pruning._coupling.couplings`.
    """
    found = couplings(model, groups)
    attention = [one for one in found if one.part == "heads"]
    mlps = [one for one in found if one.part == "channels"]
    heads, channels = attention[0].parts, mlps[0].parts
    best: tuple[float, dict[Part, int]] | None = None
    step = multiple if channels >= 16 * multiple else 1
    fixed = sum(one.parameters(0) for one in mlps)
    each = sum(one.parameters(1) for one in mlps) - fixed
    for h in range(1, heads + 1):
        left = limit - sum(one.parameters(h) for one in attention)
        c = min(channels, int((left - fixed) / each + 1e-9))
        c = c if c == channels else c // step * step
        if c >= 1:
            uneven = abs(h / heads - c / channels)
            if best is None or uneven < best[0]:
                best = (uneven, {"heads": h, "channels": c})
    if best is None:
        least = sum(one.parameters(1) for one in attention) + sum(one.parameters(step) for one in mlps)
        raise BudgetError(
            f"the budget of {limit:,.0f} parameters holds no head and {step} channels per block",
            f"the least is {least:,} parameters of the compressed layers",
        )
    return _units(groups, found, best[1])


def _units(groups: Sequence[InputGroup], found: Sequence[Coupling], kept: dict[Part, int]) -> tuple[UnitPlan, ...]:
    shapes: dict[str, tuple[int, int]] = {}
    for one in found:
        share = kept[one.part] / one.parts
        shapes |= {layer.name: (layer.d_in, round(share * layer.d_out)) for layer in one.producers}
        shapes[one.consumer.name] = (round(share * one.consumer.d_in), one.consumer.d_out)
    units = []
    for group in groups:
        for layer in group.layers:
            d_in, d_out = shapes[layer.name]
            unit = unit_of(group, (layer,))
            left = replace(layer, d_in=d_in, d_out=d_out).parameters
            units.append(replace(unit, kept=left, narrowed=(d_in, d_out), layout="narrow", rank=min(d_in, d_out)))
    return tuple(units)


def importance(coupling: Coupling, statistics: Statistics) -> Tensor:
    """``Σ_j E_s |Σ_t x_tj ∂L/∂x_tj|`` over a part's columns ``j`` of the consumer: the vector-wise first-order Taylor estimate.

    For a column of the consumer's weight ``Σ_o W_oj ∂L/∂W_oj = Σ_t x_tj (Wᵀh)_tj``, and the same number is that of the producer's
    row it is made from, so one moment of the consumer's inputs says what removing the part does to the loss.

    Returns:
        [parts], nats per sequence.
    """
    taylor = statistics.groups[coupling.consumer_group].extras["taylor"]
    return taylor.view(coupling.parts, -1).sum(1)


def apply(model: PreTrainedModel, statistics: Statistics, plan: RankPlan) -> None:
    """Keep the most important heads and channels of every block; the model becomes an ordinary smaller one of its architecture.

    Raises:
        ModelError: the smaller config does not describe the smaller weights.
    """
    found = couplings(model, [group.group for group in statistics.groups.values()])
    narrowed = {unit.unit: unit.narrowed for unit in plan.units}
    config = model.config.get_text_config()
    heads, keys, width = head_sizes(config)
    with progress("pruning with llm-pruner", len(found), "parts of blocks") as advance:
        for one in found:
            shape = narrowed[one.consumer.name]
            assert shape is not None  # noqa: S101 - made by make_plan
            count = shape[0] * one.parts // one.consumer.d_in
            kept = importance(one, statistics).argsort(descending=True, stable=True)[:count].sort().values
            narrow(model, one, kept.to(model.device))
            if one.part == "heads":
                served = heads // keys
                config.num_attention_heads, config.num_key_value_heads, config.head_dim = count * served, count, width
            else:
                config.intermediate_size = count
            advance()
    _require_loadable(model)


def _require_loadable(model: PreTrainedModel) -> None:
    """A model built from the new config has these very shapes."""
    with torch.device("meta"):
        fresh = AutoModelForCausalLM.from_config(deepcopy(model.config))
    expected = {name: tuple(tensor.shape) for name, tensor in fresh.state_dict().items()}
    for name, tensor in model.state_dict().items():
        if expected.get(name) != tuple(tensor.shape):
            raise ModelError(
                f"`{name}` is {tuple(tensor.shape)} after pruning and {expected.get(name)} by the smaller config",
                f"llm-pruner does not know how {type(model).__name__} is built",
            )


register(
    Pruning(
        name="llm-pruner",
        moments=frozenset({"taylor"}),
        structured=True,
        surrogate="|Σ_t x_tj ∂L/∂x_tj|",
        reference="arXiv:2305.11627 (LLM-Pruner), Eq. 3, vector-wise, without recovery training",
        summary="Structured pruning: whole heads and MLP channels of the least first-order Taylor importance go (LLM-Pruner).",
        make_plan=make_plan,
        apply=apply,
    )
)
