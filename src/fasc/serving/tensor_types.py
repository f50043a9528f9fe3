"""Which of ggml's types each matrix of a file gets: each where its bits cost least, in nats per token."""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import numpy as np
import torch
from gguf import GGMLQuantizationType
from torch import Tensor
from transformers import PreTrainedModel

from fasc.errors import BudgetError
from fasc.linalg.divergence import kl_divergence
from fasc.model.groups import Unit
from fasc.model.layers import Layer, weight_of
from fasc.model.scopes import evaluating
from fasc.planning.candidates import Alternative, Candidates
from fasc.planning.lagrangian import allocate_by_loss
from fasc.progress import progress
from fasc.serving.ggml import MENU, fits, rounded, row_bytes, unrounded
from fasc.statistics.moments import GroupStatistics, Statistics, as_float64

_TEXT = 16
"""Sequences of the calibration text on which the loss of a rounded embedding is measured."""

_UNMEASURED = GGMLQuantizationType.Q8_0
"""Of matrices whose loss is not known: nothing is lost there."""


@dataclass(frozen=True, slots=True)
class TensorTypes:
    """A type for each matrix, by its name in the model (``….weight``)."""

    kinds: Mapping[str, GGMLQuantizationType]
    """Where a block does not divide a width, the next larger type is meant whose block does."""

    importance: Mapping[str, Tensor] = field(default_factory=dict)
    """Mean square of each input, [d_in], where it was measured."""

    predicted_loss: float | None = None
    """½J of all rounding together, nats per token."""

    @property
    def most_used(self) -> GGMLQuantizationType:
        """By number of matrices."""
        return Counter(self.kinds.values()).most_common(1)[0][0]

    def of(self, name: str, width: int) -> GGMLQuantizationType:
        """The type of a matrix with rows of this width."""
        kind = self.kinds.get(name, _UNMEASURED)
        return kind if fits(kind, width) else next_larger(kind, width)


@dataclass(frozen=True, slots=True)
class _Option:
    kind: GGMLQuantizationType
    size: int
    loss: float


@dataclass(frozen=True, slots=True)
class _Measured:
    """A matrix with what each type costs."""

    name: str
    layer: Layer
    options: tuple[_Option, ...]
    """By size; a larger one loses less."""


def every_tensor_as(model: PreTrainedModel, kind: GGMLQuantizationType, statistics: Statistics | None = None) -> TensorTypes:
    """One type for all matrices; where its block does not divide a width, the next larger type whose block does."""
    widths = {name: tensor.shape[1] for name, tensor in model.state_dict().items() if tensor.dim() == 2}
    kinds = {name: kind if fits(kind, width) else next_larger(kind, width) for name, width in widths.items()}
    return TensorTypes(kinds, {} if statistics is None else dict(_importances(statistics)))


def next_larger(kind: GGMLQuantizationType, width: int) -> GGMLQuantizationType:
    """The smallest type of at least as many bits whose block divides the width."""
    able = [one for one in MENU if fits(one, width) and row_bytes(one, 256) >= row_bytes(kind, 256)]
    return min(able, key=lambda one: row_bytes(one, 256), default=_UNMEASURED)


@dataclass(frozen=True, slots=True)
class TypeLosses:
    """What every type costs every matrix of a model, in bytes and in nats: measured once, for every budget."""

    matrices: tuple[_Measured, ...]
    importance: Mapping[str, Tensor]
    rest: int
    """Bytes of the matrices whose type is not chosen."""

    @staticmethod
    def of(model: PreTrainedModel, statistics: Statistics) -> "TypeLosses":
        """Round every matrix to every type.

        The loss of a layer of the blocks is ``½ Σ_o E[h_o²] e_oᵀ E[x xᵀ] e_o`` for the error ``e_o`` of each row that the type
        really makes (docs/method.md). That of the embedding and of the head is measured: the divergence on calibration text with
        nothing else rounded.

        Raises:
            BudgetError: no type fits any matrix.
            StatisticsError: the statistics lack the scale of the outputs.
            UsageError: llama-cpp-python is not installed.
        """
        matrices = tuple(one for one in (*_of_blocks(model, statistics), *_of_ends(model, statistics)) if one.options)
        if not matrices:
            raise BudgetError("no matrix has rows of whole blocks of 32 weights", "export it without --type and --max-bytes")
        known = {one.name for one in matrices}
        rest = sum(_bytes_of_other(tensor) for _, tensor in _others(model, known))
        return TypeLosses(matrices, dict(_importances(statistics)), rest)

    def choose(self, *, max_bytes: float | None = None, max_kl: float | None = None) -> TensorTypes:
        """The types that lose least within a number of bytes, or the fewest bytes that lose no more than a number of nats.

        Args:
            max_bytes: of all matrices together.
            max_kl: nats per token.

        Raises:
            BudgetError: the smallest types are too large, or lose too much.
        """
        limit = max_kl if max_bytes is None else max_bytes - self.rest
        if limit is None or limit <= 0:
            raise BudgetError(f"{self.rest / 1e6:,.1f} MB are not chosen and exceed the budget", "ask for more")
        groups = [[Alternative((_candidates(one),))] for one in self.matrices]
        made = allocate_by_loss(groups, limit, limited="loss" if max_bytes is None else "cost")
        chosen = [one.options[options[0]] for one, (_, options) in zip(self.matrices, made.picks, strict=True)]
        kinds = {one.name: option.kind for one, option in zip(self.matrices, chosen, strict=True)}
        return TensorTypes(kinds, self.importance, sum(option.loss for option in chosen))


def _bytes_of_other(tensor: Tensor) -> int:
    """Of a matrix whose type is not chosen; one whose rows are no whole blocks keeps its precision."""
    if fits(_UNMEASURED, tensor.shape[1]):
        return tensor.shape[0] * row_bytes(_UNMEASURED, tensor.shape[1])
    return tensor.numel() * tensor.element_size()


def _others(model: PreTrainedModel, known: set[str]) -> Iterator[tuple[str, Tensor]]:
    tied = set(getattr(model, "all_tied_weights_keys", None) or ()) if model.config.tie_word_embeddings else set()
    for name, tensor in model.state_dict().items():
        if tensor.dim() == 2 and name not in known and name not in tied:
            yield name, tensor


def _candidates(one: _Measured) -> Candidates:
    """In the form that the allocation takes."""
    return Candidates(
        Unit(one.name, (one.layer,)),
        np.zeros(len(one.options), dtype=np.int64),
        (),
        np.array([option.size for option in one.options], dtype=np.float64),
        np.array([option.loss for option in one.options]),
        whole=float(one.options[-1].size),
    )


def _importances(statistics: Statistics) -> Iterator[tuple[str, Tensor]]:
    for group in statistics.groups.values():
        mean, covariance = as_float64(group.input)
        for layer in group.group.layers:
            yield f"{layer.name}.weight", covariance.diagonal() + mean.square()


def _of_blocks(model: PreTrainedModel, statistics: Statistics) -> Iterator[_Measured]:
    """The layers that the statistics know."""
    groups = statistics.groups.values()
    with progress("rounding every layer to every type", sum(len(one.group.layers) for one in groups), "layers") as advance:
        for group in groups:
            mean, covariance = as_float64(group.input)
            second = (covariance + torch.outer(mean, mean)).float()
            for layer in group.group.layers:
                weight = weight_of(model, layer).detach().float().cpu()
                felt = _felt(group, layer)
                yield _Measured(f"{layer.name}.weight", layer, _layer_options(weight, second.cpu(), felt.cpu()))
                advance()


def _felt(group: GroupStatistics, layer: Layer) -> Tensor:
    """``π E[h_o²]``: what the loss of a whole text feels of each output."""
    unit = group.unit(layer.name)
    return unit.share * unit.require_extra("output_scale").float()


def _layer_options(weight: Tensor, second: Tensor, felt: Tensor) -> tuple[_Option, ...]:
    options = []
    for kind in MENU:
        if fits(kind, weight.shape[1]):
            data = rounded(weight, kind, second.diagonal())
            error = unrounded(data, kind) - weight
            loss = float((((error @ second) * error).sum(1).double() * felt.double()).sum() / 2)
            options.append(_Option(kind, data.nbytes, max(loss, 0.0)))
    return _useful(options)


def _useful(options: Sequence[_Option]) -> tuple[_Option, ...]:
    """By size, without those that lose more than a smaller one."""
    kept: list[_Option] = []
    for one in sorted(options, key=lambda option: (option.size, option.loss)):
        if not kept or one.loss < kept[-1].loss:
            kept.append(one)
    return tuple(kept)


def _of_ends(model: PreTrainedModel, statistics: Statistics) -> Iterator[_Measured]:
    """The embedding and the head, or the one matrix that is both; nothing where the calibration text is not at hand."""
    if statistics.text is None:
        return
    tokens = statistics.text[:_TEXT].to(model.device)
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    ends = {id(one.weight): one for one in (head, embedding) if one is not None}  # one of a tied pair: the embedding
    names = {id(module): name for name, module in model.named_modules()}
    with evaluating(model), torch.no_grad(), progress("rounding the embedding to every type", len(ends), "matrices") as advance:
        dense = [model(input_ids=row[None], use_cache=False).logits[0] for row in tokens]
        for module in ends.values():
            options = []
            weight = module.weight.detach().float().cpu()
            for kind in (one for one in MENU if fits(one, weight.shape[1])):
                data = rounded(weight, kind)
                with _replaced(module.weight, unrounded(data, kind)):
                    losses = [
                        kl_divergence(model(input_ids=row[None], use_cache=False).logits[0], reference).double().mean()
                        for row, reference in zip(tokens, dense, strict=True)
                    ]
                options.append(_Option(kind, data.nbytes, float(torch.stack(losses).mean())))
            name = names[id(module)]
            yield _Measured(f"{name}.weight", Layer(name, weight.shape[1], weight.shape[0], bias=False), _useful(options))
            advance()


@contextmanager
def _replaced(parameter: Tensor, values: Tensor) -> Iterator[None]:
    """Other values for a while."""
    before = parameter.detach().clone()
    parameter.copy_(values)
    try:
        yield
    finally:
        parameter.copy_(before)
