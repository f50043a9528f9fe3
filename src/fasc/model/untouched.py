"""What no plan touches, by what it is: so that nobody takes the experts of a mixture for its embeddings."""

from collections.abc import Iterable, Mapping

from torch import nn
from transformers import PreTrainedModel

from fasc.model.experts import ExpertLinear, is_fused
from fasc.model.layers import oriented_weight


def parameters_outside(model: PreTrainedModel, chosen: Iterable[str]) -> dict[str, int]:
    """Parameters that belong to none of the chosen layers, each counted once.

    Args:
        model: dense.
        chosen: names of the layers that a plan may touch.

    Returns:
        Counts by kind, the largest first: ``embeddings``, ``head``, ``experts``, ``other linear layers``, ``norms and the rest``.
    """
    names = set(chosen)
    seen = {id(parameter) for name in names for parameter in model.get_submodule(name).parameters(recurse=False)}
    counts: dict[str, int] = {}
    for name, module in model.named_modules():
        if name in names:
            continue
        kind = _kind(model, module)
        for parameter in module.parameters(recurse=False):
            if id(parameter) not in seen:
                seen.add(id(parameter))
                counts[kind] = counts.get(kind, 0) + parameter.numel()
    views = sum(_size(model.get_submodule(name)) for name in names if isinstance(model.get_submodule(name), ExpertLinear))
    if views:  # layers of experts are parts of their fused weights
        counts["experts"] -= views
    counts = {kind: count for kind, count in counts.items() if count}
    return dict(sorted(counts.items(), key=lambda item: -item[1]))


def _size(layer: nn.Module) -> int:
    weight, bias = layer.weight, layer.bias
    return int(weight.numel()) + (0 if bias is None else int(bias.numel()))  # type: ignore[operator]


def _kind(model: PreTrainedModel, module: nn.Module) -> str:
    if isinstance(module, nn.Embedding):
        return "embeddings"
    if module is model.get_output_embeddings():
        return "head"
    if is_fused(module) or "Expert" in type(module).__name__:  # also those that run by code of their own
        return "experts"
    return "other linear layers" if oriented_weight(module) is not None else "norms and the rest"


def in_words(counts: Mapping[str, int], whole: int) -> str:
    """``embeddings 21.0 %, head 2.3 %``: shares of the whole model."""
    parts = [f"{kind} {count / whole:.1%}" for kind, count in counts.items() if count / whole >= 5e-4]
    return ", ".join(parts) or "nothing"
