"""What calibration leaves behind: the moments of every input group, and where they came from."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from fasc.errors import StatisticsError
from fasc.statistics.accumulators import Covariance
from fasc.model.groups import InputGroup, Scope, Unit
from fasc.storage import new_file, storage_error

Moment = Literal["input", "gradient", "cross", "magnitude", "output_scale", "product", "rows", "sequences", "taylor"]
Side = Literal["input", "output"]

FORMAT = 1

_TOKENS = "tokens"
"""Key of the tokens; all other keys hold a slash."""


class Need(NamedTuple):
    """One moment, for the whole group or for each of its layers."""

    moment: Moment
    scope: Scope


@dataclass(frozen=True, slots=True)
class GradientMoment:
    """Gradients of a unit, on the smaller side: ``g = Wᵀh`` at its input, or ``h`` at its outputs (stacked)."""

    side: Side
    covariance: Covariance
    """``Σ_gg`` [d_in, d_in] or ``Σ_hh`` [d_out, d_out], in nats² per token."""

    cross: Tensor | None = None
    """``E[x̃ g̃ᵀ]`` or ``E[x̃ h̃ᵀ]``, [d_in, d_in or d_out], if a method asked for it."""

    def at_input(self, weight: Tensor) -> tuple[Tensor, Tensor | None]:
        """``Σ_gg`` and ``Σ_xg`` [d_in, d_in], float64, whichever side they were formed on: ``g = Wᵀh``.

        Args:
            weight: the unit's stacked weight, [d_out, d_in].
        """
        w = weight.double()
        matrix = self.covariance.matrix.to(w)
        cross = None if self.cross is None else self.cross.to(w)
        if self.side == "input":
            return matrix, cross
        return w.mT @ matrix @ w, None if cross is None else cross @ w


@dataclass(frozen=True, slots=True)
class UnitStatistics:
    """What a method is given for one unit: a whole group, or one layer of it."""

    name: str
    tokens: int
    input: Covariance
    gradient: GradientMoment | None
    extras: Mapping[str, Tensor] = field(default_factory=dict)
    """Moments that only some methods ask for, by name; see ``statistics/extras.py``."""

    share: float = 1.0
    """Of the text's tokens that the moments are means over: below 1 for an expert."""

    def require_extra(self, moment: str) -> Tensor:
        """A moment of ``extras``, of the group or of this very layer.

        Raises:
            StatisticsError: it was not collected.
        """
        for key in (moment, f"{moment}/{self.name}"):
            if key in self.extras:
                return self.extras[key]
        raise StatisticsError(f"`{self.name}`: the statistics hold no moment `{moment}`", "collect again for this method")

    def require_gradient(self) -> GradientMoment:
        """The gradient moment.

        Raises:
            StatisticsError: it was not collected.
        """
        if self.gradient is None:
            raise StatisticsError(f"`{self.name}`: the statistics hold no gradient moment", "collect again for this method")
        return self.gradient

    def require_cross(self) -> Tensor:
        """The cross covariance.

        Raises:
            StatisticsError: it was not collected.
        """
        cross = self.require_gradient().cross
        if cross is None:
            raise StatisticsError(f"`{self.name}`: the statistics hold no cross covariance", "collect again for this method")
        return cross


@dataclass(frozen=True, slots=True)
class GroupStatistics:
    """Moments of one input group."""

    group: InputGroup
    tokens: int
    """Tokens averaged over, padding excluded."""

    input: Covariance
    """``μ_x`` and ``Σ_xx`` of the shared input."""

    gradients: Mapping[str, GradientMoment] = field(default_factory=dict)
    """By unit: the group's name, or a layer's."""

    extras: Mapping[str, Tensor] = field(default_factory=dict)
    """Moments that only some methods ask for."""

    def unit(self, name: str) -> UnitStatistics:
        """What a method is given for the group (its name) or for one of its layers (the layer's name)."""
        return UnitStatistics(name, self.tokens, self.input, self.gradients.get(name), self.extras)


@dataclass(frozen=True)
class Statistics:
    """The moments of every group of a model on one corpus."""

    groups: Mapping[str, GroupStatistics]
    meta: Mapping[str, Any]
    """Model fingerprint, token digest, labels, needs: what these numbers belong to; and how they were made."""

    text: Tensor | None = None
    """The calibration tokens, int64 [sequences, length], where they had no padding: error propagation runs on them again."""

    def group(self, name: str) -> GroupStatistics:
        """The moments of a group.

        Raises:
            StatisticsError: there is no such group.
        """
        if name not in self.groups:
            raise StatisticsError(f"the statistics have no group `{name}`", "run `fasc collect` with the same layers")
        return self.groups[name]

    def unit(self, unit: Unit) -> UnitStatistics:
        """What a method is given for a unit.

        Raises:
            StatisticsError: there is no such group.
        """
        return self.group(unit.group).unit(unit.name)

    def require(self, needs: frozenset[Need]) -> None:
        """Raise ``StatisticsError`` unless every moment of ``needs`` is there."""
        have = {Need(*need) for need in self.meta["needs"]}
        absent = sorted(f"{need.moment} per {need.scope}" for need in needs - have)
        if absent:
            raise StatisticsError(f"the statistics lack {', '.join(absent)}", "run `fasc collect` again with this method")

    def require_model(self, fingerprint: str) -> None:
        """Raise ``StatisticsError`` if these statistics were measured on another model."""
        if self.meta["model_fingerprint"] != fingerprint:
            raise StatisticsError(
                f"the statistics were measured on another model ({self.meta['model_fingerprint'][:12]}…, "
                f"this one is {fingerprint[:12]}…)",
                "run `fasc collect` on this model",
            )

    def present_in(self, model: nn.Module) -> "Statistics":
        """The same without groups whose layers the model does not have: experts, outside of ``expert_layers``."""
        names = {name for name, _ in model.named_modules()}
        groups = {name: one for name, one in self.groups.items() if all(layer.name in names for layer in one.group.layers)}
        return replace(self, groups=groups)

    def save(self, path: Path) -> Path:
        """Write ``statistics.safetensors``.

        Raises:
            StorageError: it cannot be written.
        """
        tensors: dict[str, Tensor] = {}
        layout = []
        for name, group in self.groups.items():
            tensors |= _put(f"{name}/input", group.input)
            units = {}
            for unit, gradient in group.gradients.items():
                units[unit] = gradient.side
                tensors |= _put(f"{unit}/gradient/{_scope(name, unit)}", gradient.covariance)
                if gradient.cross is not None:
                    tensors[f"{unit}/cross/{_scope(name, unit)}"] = gradient.cross
            tensors |= {f"{name}/extra/{key}": value for key, value in group.extras.items()}
            layout.append({**group.group.to_dict(), "tokens": group.tokens, "units": units})
        if self.text is not None:
            tensors[_TOKENS] = self.text
        header = {"format": str(FORMAT), "groups": json.dumps(layout), "meta": json.dumps(dict(self.meta))}
        with new_file(path) as scratch:
            try:
                save_file({key: value.contiguous() for key, value in tensors.items()}, scratch, metadata=header)
            except SafetensorError as problem:
                raise storage_error(problem, path) from problem
        return path

    @staticmethod
    def load(path: Path) -> "Statistics":
        """Read ``statistics.safetensors``.

        Raises:
            StatisticsError: missing, damaged, or of another format.
        """
        try:
            with safe_open(path, framework="pt") as file:
                header = file.metadata() or {}
                if header.get("format") != str(FORMAT):
                    raise StatisticsError(f"`{path}` is not a statistics file of format {FORMAT}", "run `fasc collect` again")
                groups = [_read_group(file, raw) for raw in json.loads(header["groups"])]
                tokens = file.get_tensor(_TOKENS) if _TOKENS in file.keys() else None  # noqa: SIM118 - not a mapping
                return Statistics({group.group.name: group for group in groups}, json.loads(header["meta"]), tokens)
        except FileNotFoundError as problem:
            raise StatisticsError(f"`{path}` does not exist", "run `fasc collect` first") from problem
        except (SafetensorError, OSError) as problem:
            raise StatisticsError(f"`{path}` is damaged: {problem}", "run `fasc collect` again") from problem


def _scope(group: str, unit: str) -> Scope:
    return "group" if unit == group else "layer"


def _put(key: str, covariance: Covariance) -> dict[str, Tensor]:
    return {f"{key}/mean": covariance.mean, f"{key}/covariance": covariance.matrix}


def _get(file: Any, key: str) -> Covariance:
    return Covariance(file.get_tensor(f"{key}/mean"), file.get_tensor(f"{key}/covariance"))


def _read_group(file: Any, raw: Mapping[str, Any]) -> GroupStatistics:
    group = InputGroup.from_dict(raw)
    gradients = {}
    keys = set(file.keys())
    for unit, side in raw["units"].items():
        scope = _scope(group.name, unit)
        cross = f"{unit}/cross/{scope}"
        moment = file.get_tensor(cross) if cross in keys else None
        gradients[unit] = GradientMoment(side, _get(file, f"{unit}/gradient/{scope}"), moment)
    prefix = f"{group.name}/extra/"
    extras = {key.removeprefix(prefix): file.get_tensor(key) for key in keys if key.startswith(prefix)}
    return GroupStatistics(group, raw["tokens"], _get(file, f"{group.name}/input"), gradients, extras)


def smaller_side(d_in: int, d_out: int) -> Side:
    """Where a unit's gradient moment is formed: at its input if that is no wider than its outputs."""
    return "input" if d_in <= d_out else "output"


def as_float64(covariance: Covariance, device: torch.device | str = "cpu") -> tuple[Tensor, Tensor]:
    """Mean and matrix in the precision of the linear algebra."""
    return covariance.mean.to(device, torch.float64), covariance.matrix.to(device, torch.float64)
