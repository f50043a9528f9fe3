"""Vocabulary: the embedding, the head, or the one matrix that is both, rounded to few bits."""

from typing import Literal

import torch
from pydantic import NonNegativeFloat, PositiveFloat, PositiveInt
from torch import Tensor, nn
from transformers import PreTrainedModel

from fasc.edits._registry import Edit, Layers, edit_kind
from fasc.edits.quantise import DAMPING, Bits
from fasc.edits.structure import empty_modules, fill, put_module, record
from fasc.errors import ModelError, StatisticsError
from fasc.forecast.vocabulary import End, feedback_at, measured_loss
from fasc.layouts.quantised import QuantisedEmbedding, QuantisedLinear, TiedHead, quantised_bytes
from fasc.linalg.rounding import rounded
from fasc.model.vocabulary import Vocabulary
from fasc.statistics.moments import Statistics


@edit_kind("vocabulary")
class VocabularyBits(Edit):
    """One matrix with a row for every token becomes codes."""

    edit: Literal["vocabulary"] = "vocabulary"
    end: End
    """``both`` where embedding and head are tied."""

    embedding: str
    head: str
    tokens: PositiveInt
    width: PositiveInt
    scale: PositiveFloat = 1.0
    """What the embedding multiplies its rows by."""

    bias: bool = False
    """Of the head."""

    bits: Bits
    group_size: PositiveInt = 64
    damping: NonNegativeFloat = DAMPING

    @staticmethod
    def of(vocabulary: Vocabulary, end: End, bits: int, group: int, loss: float | None = None) -> "VocabularyBits":
        """The edit that rounds one matrix of a vocabulary."""
        return VocabularyBits(
            end=end,
            embedding=vocabulary.embedding,
            head=vocabulary.head,
            tokens=vocabulary.tokens,
            width=vocabulary.width,
            scale=vocabulary.scale,
            bias=vocabulary.bias,
            bits=bits,
            group_size=group,
            predicted_loss=loss,
        )

    @property
    def touches(self) -> tuple[str, ...]:
        """Embedding, head, or both."""
        return {"embedding": (self.embedding,), "head": (self.head,), "both": (self.embedding, self.head)}[self.end]

    @property
    def saved(self) -> int:
        """None: there are as many weights as before."""
        return 0

    @property
    def saved_multiply_adds(self) -> int:
        """None."""
        return 0

    def saved_bytes(self, bytes_per_parameter: int) -> int:
        """Codes, scales and zeros in the place of the weights."""
        return self.tokens * self.width * bytes_per_parameter - self.new_bytes(bytes_per_parameter)

    def new_bytes(self, bytes_per_parameter: int) -> int:
        """Of codes, scales and zeros, and of one number for each module that holds them."""
        numbers = bytes_per_parameter if self.end == "head" else 2 * bytes_per_parameter
        return quantised_bytes(self.width, self.tokens, self.bits, self.group_size) + numbers

    def check(self, layers: Layers) -> Layers:
        """They are no layers of a block; that they are there is seen when the modules are built."""
        touched = [name for name in self.touches if name in layers and layers[name].block is not None]
        if touched:
            raise ModelError(f"vocabulary: `{touched[0]}` lies in a block", "the plan or checkpoint belongs to another model")
        return {name: layer for name, layer in layers.items() if name not in self.touches}

    def require(self, statistics: Statistics) -> None:
        """The moments at both ends."""
        found = statistics.vocabulary
        if found is None:
            raise StatisticsError("the statistics hold no moments of embedding and head", "collect again with --bits-vocabulary")
        if (len(found.frequency), len(found.gradient)) != (self.tokens, self.width):
            raise StatisticsError(
                f"the statistics are of {len(found.frequency):,} tokens of {len(found.gradient)} features, and the plan of "
                f"{self.tokens:,} of {self.width}",
                "run `fasc collect` on this model",
            )

    def apply(self, model: PreTrainedModel, statistics: Statistics) -> Statistics:
        """Round every row with error feedback in the metric of what reads it."""
        moments = statistics.vocabulary
        assert moments is not None  # noqa: S101 - `require` has seen to it
        with torch.no_grad():
            module = model.get_submodule(self.head if self.end == "head" else self.embedding)
            weight: Tensor = module.weight.detach()
            inputs = feedback_at(moments, self.end, self.damping)
            inputs = type(inputs)(*(part.to(weight.device) for part in (inputs.moment, inputs.order, inputs.factor)))
            result = rounded(weight.float(), inputs, self.bits, self.group_size)
            loss = measured_loss((weight.float() - result.dense()).cpu(), moments, self.end)
            state = QuantisedLinear.state_of(result)
            bias = getattr(model.get_submodule(self.head), "bias", None)
            self.build(model)
            fill(model, self._states(state, bias), f"vocabulary in {self.bits} bits")
            _untied(model)
            record(model, self.with_loss(loss if self.predicted_loss is None else self.predicted_loss))
        return statistics

    def _states(self, state: dict[str, Tensor], bias: Tensor | None) -> dict[str, dict[str, Tensor]]:
        own = {} if bias is None else {"bias": bias.detach()}
        if self.end == "head":
            return {self.head: state | own}
        like = {"weight": torch.zeros(1)} | {f"table.{key}": value for key, value in state.items()}
        return {self.embedding: like} | ({self.head: own} if self.end == "both" else {})

    def build(self, model: nn.Module) -> None:
        """Empty modules of codes.

        Raises:
            ModelError: embedding or head are not there, or of another shape.
        """
        for name in self.touches:
            self._check(model, name)
        if self.end != "head":
            with empty_modules():
                table = QuantisedEmbedding(self.tokens, self.width, self.bits, self.group_size, self.scale)
            head = model.get_submodule(self.head)
            put_module(model, self.embedding, table)
            if self.end == "both":
                with empty_modules():
                    tied = TiedHead(table, bias=self.bias)
                _put(model, self.head, tied, head)
        else:
            with empty_modules():
                linear = QuantisedLinear(self.width, self.tokens, self.bits, self.group_size, bias=self.bias)
            put_module(model, self.head, linear)

    def _check(self, model: nn.Module, name: str) -> None:
        there = dict(model.named_modules()).get(name)
        weight = getattr(there, "weight", None)
        kind = nn.Embedding if name == self.embedding else nn.Linear
        fits = isinstance(there, kind) and isinstance(weight, Tensor) and tuple(weight.shape) == (self.tokens, self.width)
        if not fits or (kind is nn.Linear and (getattr(there, "bias", None) is not None) != self.bias):
            raise ModelError(
                f"vocabulary: `{name}` is no plain matrix of {self.tokens:,}×{self.width}",
                "the plan or checkpoint belongs to another model",
            )


def _put(model: nn.Module, name: str, new: nn.Module, old: nn.Module) -> None:
    """A module without a matrix where one with a matrix was."""
    weight: Tensor = old.weight  # type: ignore[assignment]
    new.to(weight.dtype)
    if weight.device.type != "meta":
        new.to_empty(device=weight.device)
    new.requires_grad_(weight.requires_grad)
    new.train(old.training)
    parent, _, leaf = name.rpartition(".")
    setattr(model.get_submodule(parent), leaf, new)


def _untied(model: PreTrainedModel) -> None:
    """There is no weight left that transformers could tie; the head reads the embedding's codes itself."""
    for config in {id(one): one for one in (model.config, model.config.get_text_config())}.values():
        config.tie_word_embeddings = False
    model.all_tied_weights_keys = {}
