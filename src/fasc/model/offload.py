"""A model larger than its device: where each part of it lies, and the numbers of parts that are not in memory.

transformers and accelerate do the moving (``device_map``): a layer that is offloaded holds shapes alone, on the meta device, but
for the length of its own forward. Whoever reads or changes weights at another time asks here.
"""

import json
import shutil
import weakref
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

import torch
from accelerate.hooks import AlignDevicesHook, SequentialHook, add_hook_to_module, remove_hook_from_module
from accelerate.utils import OffloadedWeightsLoader
from safetensors.torch import save_file
from torch import Tensor, nn

from fasc.errors import ModelError, UsageError
from fasc.model.blocks import block_names

DeviceMap = str | Mapping[str, str | int]
"""``auto`` and the like, or part of the model ↦ ``cpu``, ``disk``, or a device."""

AUTOMATIC = ("auto", "balanced", "balanced_low_0", "sequential")


def read_device_map(given: DeviceMap) -> DeviceMap:
    """A way of placing, or the map in a JSON file.

    Raises:
        UsageError: neither.
    """
    if not isinstance(given, str):
        return given
    if given in AUTOMATIC:
        return given
    try:
        found = json.loads(Path(given).expanduser().read_text(encoding="utf-8"))
    except (OSError, ValueError) as problem:
        raise UsageError(
            f"device map `{given}` is no way of placing a model and no JSON file: {str(problem).splitlines()[0][:120]}",
            f'give {", ".join(AUTOMATIC)}, or a file such as {{"model.layers.0": 0, "": "disk"}}',
        ) from None
    if not isinstance(found, dict) or not found or not all(isinstance(place, str | int) for place in found.values()):
        raise UsageError(
            f"device map `{given}` does not say where each part goes", 'write {"model.layers.0": 0, "": "disk"} and the like'
        )
    return found


def place_of(name: str, device_map: Mapping[str, str | int]) -> str | int | None:
    """Where a part goes: what the map says of the smallest part around it."""
    around = [part for part in device_map if part in ("", name) or name.startswith(f"{part}.")]
    return device_map[max(around, key=len)] if around else None


def require_whole_blocks(model: nn.Module, device_map: Mapping[str, str | int]) -> None:
    """Refuse a map that puts parts of one block in several places: its moments would be, too.

    Args:
        model: with names and shapes at least.
        device_map: part ↦ place.

    Raises:
        ModelError: names the block and two places.
    """
    names = [name for name, _ in model.named_parameters()]
    blocks: dict[str, dict[str, str | int | None]] = {}
    for name in names:
        for block in block_names(model, [name]):
            blocks.setdefault(block, {})[name] = place_of(name, device_map)
    for block, places in blocks.items():
        (first, here), *others = places.items()
        other = next((name for name, there in others if there != here), None)
        if other is not None:
            raise ModelError(
                f"the device map splits `{block}`: `{first}` goes to {here} and `{other}` to {places[other]}",
                "give a block one place",
            )


def whole_parts(model: nn.Module, device_map: Mapping[str, str | int]) -> dict[str, str | int]:
    """The same map with a name for every block and for every module outside of them: accelerate wants parts that do not overlap.

    Args:
        model: with names and shapes at least.
        device_map: part ↦ place; the smallest part around a name counts.

    Raises:
        ModelError: a block is split, or something has no place.
    """
    require_whole_blocks(model, device_map)
    parts: dict[str, str | int] = {}
    for name, module in model.named_modules():
        own = (*module.parameters(recurse=False), *module.buffers(recurse=False))
        block = block_names(model, [f"{name}."])
        part = block[0] if block else name
        place = place_of(part, device_map) if not block else place_of(name, device_map)
        if own and place is None:
            raise ModelError(f"the device map has no place for `{name}`", 'add one for the rest: {"": "cpu"} and the like')
        if own and place is not None:
            parts[part] = place
    return parts


def is_offloaded(model: nn.Module) -> bool:
    """Whether some of a model's numbers are not in memory, or not on the device that works with them."""
    return any(_offloader(module) is not None for module in model.modules())


def require_in_memory(model: nn.Module, what: str) -> None:
    """Refuse an offloaded model where all weights are needed at once.

    Raises:
        ModelError: says for what.
    """
    if is_offloaded(model):
        raise ModelError(f"{what} needs all weights in memory, and this model is offloaded", "leave --device-map out")


def device_of(module: nn.Module, otherwise: torch.device) -> torch.device:
    """Where a layer works.

    Args:
        module: a layer.
        otherwise: for one without parameters of its own.
    """
    hook = _offloader(module)
    if hook is not None:
        return torch.device(hook.execution_device)
    parameter = next(module.parameters(recurse=False), None)
    return otherwise if parameter is None else parameter.device


def numbers_of(module: nn.Module, key: str = "weight") -> Tensor:
    """A tensor of a module, fetched if it is offloaded; what is fetched is a copy."""
    tensor: Tensor = getattr(module, key)
    hook = _offloader(module) if tensor.is_meta else None
    return tensor if hook is None else hook.weights_map[key].to(hook.execution_device)


def all_numbers(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """``model.state_dict()`` by name, one tensor after another, offloaded ones fetched."""
    for name, tensor in sorted(model.state_dict().items()):
        parent, _, key = name.rpartition(".")
        yield name, numbers_of(model.get_submodule(parent), key) if tensor.is_meta else tensor


@contextmanager
def in_reach(model: nn.Module, names: Iterable[str]) -> Iterator[None]:
    """Layers have their numbers while the body runs; whatever stands in their place then goes where they were.

    Args:
        model: whose body may replace these layers, or change their numbers.
        names: of layers.
    """
    given: Any = getattr(model, "hf_device_map", {})
    fetched, before = {}, dict(model.named_modules())
    for name in names:
        module = before.get(name)
        hook = None if module is None else _offloader(module)
        if hook is not None:
            hook.pre_forward(module)
            fetched[name] = hook.execution_device
    try:
        yield
    finally:
        there = dict(model.named_modules())
        for name, device in fetched.items():
            for module in there[name].modules() if name in there else ():
                _send_away(module, device, to_disk=place_of(name, given) == "disk")


def _offloader(module: nn.Module) -> AlignDevicesHook | None:
    """What fetches a module's numbers for its forward, if they are offloaded."""
    hook = module.__dict__.get("_hf_hook")
    for one in hook.hooks if isinstance(hook, SequentialHook) else (hook,):
        if isinstance(one, AlignDevicesHook) and one.offload and one.weights_map is not None:
            return one
    return None


def _send_away(module: nn.Module, device: Any, *, to_disk: bool) -> None:
    own = {key: parameter.data for key, parameter in module.named_parameters(recurse=False)}
    if not own or any(tensor.is_meta for tensor in own.values()):  # a projection that two layers share has gone already
        return
    remove_hook_from_module(module)
    weights = _OnDisk(own) if to_disk else {key: tensor.cpu() for key, tensor in own.items()}
    add_hook_to_module(module, AlignDevicesHook(execution_device=device, offload=True, weights_map=weights))


class _OnDisk(OffloadedWeightsLoader):
    """Tensors in a file that lives as long as this does."""

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        folder = mkdtemp(prefix="fasc-offloaded-")
        weakref.finalize(self, shutil.rmtree, folder, ignore_errors=True)
        file = Path(folder) / "weights.safetensors"
        save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, file)
        super().__init__(index={key: {"safetensors_file": str(file), "weight_name": key} for key in tensors})
