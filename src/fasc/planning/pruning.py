"""Plans of pruning methods: the same share of every layer, or the same number of heads and channels in every block."""

from collections.abc import Sequence

from torch import nn
from transformers import PreTrainedModel

from fasc.edits import Edit
from fasc.edits.mask import Mask
from fasc.edits.remove import Remove
from fasc.errors import BudgetError, ModelError, UsageError
from fasc.model.coupling import Coupling, Part, find_channels, find_heads
from fasc.model.experts import ExpertLinear
from fasc.model.groups import InputGroup
from fasc.planning.candidates import step_of
from fasc.planning.options import BudgetConfig, MethodConfig
from fasc.pruning import Pruning, Structured, Unstructured


def check_pruning(pruning: Pruning, options: MethodConfig, budget: BudgetConfig) -> None:
    """Refuse what pruning has no answer to.

    Raises:
        UsageError, BudgetError: says what it can do.
    """
    if options.propagate or options.selection != "none" or options.allocation == "fisher":
        raise UsageError(
            f"`{options.name}` prunes and finds no subspaces: it takes no --propagate, no --selection and no --allocation fisher",
            "leave them out, or use a subspace method such as fasc",
        )
    structured = isinstance(pruning, Structured)
    possible = ("param_fraction", "model_fraction", *(("max_bytes",) if structured else ()))
    if budget.kind not in possible:
        why = "it has no rank and no forecast" if structured else "it has no rank and no forecast, and its zeros are stored"
        raise BudgetError(
            f"`{options.name}` cannot keep {budget.kind}: {why}",
            f"ask for {' or '.join('--' + name.replace('_', '-') for name in possible)}",
        )


def prune(
    model: PreTrainedModel, groups: Sequence[InputGroup], pruning: Pruning, limit: float, multiple: int
) -> tuple[Edit, ...]:
    """The edits of a pruning method.

    Args:
        model: dense.
        groups: its input groups.
        pruning: the method.
        limit: parameters that may stay.
        multiple: numbers of channels are multiples of it, where there are enough.

    Raises:
        BudgetError: the limit leaves nothing.
        ModelError: structured pruning does not know how the model is built.
    """
    if isinstance(pruning, Unstructured):
        return _zeros(groups, pruning, limit)
    return _removals(model, groups, pruning, limit, multiple)


def _zeros(groups: Sequence[InputGroup], pruning: Unstructured, limit: float) -> tuple[Edit, ...]:
    """The same share of the weights of every layer; biases stay and count."""
    layers = [(group.name, layer) for group in groups for layer in group.layers]
    weights = sum(layer.d_in * layer.d_out for _, layer in layers)
    share = min(1.0, (limit - sum(layer.d_out for _, layer in layers if layer.bias)) / weights)
    if share <= 0:
        raise BudgetError("the budget leaves no weight", "ask for more")

    def count(d_in: int, d_out: int) -> int:
        return d_out * int(share * d_in + 1e-9) if pruning.by_row else int(share * d_in * d_out + 1e-9)

    return tuple(
        Mask(
            group=group,
            layer=layer.name,
            d_in=layer.d_in,
            d_out=layer.d_out,
            bias=layer.bias,
            weights=count(layer.d_in, layer.d_out),
            method=pruning.name,
        )
        for group, layer in layers
    )


def _removals(
    model: PreTrainedModel, groups: Sequence[InputGroup], pruning: Pruning, limit: float, multiple: int
) -> tuple[Edit, ...]:
    """The same number of heads and of channels in every block, as near to the same share of both as the budget allows.

    The number has to be the same everywhere, because a config has one number for all blocks.
    """
    attentions, mlps = _all_parts(model, groups, pruning.name)
    heads, channels = attentions[0].parts, mlps[0].parts
    best: tuple[float, dict[Part, int]] | None = None
    step = step_of(multiple, channels)
    fixed = sum(one.parameters(0) for one in mlps)
    each = sum(one.parameters(1) for one in mlps) - fixed
    for h in range(1, heads + 1):
        left = limit - sum(one.parameters(h) for one in attentions)
        c = min(channels, int((left - fixed) / each + 1e-9))
        c = c if c == channels else c // step * step
        if c >= 1:
            uneven = abs(h / heads - c / channels)
            if best is None or uneven < best[0]:
                best = (uneven, {"heads": h, "channels": c})
    if best is None:
        least = sum(one.parameters(1) for one in attentions) + sum(one.parameters(step) for one in mlps)
        raise BudgetError(
            f"the budget of {limit:,.0f} parameters holds no head and {step} channels per block",
            f"the least is {least:,} parameters of the compressed layers",
        )
    order = {group.name: position for position, group in enumerate(groups)}
    both = sorted([*attentions, *mlps], key=lambda one: order[one.group.name])
    return tuple(Remove.of(one, best[1][one.part], pruning.name) for one in both)


def _all_parts(model: PreTrainedModel, groups: Sequence[InputGroup], name: str) -> tuple[list[Coupling], list[Coupling]]:
    """Attention and MLP of every block.

    Raises:
        ModelError: a block is built in another way, or not all of its layers were chosen.
    """
    attentions, mlps = find_heads(model, groups), find_channels(model, groups)
    used = {one for coupling in (*attentions, *mlps) for one in (coupling.group.name, coupling.consumer.name)}
    strange = [group.name for group in groups if group.name not in used]
    blocks = {group.block for group in groups}
    complete = blocks == set(range(model.config.get_text_config().num_hidden_layers))
    whole = all(set(one.producers) == set(one.group.layers) for one in mlps)
    if strange or not complete or not whole or not attentions or not mlps:
        what = f"`{strange[0]}` belongs to no attention or MLP it knows" if strange else "not all blocks are so, or were chosen"
        raise ModelError(
            f"{name} removes the same heads and channels from every layer of a block, and in {type(model).__name__} {what}",
            "it needs blocks of separate q, k, v projections and one MLP, and no --include or --exclude",
        )
    kinds = {type(model.get_submodule(layer.name)) for group in groups for layer in group.layers}
    if not kinds <= {nn.Linear, ExpertLinear}:
        raise ModelError(f"{name} cuts nn.Linear layers, and {type(model).__name__} has others", "use another method")
    return attentions, mlps
