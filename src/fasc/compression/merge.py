"""Back to an ordinary dense checkpoint that loads without us."""

from collections.abc import Sequence
from copy import deepcopy
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel

from fasc.edits.factor import Factor
from fasc.edits.narrow import Narrow
from fasc.edits.quantise import Quantise
from fasc.edits.structure import parsed, structure_of
from fasc.edits.unfuse import Unfuse
from fasc.errors import UsageError
from fasc.linalg.psd import cholesky, damped
from fasc.model.experts import fuse, save_as_usual
from fasc.model.offload import require_in_memory
from fasc.progress import say
from fasc.statistics.moments import Statistics, as_float64


def merge(model: PreTrainedModel, statistics: Statistics, damping: float) -> list[str]:
    """Turn a compressed model into an ordinary dense one, in place: every layer becomes ``up · down`` again.

    MLPs that all have one width now become the ordinary layers of a smaller config.

    The correction of the mean needs a bias. Where the architecture has a switch for one (``attention_bias``, ``mlp_bias``, …)
    it is turned on, and other layers that gain a bias by it get zeros. Where it has none, the bias ``b`` is folded into the
    weight as ``b uᵀ``, with ``uᵀx`` the best linear estimate of the constant 1: ``u = Σ⁻¹μ / (1 + μᵀΣ⁻¹μ)``.

    Args:
        model: as :func:`~fasc.compression.compress.carry_out` left it.
        statistics: that it was compressed with, of the layers that are left.
        damping: relative, of ``Σ_xx`` in the fold.

    Returns:
        Names of the layers whose bias was folded: there the merged model differs from the compressed one.

    Raises:
        UsageError: MLPs have lost channels, each a number of its own, which no config of an ordinary model can say.
    """
    require_in_memory(model, "--merge")
    edits = parsed(structure_of(model))
    factored = [edit for edit in edits if isinstance(edit, Factor)]
    if any(isinstance(edit, Quantise) for edit in edits):
        raise UsageError("weights of few bits cannot be merged into an ordinary checkpoint", "leave --bits or --merge out")
    narrow = [edit for edit in edits if isinstance(edit, Narrow)]
    unfused = [edit for edit in edits if isinstance(edit, Unfuse)]
    if len(factored) + len(narrow) + len(unfused) < len(edits):
        raise UsageError("the model holds edits that no ordinary checkpoint can say", "leave --merge out")
    dense = {name: edit.stored.dense(model.get_submodule(name)) for edit in factored for name in edit.layers}
    consumers = [edit.consumer.name for edit in narrow if edit.consumer.name not in dense]
    dense |= {name: _own(model.get_submodule(name)) for name in consumers}
    config = _config_with_biases(model, list(dense), _config_of_one_width(model, narrow), unfused)
    skeleton = _skeleton(model, config, unfused)
    group_of = {layer.name: name for name, g in statistics.groups.items() for layer in g.group.layers}
    folded = []
    with torch.no_grad():
        for name, (weight, bias) in dense.items():
            weight, bias = weight.detach(), bias.detach()
            target = skeleton.get_submodule(name)
            if getattr(target, "bias", None) is None:
                weight = weight + torch.outer(bias, _constant_functional(statistics, group_of[name], damping).to(bias))
                folded.append(name)
            _put_dense(model, name, target, (weight, bias))
        _add_zero_biases(model, skeleton)
        for holder in [holder for edit in unfused for holder in edit.holders]:
            fuse(model.get_submodule(holder.name))
        if unfused:
            save_as_usual(model)
    _forget_quantizer(model, config)
    if folded:
        say(f"{type(model).__name__} has no bias for {len(folded)} layers: folded into their weights")
    return folded


def _skeleton(model: PreTrainedModel, config: PretrainedConfig, unfused: Sequence[Unfuse]) -> PreTrainedModel:
    """The ordinary model without contents, its experts unfused where those of the model are."""
    with torch.device("meta"):
        skeleton = type(model)(config)
    for edit in unfused:
        edit.build(skeleton)
    return skeleton


def _own(module: nn.Module) -> tuple[Tensor, Tensor]:
    return module.weight, module.bias  # type: ignore[return-value]


def _config_of_one_width(model: PreTrainedModel, narrow: list[Narrow]) -> PretrainedConfig:
    """The config of the dense model with the width that all MLPs have, if any has lost channels."""
    config: Any = deepcopy(model.config)
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    if narrow:
        widths = {edit.width for edit in narrow}
        text = config.get_text_config()
        if len(widths) > 1 or len(narrow) < text.num_hidden_layers or not hasattr(text, "intermediate_size"):
            raise UsageError(
                "MLPs of different widths cannot be merged into an ordinary checkpoint",
                "compress with `--for plain`, or with --layouts that leave channels out",
            )
        text.intermediate_size = widths.pop()
    return config


def _config_with_biases(model: PreTrainedModel, replaced: list[str], config: Any, unfused: Sequence[Unfuse]) -> PretrainedConfig:
    """A config with every bias switch on that gives a replaced layer its bias."""

    def lacking(candidate: PretrainedConfig) -> int:
        skeleton = _skeleton(model, candidate, unfused)
        return sum(getattr(skeleton.get_submodule(name), "bias", None) is None for name in replaced)

    remaining = lacking(config)
    for key, value in config.to_dict().items():
        if value is False and "bias" in key and remaining:
            trial = deepcopy(config)
            setattr(trial, key, True)
            if lacking(trial) < remaining:
                config, remaining = trial, lacking(trial)
    return config


def _constant_functional(statistics: Statistics, group: str, damping: float) -> Tensor:
    moments = statistics.groups[group]
    mean, covariance = as_float64(moments.input)
    chol = cholesky(damped(covariance, damping), where=f"`{group}`: the inputs'", tokens=moments.tokens)
    solved = torch.cholesky_solve(mean[:, None], chol)[:, 0]
    return solved / (1 + mean @ solved)


def _put_dense(model: PreTrainedModel, name: str, target: nn.Module, values: tuple[Tensor, Tensor]) -> None:
    weight, bias = values
    new = target.to_empty(device=weight.device).to(weight.dtype)
    new.weight.copy_(weight if isinstance(new, nn.Linear) else weight.mT)  # type: ignore[operator]
    if new.bias is not None:
        new.bias.copy_(bias)  # type: ignore[operator]
    parent, _, leaf = name.rpartition(".")
    setattr(model.get_submodule(parent), leaf, new)


def _add_zero_biases(model: PreTrainedModel, skeleton: PreTrainedModel) -> None:
    """Layers that were not compressed and that the switches gave a bias."""
    have = dict(model.named_parameters(remove_duplicate=False))
    for name, parameter in skeleton.named_parameters(remove_duplicate=False):
        if name not in have:
            parent, _, leaf = name.rpartition(".")
            owner = model.get_submodule(parent)
            zeros = torch.zeros(parameter.shape, dtype=model.dtype, device=model.device)
            setattr(owner, leaf, nn.Parameter(zeros))


def _forget_quantizer(model: PreTrainedModel, config: PretrainedConfig) -> None:
    for attribute in ("hf_quantizer", "is_quantized", "quantization_method"):
        if hasattr(model, attribute):
            delattr(model, attribute)
    model.config = config
