"""Mixtures of experts: each expert's projections as layers of their own, for a while or for good.

transformers keeps the weights of all experts of a block in one tensor of three axes, which no hook on a layer sees. To measure
and to plan, every expert gets modules that read views of that tensor, and the block calls them one by one; nothing is copied.
To compress, the layers get weights of their own and the fused tensors go.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from functools import partial
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fasc.errors import ModelError
from fasc.model.groups import InputGroup
from fasc.model.sublayers import Skipped, Sublayer


class Form(NamedTuple):
    """How a family writes its experts down, and how it runs them."""

    gated: bool
    """Whether the first projection makes a gate as well, before the others."""

    bias: bool
    transposed: bool
    """Whether weights are [d_in, d_out]."""

    normed: bool
    """Whether a norm follows every expert."""

    scaled: bool
    """Whether the router's weight scales what an expert reads, and not what it says; each then is given all tokens, and those
    that are not its own are 0."""


def form_of(module: nn.Module) -> Form | None:
    """Of a module that holds experts in a way that is known, fused or not."""
    if hasattr(module, "_apply_gate"):
        has = [bool(getattr(module, name)) for name in ("has_gate", "has_bias", "is_transposed", "has_post_expert_norm")]
        return Form(*has, scaled=False)
    if type(module).__name__ == "Llama4TextExperts":
        return Form(gated=True, bias=False, transposed=True, normed=False, scaled=True)
    return None


def _form(experts: nn.Module) -> Form:
    form = form_of(experts)
    assert form is not None  # noqa: S101 - only such modules get here
    return form


class ExpertLinear(nn.Linear):
    """One projection of one expert: a view of the fused weights, without parameters of its own."""

    def __init__(self, experts: nn.Module, projection: str, index: int) -> None:
        nn.Module.__init__(self)
        # A tuple hides the experts from nn.Module: they hold this module already.
        self._experts = (experts,)
        self._projection, self._index = projection, index
        self.out_features, self.in_features = self.weight.shape

    @property
    def weight(self) -> Tensor:  # type: ignore[override]
        """[d_out, d_in], a view."""
        experts = self._experts[0]
        fused: Tensor = getattr(experts, self._projection)[self._index]
        return fused.mT if _form(experts).transposed else fused

    @property
    def bias(self) -> Tensor | None:  # type: ignore[override]
        """[d_out], a view, where the experts have biases."""
        experts = self._experts[0]
        return getattr(experts, f"{self._projection}_bias")[self._index] if _form(experts).bias else None


class Expert(nn.Module):
    """The projections of one expert."""

    positions: Tensor | None = None
    """Which of the tokens of the batch it reads, int64 [its tokens], of the last call."""

    def __init__(self, first: str, projections: Mapping[str, nn.Module]) -> None:
        super().__init__()
        self.first = first
        for name, projection in projections.items():
            self.add_module(name, projection)

    @staticmethod
    def viewing(experts: nn.Module, index: int) -> "Expert":
        """Of fused weights."""
        names = (first_of(experts), "down_proj")
        return Expert(names[0], {name: ExpertLinear(experts, name, index) for name in names})

    @staticmethod
    def owning(experts: nn.Module, index: int, *, empty: bool) -> "Expert":
        """With weights of its own: copies of the fused ones, or none yet."""
        projections = {}
        for name in (first_of(experts), "down_proj"):
            view = ExpertLinear(experts, name, index)
            own = nn.Linear(view.in_features, view.out_features, bias=view.bias is not None, dtype=view.weight.dtype)
            if not empty:
                own = own.to(view.weight.device)
                with torch.no_grad():
                    own.weight.copy_(view.weight)
                    if view.bias is not None:
                        own.bias.copy_(view.bias)
            projections[name] = own.requires_grad_(view.weight.requires_grad)
        return Expert(first_of(experts), projections)


def first_of(experts: nn.Module) -> str:
    """Name of the first projection of experts."""
    return "gate_up_proj" if _form(experts).gated else "up_proj"


def is_fused(module: nn.Module) -> bool:
    """Whether a module holds the fused weights of several experts, as transformers writes them."""
    weight = getattr(module, "down_proj", None)
    return isinstance(weight, nn.Parameter) and weight.dim() == 3 and form_of(module) is not None


def unknown_experts(model: nn.Module) -> dict[str, int]:
    """Parameters of fused experts whose family writes them down in a way that is not known, by the name of their class."""
    counts: dict[str, int] = {}
    for module in model.modules():
        own = [parameter for parameter in module.parameters(recurse=False) if parameter.dim() > 1]
        linear = isinstance(module, nn.Linear)
        if own and "Expert" in type(module).__name__ and not linear and not is_fused(module):
            name = type(module).__name__
            counts[name] = counts.get(name, 0) + sum(parameter.numel() for parameter in own)
    return counts


@contextmanager
def expert_layers(model: nn.Module) -> Iterator[list[str]]:
    """Let every expert's projections be layers of the model, named ``….experts.3.gate_up_proj`` and the like.

    Without fused experts nothing changes. The model is as it was afterwards.

    Yields:
        Names of the modules that hold experts.
    """
    fused = [(name, module) for name, module in model.named_modules() if is_fused(module)]
    opened = [experts for _, experts in fused if "forward" not in experts.__dict__]  # not those of a ``with`` around this one
    for experts in opened:
        _call_one_by_one(experts, [Expert.viewing(experts, index) for index in range(experts.down_proj.shape[0])])
    try:
        yield [name for name, _ in fused]
    finally:
        for experts in opened:
            del experts.forward
            for index in range(experts.down_proj.shape[0]):
                delattr(experts, str(index))


def _call_one_by_one(experts: nn.Module, parts: Sequence[Expert]) -> None:
    for index, part in enumerate(parts):
        experts.add_module(str(index), part)
    experts.forward = partial(_forward_scaled if _form(experts).scaled else _forward, experts)


def without_experts(conversions: Sequence[Any]) -> list[Any]:
    """How transformers turns the tensors of files into those of a model, without what fuses experts or takes them apart."""
    from transformers.core_model_loading import WeightConverter  # noqa: PLC0415 - not while transformers is imported

    def of_experts(one: Any) -> bool:
        return isinstance(one, WeightConverter) and any("experts" in name for name in one.target_patterns)

    return [one for one in conversions if not of_experts(one)]


def save_as_they_are(model: nn.Module) -> None:
    """Let ``save_pretrained`` write experts that were unfused under the names that they have."""
    from transformers.conversion_mapping import get_model_conversion_mapping  # noqa: PLC0415 - see above
    from transformers.core_model_loading import PrefixChange  # noqa: PLC0415

    known = getattr(model, "_weight_conversions", None)
    if known is None:  # what transformers itself takes for a model that comes from no file
        known = [one for one in get_model_conversion_mapping(model, add_legacy=False) if not isinstance(one, PrefixChange)]
    model._weight_conversions = without_experts(known)  # type: ignore[assignment]


def save_as_usual(model: nn.Module) -> None:
    """The inverse of :func:`save_as_they_are`, for experts that were fused again."""
    vars(model).pop("_weight_conversions", None)


def unfuse(experts: nn.Module, *, empty: bool = False) -> None:
    """Give every expert of a module layers of its own, for good.

    Args:
        experts: holds fused weights, which are removed.
        empty: the layers get no contents.
    """
    parts = [Expert.owning(experts, index, empty=empty) for index in range(len(experts.down_proj))]  # type: ignore[arg-type]
    device: Any = experts.down_proj.device
    for name in [name for name, parameter in experts.named_parameters(recurse=False) if parameter.dim() in (2, 3)]:
        if name.removesuffix("_bias") in (parts[0].first, "down_proj"):
            dtype = getattr(experts, name).dtype
            delattr(experts, name)
            # A program that does not know us looks for the fused tensor; it finds one number and stops.
            experts.register_buffer(name, torch.zeros(1, dtype=dtype, device=None if empty else device))
    experts.train(experts.training)
    _call_one_by_one(experts, [part.train(experts.training) for part in parts])


def fuse(experts: nn.Module) -> None:
    """Put the layers of every expert into fused weights again: the inverse of :func:`unfuse`.

    Args:
        experts: every layer of every expert is an ordinary one, with a bias where the fused weights have one.
    """
    parts = [part for part in experts.children() if isinstance(part, Expert)]
    for name in (parts[0].first, "down_proj"):
        layers = [part.get_submodule(name) for part in parts]
        weight = torch.stack([layer.weight.detach() for layer in layers])  # type: ignore[operator]
        trained = layers[0].weight.requires_grad
        fused = {name: weight.mT.contiguous() if _form(experts).transposed else weight}
        if _form(experts).bias:
            fused[f"{name}_bias"] = torch.stack([layer.bias.detach() for layer in layers])  # type: ignore[operator]
        for key, tensor in fused.items():
            delattr(experts, key)
            experts.register_parameter(key, nn.Parameter(tensor, requires_grad=bool(trained)))
    for index in range(len(parts)):
        delattr(experts, str(index))
    del experts.forward


def routers(model: nn.Module) -> list[str]:
    """Names of the modules that send tokens to experts which are layers of their own; none where experts are fused.

    A router stands beside its experts, and each of its parameters has one row, or one number, for every expert.
    """
    found = []
    for name, module in model.named_modules():
        experts = sum(isinstance(part, (Expert, Skipped)) for part in module.children())
        if not experts or not any(isinstance(part, Expert) for part in module.children()):
            continue
        parent, _, own = name.rpartition(".")
        for leaf, beside in model.get_submodule(parent).named_children():
            sizes = {parameter.shape[0] for parameter in beside.parameters()}
            if leaf != own and sizes == {experts}:
                found.append(f"{parent}.{leaf}")
    return found


def fused_sizes(model: nn.Module) -> dict[str, dict[str, Any]]:
    """By name of a module with fused experts: ``experts``, ``first``, ``d_in``, ``d_first``, ``channels``, ``bias``."""
    sizes = {}
    for name, module in model.named_modules():
        if is_fused(module):
            first, down = ExpertLinear(module, first_of(module), 0), ExpertLinear(module, "down_proj", 0)
            sizes[name] = {
                "experts": len(module.down_proj),
                "first": first_of(module),
                "d_in": first.in_features,
                "d_first": first.out_features,
                "channels": down.in_features,
                "bias": _form(module).bias,
            }
    return sizes


@contextmanager
def expert_layers_called(model: nn.Module) -> Iterator[None]:
    """:func:`expert_layers` of a model without numbers, where no router can say who reads what: each expert reads every token."""
    with expert_layers(model) as holders, hearing_all(model) if holders else nullcontext():
        yield


@contextmanager
def hearing_all(model: nn.Module) -> Iterator[None]:
    """Every expert reads every token, and those that were not routed to it count nothing in the output.

    The gradient at an expert's output is 0 for these, so a mean over all tokens is that over routed tokens times their share.

    Args:
        model: with its experts as layers (:func:`expert_layers`).

    Raises:
        ModelError: it has none, or they are given 0 for other tokens.
    """
    holders = [module for module in model.modules() if any(isinstance(part, Expert) for part in module.children())]
    if not holders:
        raise ModelError(f"{type(model).__name__} has no experts that could be given all tokens", "leave --route-all out")
    if any(_form(experts).scaled for experts in holders):
        raise ModelError(
            f"the router of {type(model).__name__} scales what experts read, by 0 for tokens that are not theirs",
            "leave --route-all out",
        )
    before = [experts.forward for experts in holders]
    for experts in holders:
        experts.forward = partial(_forward, experts, every=True)
    try:
        yield
    finally:
        for experts, forward in zip(holders, before, strict=True):
            experts.forward = forward


def _forward(experts: Any, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor, *, every: bool = False) -> Tensor:
    """What the experts compute, one after the other.

    Args:
        experts: their module, which holds one :class:`Expert` for each.
        hidden_states: [tokens, d].
        top_k_index: [tokens, k], which experts a token goes to.
        top_k_weights: [tokens, k].
        every: let each expert read all tokens, with a weight of 0 where it is not among them.
    """
    result = torch.zeros_like(hidden_states)
    for index, part in enumerate(one for one in experts.children() if isinstance(one, (Expert, Skipped))):
        routed = top_k_index == index
        if every:
            token = torch.arange(len(hidden_states), device=hidden_states.device)
            weights = (top_k_weights * routed).sum(1, keepdim=True)
        else:
            token, position = torch.where(routed)
            weights = top_k_weights[token, position, None]
        if len(token) == 0 and torch.is_grad_enabled():
            continue  # without gradients it is called, so that the layers of an idle expert are seen as well
        outputs = _outputs(experts, part, hidden_states[token], token)
        if _form(experts).normed:
            outputs = experts.post_expert_norm(outputs)
        weighted = outputs * weights
        result = result.index_add(0, token, weighted.to(result.dtype))
    return result


def _forward_scaled(experts: Any, hidden_states: Tensor) -> Tensor:
    """What the experts compute, one after the other, where the router has scaled what they read.

    Args:
        experts: their module, which holds one :class:`Expert` for each.
        hidden_states: [experts · tokens, d]: all tokens for each expert; those that are not its own are 0, and what it says of
            them stays 0, also where its layers have biases.
    """
    parts = [one for one in experts.children() if isinstance(one, (Expert, Skipped))]
    results = []
    for part, x in zip(parts, hidden_states.view(len(parts), -1, hidden_states.shape[-1]), strict=True):
        token = x.detach().ne(0).any(-1).nonzero().flatten()
        result = torch.zeros_like(x)
        if len(token) or not torch.is_grad_enabled():
            result = result.index_add(0, token, _outputs(experts, part, x[token], token).to(result.dtype))
        results.append(result)
    return torch.cat(results)


def _outputs(experts: Any, part: nn.Module, x: Tensor, token: Tensor) -> Tensor:
    """Of one expert for the tokens that it reads, or its mean where it was replaced by that; [tokens, d]."""
    if not isinstance(part, Expert):
        mean: Tensor = part(x)
        return mean
    part.positions = token
    inner = _activated(experts, part.get_submodule(part.first)(x))
    outputs: Tensor = part.get_submodule("down_proj")(inner)
    return outputs


def _activated(experts: Any, inner: Tensor) -> Tensor:
    """What the last projection reads, from what the first one says."""
    activated: Tensor
    if hasattr(experts, "_apply_gate"):
        activated = experts._apply_gate(inner) if experts.has_gate else experts.act_fn(inner)
    else:
        gate, up = inner.chunk(2, dim=-1)
        activated = up * experts.act_fn(gate)
    return activated


def find_experts(model: nn.Module, groups: Sequence[InputGroup]) -> list[Sublayer]:
    """The experts that a mean may stand for: those of all blocks but the last, of which both projections were chosen.

    Args:
        model: with its experts as layers (:func:`expert_layers`).
        groups: its input groups, in the order of the calls.
    """
    last = max((group.block for group in groups if group.block is not None), default=None)
    found = []
    for first, second in pairwise(groups):
        parent, _, kind = second.name.rpartition(".")
        expert = model.get_submodule(parent) if second.layers[0].expert is not None else None
        whole = isinstance(expert, Expert) and kind == "down_proj" and first.name == f"{parent}.{expert.first}"
        if whole and first.block != last:
            found.append(Sublayer(parent, (first, second), 0, 0))
    return found
