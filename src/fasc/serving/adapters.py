"""Adapters on compressed models: what peft's ``target_modules`` are where a layer is stored as factors."""

from collections.abc import Iterable

from torch import nn

from fasc.errors import ModelError
from fasc.layouts._replacement import Replacement


def lora_targets(model: nn.Module, layers: str | Iterable[str]) -> list[str]:
    """Names for ``LoraConfig(target_modules=…)``: each layer itself where it is dense, its factors where it is not.

    A projection that several layers share is among the targets of each of them. Merging writes into the factors: ranks stay.

    Args:
        model: compressed or not.
        layers: last parts of names, as peft takes them: ``q_proj``, ``v_proj``, ….

    Raises:
        ModelError: no layer has such a name.
    """
    wanted = (layers,) if isinstance(layers, str) else tuple(layers)
    targets: dict[str, None] = {}
    places = {id(module): name for name, module in model.named_modules()}
    for name, module in model.named_modules():
        if name.rpartition(".")[2] not in wanted:
            continue
        parts = [module, getattr(module, "projection", None)] if isinstance(module, Replacement) else [module]
        for part in parts:
            for inner in () if part is None else part.modules():
                if isinstance(inner, nn.Linear):
                    targets[places[id(inner)]] = None
    if not targets:
        raise ModelError(f"no layer is called {', '.join(wanted)}", "give last parts of names, such as q_proj")
    return list(targets)
