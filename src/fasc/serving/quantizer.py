"""Our entry in transformers' quantizer registry: rebuilds the compressed structure before the weights are loaded.

Imports nothing of transformers but the registry, because it is imported while transformers is (see ``fasc/__init__.py``).
"""

from collections.abc import Sequence
from itertools import accumulate, pairwise
from typing import Any

import torch
from torch import nn
from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING, register_quantization_config, register_quantizer
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from fasc.errors import ModelError
from fasc.layouts.lowrank import FactorLinear, LowRankLinear, PivotedLinear, link_group

FORMAT = 4
"""Version of the checkpoint's structure; a newer one is refused. 2 added ``pivots``, 3 ``columns``, 4 ``channels``."""


class FascConfig(QuantizationConfigMixin):
    """The structure of a compressed checkpoint, written to ``config.json``.

    Args:
        units: one entry per replaced unit: ``layers`` (qualified names that share a projection) and ``rank``; a rank of
            ``None`` is a layer stored as one dense matrix that gained a bias. ``pivots``, in a pivoted unit, says how many of
            its kept rows are each layer's own; ``columns`` says that the unit keeps inputs as they are. ``channels`` [before,
            after] makes layers narrower: the last of the entry reads the channels and gains a bias, the others make them; entries
            for the same layers that follow work on the narrower ones.
        format: version of this structure.
    """

    def __init__(self, units: Sequence[dict[str, Any]] = (), format: int = FORMAT, **_kwargs: Any) -> None:
        self.quant_method = "fasc"
        if format > FORMAT:
            raise ModelError(f"checkpoint format {format} is newer than this fasc reads ({FORMAT})", "upgrade fasc")
        self.format = format
        self.units = [dict(unit) for unit in units]


def build_structure(model: nn.Module, units: Sequence[dict[str, Any]]) -> None:
    """Replace the layers of each unit by empty modules of the right shape, in place.

    Args:
        model: the dense skeleton (or model); new modules take the device and dtype of the layer they replace.
        units: see :class:`FascConfig`.

    Raises:
        ModelError: a unit names a layer that the model does not have.
    """
    for unit in units:
        own = _own_rows(unit)
        replaced = [_replace(model, name, unit, rows) for name, rows in zip(unit["layers"], own, strict=True)]
        low_rank = [module for module in replaced if isinstance(module, LowRankLinear)]
        if low_rank:
            device = next(tensor.device for tensor in (*low_rank[0].parameters(), *low_rank[0].buffers()))
            with torch.device(device):
                link_group(low_rank)


def _own_rows(unit: dict[str, Any]) -> list[tuple[int, int] | None]:
    """Start and stop of each layer's own rows among the kept ones of a pivoted unit."""
    counts = unit.get("pivots")
    if counts is None:
        return [None] * len(unit["layers"])
    edges = [0, *accumulate(counts)]
    return list(pairwise(edges))


def _replace(model: nn.Module, name: str, unit: dict[str, Any], own: tuple[int, int] | None) -> nn.Module:
    rank: int | None = unit["rank"]
    parent_name, _, leaf = name.rpartition(".")
    try:
        parent = model.get_submodule(parent_name)
        old: Any = parent.get_submodule(leaf)
    except AttributeError as problem:
        raise ModelError(
            f"the checkpoint compresses `{name}`, which this architecture does not have",
            "the config.json belongs to another model",
        ) from problem
    d_out, d_in = old.weight.shape if isinstance(old, nn.Linear) else reversed(old.weight.shape)  # Conv1D: [in, out]
    new: nn.Module
    with torch.device(old.weight.device):
        if "channels" in unit:
            new = _narrower(name, unit, (d_in, d_out), old)
        elif rank is not None and own is not None:
            new = PivotedLinear(d_in, d_out, rank, own=own, dtype=old.weight.dtype)
        elif rank is not None:
            new = LowRankLinear(d_in, d_out, rank, columns=unit.get("columns", False), dtype=old.weight.dtype)
        elif isinstance(old, nn.Linear):
            new = nn.Linear(d_in, d_out, bias=True, dtype=old.weight.dtype)
        else:
            new = old  # Conv1D always has a bias
    new.requires_grad_(old.weight.requires_grad)
    new.train(old.training)
    setattr(parent, leaf, new)
    return new


def _narrower(name: str, unit: dict[str, Any], shape: tuple[int, int], old: Any) -> nn.Linear:
    """A layer with fewer channels: inputs of the entry's last layer, outputs of the others."""
    before, after = unit["channels"]
    d_in, d_out = shape
    reads = name == unit["layers"][-1]
    if d_in != before if reads else d_out % before:
        raise ModelError(
            f"the checkpoint keeps {after} of {before} channels, and `{name}` is {d_out}×{d_in}",
            "the config.json belongs to another model",
        )
    bias = reads or old.bias is not None
    return FactorLinear(after if reads else d_in, d_out if reads else d_out // before * after, bias=bias, dtype=old.weight.dtype)


class FascHfQuantizer(HfQuantizer):
    """Puts empty low-rank modules where the checkpoint has them; the weights are then loaded by name as usual."""

    requires_calibration = True
    quantization_config: FascConfig

    def _process_model_before_weight_loading(self, model: nn.Module, **_kwargs: Any) -> None:
        build_structure(model, self.quantization_config.units)

    def is_serializable(self, *_args: Any, **_kwargs: Any) -> bool:
        """``save_pretrained`` works."""
        return True

    @property
    def is_trainable(self) -> bool:
        """The factors are ordinary parameters."""
        return True

    @property
    def is_qat_trainable(self) -> bool:
        """The weights themselves can be trained, without adapters: transformers' Trainer asks this."""
        return True

    @property
    def is_compileable(self) -> bool:
        """``torch.compile`` works."""
        return True


def register() -> None:
    """Make ``AutoModelForCausalLM.from_pretrained`` understand ``quant_method: fasc``; harmless when repeated."""
    if "fasc" not in AUTO_QUANTIZER_MAPPING:
        register_quantization_config("fasc")(FascConfig)
        register_quantizer("fasc")(FascHfQuantizer)


register()
