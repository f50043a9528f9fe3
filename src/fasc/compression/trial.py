"""What some edits alone really cost: the KL divergence to the dense model on held-out text."""

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import PreTrainedModel

from fasc.edits import Edit
from fasc.edits.structure import structure_kept
from fasc.errors import NonFiniteError
from fasc.linalg.divergence import kl_divergence
from fasc.model.blocks import block_names
from fasc.model.scopes import evaluating, restored
from fasc.model.tail import TailRunner
from fasc.statistics.moments import Statistics


@dataclass(frozen=True, slots=True)
class MeasuredLoss:
    """Means over tokens, nats per token."""

    nats: float
    """KL(dense ‖ compressed)."""

    error: float
    """Its standard error over sequences."""

    nll_increase: float
    """Loss on the text's own next tokens, above the dense model's: the logarithm of the ratio of perplexities."""


class Trial:
    """Measures edits; the model is dense between two measurements.

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
        self._dense = self._runner.logits
        self._dense_nll = self._nll(self._dense)

    def measure(
        self, edits: Sequence[Edit], make: Callable[[], None] | None = None, look: Callable[[], None] | None = None
    ) -> MeasuredLoss:
        """What these edits cost, everything else dense.

        Args:
            edits: in order.
            make: makes them; by default each is applied to what the one before it left.
            look: called while they stand.

        Raises:
            NonFiniteError: the edited model's logits are not finite.
        """
        layers = sorted({name for edit in edits for name in edit.places})
        with ExitStack() as stack:
            stack.enter_context(structure_kept(self._model))
            stack.enter_context(restored(self._model, layers))
            stack.enter_context(evaluating(self._model))
            stack.enter_context(torch.no_grad())
            (make or (lambda: self._apply(edits)))()
            first = [name for name in self._blocks if any(layer.startswith(f"{name}.") for layer in layers)]
            logits = self._runner.logits_from(first[0] if first else None)
            if look is not None:
                look()
        if not bool(torch.isfinite(logits).all()):
            raise NonFiniteError(f"the logits with `{layers[0]}` compressed", "raise --damping")
        by_sequence = kl_divergence(logits.flatten(0, 1), self._dense.flatten(0, 1)).view(len(logits), -1).double().mean(1)
        spread = float(by_sequence.std()) / len(by_sequence) ** 0.5 if len(by_sequence) > 1 else 0.0
        return MeasuredLoss(float(by_sequence.mean()), spread, self._nll(logits) - self._dense_nll)

    def _apply(self, edits: Sequence[Edit]) -> None:
        statistics = self._statistics
        for edit in edits:
            statistics = edit.apply(self._model, statistics)

    def _nll(self, logits: Tensor) -> float:
        """Mean loss on the text's own next tokens, one sequence at a time."""
        losses = [F.cross_entropy(row[:-1].float(), ids[1:]).item() for row, ids in zip(logits, self._tokens, strict=True)]
        return sum(losses) / len(losses)
