"""The moments of one unit and of one input group."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from fasc.errors import StatisticsError
from fasc.model.groups import InputGroup, Scope
from fasc.model.layers import Layer
from fasc.statistics.accumulators import Covariance, Weights, mean_step, merged_cross, weights_of
from fasc.statistics.extras import merged_extras

Moment = Literal[
    "input", "gradient", "cross", "magnitude", "output_scale", "product", "rows", "sequences", "taylor", "vocabulary"
]
Side = Literal["input", "output"]


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

    def merge(self, other: "GradientMoment", step_x: Tensor, weights: Weights) -> "GradientMoment":
        """The moment over both parts of a text.

        Args:
            other: of the second part, on the same side.
            step_x: ``μ_2 − μ_1`` of the inputs, [d_in], float64.
            weights: shares of the parts in the tokens.
        """
        cross = self.cross
        if cross is not None and other.cross is not None:
            step = mean_step(self.covariance.mean, other.covariance.mean)
            cross = merged_cross(cross, other.cross, (step_x, step), weights)
        return GradientMoment(self.side, self.covariance.merge(other.covariance, weights), cross)


@dataclass(frozen=True, slots=True)
class UnitStatistics:
    """What a method is given for one unit: a whole group, or one layer of it."""

    name: str
    tokens: int
    """Tokens averaged over: those that the unit read, padding excluded."""

    input: Covariance
    gradient: GradientMoment | None
    extras: Mapping[str, Tensor] = field(default_factory=dict)
    """Moments that only some methods ask for, by name; see ``statistics/extras.py``."""

    share: float = 1.0
    """Tokens averaged over per token of the text. A loss per token of the unit, times this, is one per token of the text."""

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
    """Tokens averaged over: those that the group read, padding excluded."""

    text_tokens: int
    """Tokens of the whole calibration text, padding excluded."""

    input: Covariance
    """``μ_x`` and ``Σ_xx`` of the shared input."""

    gradients: Mapping[str, GradientMoment] = field(default_factory=dict)
    """By unit: the group's name, or a layer's."""

    extras: Mapping[str, Tensor] = field(default_factory=dict)
    """Moments that only some methods ask for."""

    sequences: int = 0
    """Sequences of the calibration text: what extras per sequence are means over."""

    @property
    def share(self) -> float:
        """Tokens read per token of the text: below 1 for an expert, above 1 for a layer that is called several times."""
        return self.tokens / self.text_tokens

    def unit(self, name: str) -> UnitStatistics:
        """What a method is given for the group (its name) or for one of its layers (the layer's name)."""
        return UnitStatistics(name, self.tokens, self.input, self.gradients.get(name), self.extras, self.share)

    def merge(self, other: "GroupStatistics") -> "GroupStatistics":
        """The moments over both parts of a text: means over tokens weighted by tokens, those over sequences by sequences.

        Args:
            other: of the same group and the same units.
        """
        weights = weights_of(self.tokens, other.tokens)
        step = mean_step(self.input.mean, other.input.mean)
        return GroupStatistics(
            self.group,
            self.tokens + other.tokens,
            self.text_tokens + other.text_tokens,
            self.input.merge(other.input, weights),
            {name: one.merge(other.gradients[name], step, weights) for name, one in self.gradients.items()},
            merged_extras(self.extras, other.extras, weights, weights_of(self.sequences, other.sequences)),
            self.sequences + other.sequences,
        )

    def lengthened(self, text_tokens: int, sequences: int) -> "GroupStatistics":
        """The same moments in a text with so many more tokens and sequences, none of which reached the group."""
        weights = weights_of(self.sequences, sequences)
        return replace(
            self,
            text_tokens=self.text_tokens + text_tokens,
            extras=merged_extras(self.extras, {}, (1.0, 0.0), weights),
            sequences=self.sequences + sequences,
        )


def units_of(group: InputGroup, needs: frozenset[Need]) -> Iterator[tuple[Scope, tuple[Layer, ...]]]:
    """The units whose gradients are wanted: the whole group, or each layer; the same thing in a group of one."""
    wanted = {need.scope for need in needs if need.moment in ("gradient", "cross")}
    if "group" in wanted or ("layer" in wanted and len(group.layers) == 1):
        yield "group", group.layers
    if "layer" in wanted and len(group.layers) > 1:
        for layer in group.layers:
            yield "layer", (layer,)


def smaller_side(d_in: int, d_out: int) -> Side:
    """Where a unit's gradient moment is formed: at its input if that is no wider than its outputs."""
    return "input" if d_in <= d_out else "output"


def as_float64(covariance: Covariance, device: torch.device | str = "cpu") -> tuple[Tensor, Tensor]:
    """Mean and matrix in the precision of the linear algebra."""
    return covariance.mean.to(device, torch.float64), covariance.matrix.to(device, torch.float64)
