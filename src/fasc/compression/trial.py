"""What compressing one unit alone really costs: the KL divergence to the dense model on held-out text."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import PreTrainedModel

from fasc.planning.plan import UnitPlan
from fasc.statistics.moments import Statistics
from fasc.forecast.channels import Cutting, cut_channels, narrowed
from fasc.layouts.install import install
from fasc.planning.options import MethodConfig
from fasc.errors import NonFiniteError
from fasc.linalg.decomposition import Decomposition
from fasc.model.scopes import TailRunner, restored
from fasc.model.blocks import block_names
from fasc.model.groups import evaluating

_ROWS = 1024
"""Logits compared at a time."""


@dataclass(frozen=True, slots=True)
class MeasuredLoss:
    """Means over tokens, nats per token."""

    nats: float
    """KL(dense ‖ compressed)."""

    error: float
    """Its standard error over sequences."""

    nll_increase: float
    """Loss on the text's own next tokens, above the dense model's: the logarithm of the ratio of perplexities."""


class UnitTester:
    """Measures units one at a time; the model is dense between two measurements.

    Args:
        model: dense.
        statistics: measured on it.
        tokens: held-out text, [sequences, length], all run as one batch: its logits must fit into memory twice.
    """

    def __init__(self, model: PreTrainedModel, statistics: Statistics, tokens: Tensor) -> None:
        self._model, self._statistics = model, statistics
        names = [layer.name for group in statistics.groups.values() for layer in group.group.layers]
        self._blocks = block_names(model, names)
        with evaluating(model):
            self._tokens = tokens.to(model.device)
            self._runner = TailRunner(model, self._tokens, self._blocks)
            self._dense = F.log_softmax(self._runner.logits.float(), dim=-1)
        self._runner.logits = self._runner.logits[:0]

    def measure(self, units: Sequence[tuple[UnitPlan, Decomposition]]) -> MeasuredLoss:
        """What compressing these units costs, all others dense; see :meth:`measure_plan`."""
        known = {unit.unit: decomposition for unit, decomposition in units}
        return self.measure_plan([unit for unit, _ in units], lambda unit: known[unit.unit])

    def measure_plan(
        self,
        units: Sequence[UnitPlan],
        decompose: Callable[[UnitPlan], Decomposition],
        cuttings: Sequence[Cutting] = (),
    ) -> MeasuredLoss:
        """What compressing these units costs, all others dense.

        Args:
            units: with the rank and layout to test, in the order of the blocks; none is ``dense``.
            decompose: gives the decomposition of a unit, when it is that unit's turn.
            cuttings: MLPs that lose channels first.

        Raises:
            NonFiniteError: the compressed model's logits are not finite.
        """
        layers = [name for unit in units for name in unit.layers]
        cut = [layer.name for one in cuttings for layer in one.channels.layers]
        statistics = narrowed(self._statistics, cuttings)
        with restored(self._model, sorted({*layers, *cut})), evaluating(self._model), torch.no_grad():
            for one in cuttings:
                cut_channels(self._model, self._statistics, one)
            for unit in units:
                inputs = statistics.groups[unit.group].input
                full = decompose(unit)
                install(self._model, unit, full.truncate(unit.rank, inputs.mean.to(full.down)), inputs)
            first = [name for name in self._blocks if any(layer.startswith(f"{name}.") for layer in (*layers[:1], *cut[:1]))]
            logits = self._runner.logits_from(first[0] if first else None)
        if not bool(torch.isfinite(logits).all()):
            raise NonFiniteError(f"the logits with `{(*layers, *cut)[0]}` compressed", "raise --damping")
        return self._compare(logits)

    def _compare(self, logits: Tensor) -> MeasuredLoss:
        per_token, increase = [], 0.0
        targets = self._tokens.roll(-1, dims=1)
        scored = torch.ones_like(targets, dtype=torch.bool)
        scored[:, -1] = False  # nothing follows the last token
        parts = (logits.flatten(0, 1), self._dense.flatten(0, 1), targets.flatten(), scored.flatten())
        for mine, dense, target, counts in zip(*(part.split(_ROWS) for part in parts), strict=True):
            ours = F.log_softmax(mine.float(), dim=-1)
            difference = dense - ours
            per_token.append((dense.exp() * difference).sum(-1))
            increase += float(difference.gather(1, target[:, None])[counts].double().sum())
        by_sequence = torch.cat(per_token).view(logits.shape[0], -1).double().mean(1)
        spread = float(by_sequence.std()) / max(1, len(by_sequence)) ** 0.5 if len(by_sequence) > 1 else 0.0
        return MeasuredLoss(float(by_sequence.mean()), spread, increase / int(scored.sum()))


def options_of(unit: UnitPlan, options: MethodConfig) -> MethodConfig:
    """The options of the unit's own method, where a gate chose another."""
    return options if unit.method is None else options.model_copy(update={"name": unit.method})
