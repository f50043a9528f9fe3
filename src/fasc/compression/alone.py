"""What compressing one unit alone really costs: the KL divergence to the dense model on held-out text."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import PreTrainedModel

from fasc.budget.plan import UnitPlan
from fasc.calibration.statistics import Statistics
from fasc.compression.install import install
from fasc.config import MethodConfig
from fasc.errors import NonFiniteError
from fasc.linalg.decomposition import Decomposition
from fasc.model.alone import TailRunner, restored
from fasc.model.blocks import block_names
from fasc.model.groups import evaluating

_ROWS = 1024
"""Logits compared at a time."""


@dataclass(frozen=True, slots=True)
class MeasuredLoss:
    """A mean over tokens and its standard error over sequences."""

    nats: float
    error: float


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
            self._runner = TailRunner(model, tokens.to(model.device), self._blocks)
            self._dense = F.log_softmax(self._runner.logits.float(), dim=-1)
        self._runner.logits = self._runner.logits[:0]

    def measure(self, units: Sequence[tuple[UnitPlan, Decomposition]]) -> MeasuredLoss:
        """KL(dense ‖ compressed) in nats per token with these units of one block compressed, all others dense.

        Args:
            units: with the rank and layout to test, and their decompositions.

        Raises:
            NonFiniteError: the compressed model's logits are not finite.
        """
        layers = [name for unit, _ in units for name in unit.layers]
        with restored(self._model, layers), evaluating(self._model), torch.no_grad():
            for unit, decomposition in units:
                inputs = self._statistics.groups[unit.group].input
                install(self._model, unit, decomposition.truncate(unit.rank, inputs.mean.to(decomposition.down)), inputs)
            block = next((name for name in self._blocks if layers[0].startswith(f"{name}.")), None)
            logits = self._runner.logits_from(block)
        if not bool(torch.isfinite(logits).all()):
            raise NonFiniteError(f"the logits with only `{units[0][0].group}` compressed", "raise --damping")
        return self._divergence(logits)

    def _divergence(self, logits: Tensor) -> MeasuredLoss:
        per_token = []
        for mine, dense in zip(logits.flatten(0, 1).split(_ROWS), self._dense.flatten(0, 1).split(_ROWS), strict=True):
            ours = F.log_softmax(mine.float(), dim=-1)
            per_token.append((dense.exp() * (dense - ours)).sum(-1))
        by_sequence = torch.cat(per_token).view(logits.shape[0], -1).double().mean(1)
        spread = float(by_sequence.std()) / max(1, len(by_sequence)) ** 0.5 if len(by_sequence) > 1 else 0.0
        return MeasuredLoss(float(by_sequence.mean()), spread)


def options_of(unit: UnitPlan, options: MethodConfig) -> MethodConfig:
    """The options of the unit's own method, where a gate chose another."""
    return options if unit.method is None else options.model_copy(update={"name": unit.method})
