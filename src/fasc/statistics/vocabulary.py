"""What rounding the embedding and the head needs: how often each token is read and said, and in which directions that matters."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, fields

import torch
from jaxtyping import Float
from torch import Tensor, nn
from transformers import PreTrainedModel

from fasc.model.vocabulary import Vocabulary, find_vocabulary
from fasc.processes import Processes
from fasc.statistics.accumulators import SymmetricSum, VectorSum, Weights, merged_mean
from fasc.statistics.capture import Batch
from fasc.statistics.unit import Need

VOCABULARY = Need("vocabulary", "group")
"""Asks for :class:`VocabularyMoments`."""


@dataclass(frozen=True, slots=True)
class VocabularyMoments:
    """Moments at both ends of a model, means over tokens, not centred, float32."""

    frequency: Float[Tensor, " v"]
    """Share of each token among those that were read."""

    gradient: Float[Tensor, "d d"]
    """``E[g gᵀ]`` of the loss by a row of the embedding, nats²."""

    input: Float[Tensor, "d d"]
    """``E[x xᵀ]`` of what the head reads."""

    scale: Float[Tensor, " v"]
    """``E[h_o²]`` of the loss by each logit, nats²."""

    def merge(self, other: "VocabularyMoments", weights: Weights) -> "VocabularyMoments":
        """The moments over both parts of a text."""
        return VocabularyMoments(
            *(merged_mean(getattr(self, one.name), getattr(other, one.name), weights) for one in fields(self))
        )

    def tensors(self) -> dict[str, Tensor]:
        """By name, for a file."""
        return {one.name: getattr(self, one.name) for one in fields(self)}


class VocabularyCapture:
    """Sums that are fed by hooks at the embedding and at the head."""

    def __init__(self, found: Vocabulary, device: torch.device) -> None:
        self._names, self._factor = (found.embedding, found.head), found.scale
        self._width = found.width
        self._frequency = torch.zeros(found.tokens, dtype=torch.float64, device=device)
        self._gradient, self._input = SymmetricSum(found.width, device), SymmetricSum(found.width, device)
        self._scale = VectorSum(found.tokens, device)
        self._tokens = 0
        self._mask: Tensor | None = None
        self.listening = False
        """True in the forward pass only."""
        self.usable = True
        """Whether the head reads one vector for each token; ProphetNet's reads several."""

    @classmethod
    def of(cls, model: PreTrainedModel) -> "VocabularyCapture | None":
        """Of a model whose embedding and head are plain matrices."""
        found = find_vocabulary(model)
        return None if found is None else cls(found, model.device)

    def begin_batch(self, batch: Batch) -> None:
        """Get ready for a batch."""
        self._mask = None if batch.mask is None else batch.mask.bool()

    @property
    def wants_gradients(self) -> bool:
        """Always."""
        return True

    def finish_call(self) -> None:
        """Nothing waits."""

    @contextmanager
    def hooks(self, model: nn.Module, *, table: bool = True, head: bool = True) -> Iterator[None]:
        """Listen at one end or at both while the context is open; only our own hooks are removed."""
        with ExitStack() as stack:
            for name, hook, wanted in zip(self._names, (self._on_table, self._on_head), (table, head), strict=True):
                if wanted:
                    stack.callback(model.get_submodule(name).register_forward_hook(hook).remove)
            yield

    def _rows(self, tensor: Tensor) -> Tensor:
        return tensor.flatten(0, 1) if self._mask is None else tensor[self._mask]

    def _on_table(self, _module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
        if not self.listening:
            return
        read = self._rows(args[0])
        self._tokens += len(read)
        self._frequency += torch.bincount(read.flatten(), minlength=len(self._frequency))
        if output.requires_grad:
            output.register_hook(lambda gradient: self._gradient.add(self._factor * self._rows(gradient).float()))

    def _on_head(self, _module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
        if not self.listening:
            return
        if args[0].dim() != 3:
            self.usable = False
            return
        self._input.add(self._rows(args[0].detach()).float())
        if output.requires_grad:
            output.register_hook(lambda gradient: self._scale.add(self._rows(gradient).float().square()))

    def reduce(self, processes: Processes) -> None:
        """Add what other processes gave, at the first of them."""
        if processes.count == 1:
            return
        self._tokens = int(processes.to_first(torch.tensor(self._tokens)))
        self._frequency = processes.to_first(self._frequency)
        for total in (self._gradient, self._input, self._scale):
            total.reduce(processes)

    def publish(self) -> VocabularyMoments:
        """Means over the tokens that were read."""
        zero = torch.zeros(self._width, dtype=torch.float64, device=self._frequency.device)
        return VocabularyMoments(
            (self._frequency / self._tokens).float().cpu(),
            self._gradient.covariance(zero, self._tokens).float().cpu(),
            self._input.covariance(zero, self._tokens).float().cpu(),
            self._scale.mean(self._tokens).float().cpu(),
        )
