"""A rounded model as a `compressed-tensors` checkpoint (format pack-quantized), which transformers and vLLM load without fasc.

Its codes are ours, in 32-bit words without gaps. Each number of bits is a group of its config. It knows neither factors nor
narrower layers. Versions of compressed-tensors before 0.20 leave gaps where bits do not divide 32: 2, 4 and 8 are for all.
"""

from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from fasc.edits.quantise import Quantise
from fasc.edits.structure import parsed, structure_of
from fasc.errors import UsageError
from fasc.layouts.quantised import QuantisedLinear
from fasc.linalg.packing import unpack
from fasc.model.offload import require_in_memory
from fasc.serving.checkpoint import CheckpointNotes, save_checkpoint


def save_pack_quantized(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    folder: Path,
    notes: CheckpointNotes,
    *,
    overwrite: bool = False,
    max_shard_size: int | None = None,
) -> None:
    """Write the checkpoint; the model comes out as it went in.

    Raises:
        ModelError: the model is offloaded.
        UsageError: a layer is not rounded alone: factored, narrowed, or in groups that do not divide its inputs.
        StorageError: as for any checkpoint.
    """
    require_in_memory(model, "compressed-tensors")
    layers = _rounded_layers(model)
    ours = model.config.quantization_config
    with _replaced(model, layers):
        model.config.quantization_config = _config(model, layers)
        quantizer = model.__dict__.pop("hf_quantizer", None)
        try:
            save_checkpoint(model, tokenizer, folder, notes, overwrite=overwrite, max_shard_size=max_shard_size)
        finally:
            model.config.quantization_config = ours
            if quantizer is not None:
                model.hf_quantizer = quantizer


def _rounded_layers(model: PreTrainedModel) -> dict[str, QuantisedLinear]:
    edits = parsed(structure_of(model))
    others = [edit for edit in edits if not isinstance(edit, Quantise)]
    if others or not edits:
        what = f"`{others[0].touches[0]}` is a layer of another kind ({others[0].edit})" if others else "nothing is rounded"
        raise UsageError(f"compressed-tensors holds rounded layers and no others: {what}", "plan with --layouts dense --bits 4,8")
    layers: dict[str, QuantisedLinear] = {}
    for edit in edits:
        for name in edit.touches:
            layer = model.get_submodule(name)
            if not isinstance(layer, QuantisedLinear):
                raise UsageError(f"`{name}` is a {type(layer).__name__}", "save the model as it was rounded")
            if layer.in_features % layer.group:
                raise UsageError(
                    f"`{name}`: groups of {layer.group} do not divide its {layer.in_features:,} inputs",
                    "give --bits-group a divisor of every width",
                )
            layers[name] = layer
    return layers


class _Packed(nn.Module):
    """A layer in that format, only to be saved."""

    def __init__(self, layer: QuantisedLinear) -> None:
        super().__init__()
        codes = layer.rounded().codes
        scales = layer.scales.view(torch.float16)
        zeros = unpack(layer.zeros, layer.bits, scales.numel()).view_as(scales)
        self.register_buffer("weight_packed", words(codes, layer.bits))
        self.register_buffer("weight_scale", scales)
        self.register_buffer("weight_zero_point", words(zeros.mT, layer.bits).mT.contiguous())
        self.register_buffer("weight_shape", torch.tensor(codes.shape))
        self.bias = layer.bias


@contextmanager
def _replaced(model: nn.Module, layers: dict[str, QuantisedLinear]) -> Iterator[None]:
    """Packed layers in the place of ours."""
    try:
        for name, layer in layers.items():
            _put(model, name, _Packed(layer))
        yield
    finally:
        for name, layer in layers.items():
            _put(model, name, layer)


def _put(model: nn.Module, name: str, module: nn.Module) -> None:
    parent, _, leaf = name.rpartition(".")
    setattr(model.get_submodule(parent), leaf, module)


def words(codes: Tensor, bits: int) -> Tensor:
    """Codes [rows, n] as int32 words [rows, ⌈n · bits / 32⌉]: code ``i`` begins at bit ``i · bits`` of its row."""
    rows, count = codes.shape
    places = torch.arange(bits, dtype=torch.uint8)
    single = ((codes.cpu()[..., None] >> places) & 1).reshape(rows, count * bits)
    padded = nn.functional.pad(single, (0, -count * bits % 32)).view(rows, -1, 32).long()
    value = (padded << torch.arange(32)).sum(-1)
    return torch.where(value >= 2**31, value - 2**32, value).to(torch.int32)


def _config(model: nn.Module, layers: dict[str, QuantisedLinear]) -> dict[str, Any]:
    groups: dict[tuple[int, int], list[str]] = defaultdict(list)
    for name, layer in layers.items():
        groups[layer.bits, layer.group].append(name)
    unrounded = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    return {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "quantization_status": "compressed",
        "config_groups": {
            f"group_{index}": {"targets": names, "weights": _scheme(bits, group), "format": "pack-quantized"}
            for index, ((bits, group), names) in enumerate(sorted(groups.items()))
        },
        "ignore": unrounded,
    }


def _scheme(bits: int, group: int) -> dict[str, Any]:
    return {
        "num_bits": bits,
        "type": "int",
        "symmetric": False,
        "strategy": "group",
        "group_size": group,
        "dynamic": False,
    }
