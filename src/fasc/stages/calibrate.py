"""Text → statistics."""

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from fasc.edits.structure import structure_of
from fasc.errors import ModelError, UsageError
from fasc.model.experts import expert_layers
from fasc.model.load import LoadedModel, model_fingerprint
from fasc.model.options import LayersConfig
from fasc.model.precision import working_precision
from fasc.planning.needs import needs_for
from fasc.planning.options import MethodConfig
from fasc.stages.keywords import Corpus, Names, corpus_in, names_in, refuse_rest, take
from fasc.statistics.collect import collect_moments
from fasc.statistics.moments import Need, Statistics
from fasc.statistics.options import CalibrationConfig
from fasc.text.corpus import TextRequest, TokenBlock, load_corpus


def collect(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | None = None,
    corpus: Corpus | Tensor = "self",
    *,
    methods: Names = "fasc",
    needs: frozenset[Need] | None = None,
    **options: Any,
) -> Statistics:
    """Measure everything that methods and any budget need, on text. Nothing is kept per token; the model comes out as it went in.

    Args:
        model: a dense causal language model of transformers.
        tokenizer: its own; not needed where ``corpus`` is tokens.
        corpus: ``self`` (text sampled from the model), a named corpus, a path, a hub data set, several of these, or tokens
            [sequences, length] int64.
        methods: whose moments to measure.
        needs: the moments, instead of those of the methods.
        **options: fields of ``CalibrationConfig`` (``sequences=``, ``labels=``, …) and of ``LayersConfig`` (``include=``, …).

    Raises:
        UsageError: an unknown option, or no tokenizer.
        CorpusError: text that cannot be used.
        ModelError: no layer to compress.
        NonFiniteError: a loss or a moment is NaN or infinite; names the batch or the layer.
    """
    layers = take(LayersConfig, options)
    calibration = take(CalibrationConfig, options, corpus=None if isinstance(corpus, Tensor) else corpus_in(corpus))
    refuse_rest(options, CalibrationConfig, LayersConfig)
    if needs is None:
        needs = frozenset().union(*(needs_for(MethodConfig(name=name), None) for name in names_in(methods)))
    require_dense(model)
    if isinstance(corpus, Tensor):
        with expert_layers(model):
            return collect_moments(model, corpus, needs, calibration=calibration, layers=layers)
    if tokenizer is None:
        raise UsageError("there is no tokenizer to read the corpus with", "pass the model's tokenizer, or tokens as `corpus`")
    return calibrate(LoadedModel(model, tokenizer), needs, calibration, layers)


def calibrate(loaded: LoadedModel, needs: frozenset[Need], calibration: CalibrationConfig, layers: LayersConfig) -> Statistics:
    """Load the calibration text and measure the moments, every expert's by itself."""
    if calibration.skip and calibration.corpus == "self":
        raise UsageError("text sampled from the model has no order to skip in", "draw other text with another --seed")
    require_dense(loaded.model)
    fingerprint = model_fingerprint(loaded.model)
    with working_precision(loaded.model):
        block = _text(loaded, calibration, calibration.skip + calibration.sequences, calibration.seed)
        tokens = block.tokens[calibration.skip :]
        with expert_layers(loaded.model):
            statistics = collect_moments(loaded.model, tokens, needs, calibration=calibration, layers=layers)
    facts = {"model_fingerprint": fingerprint, "text_digest": block.text_digest}
    read = {"characters": block.characters, "whole": block.whole}
    return replace(statistics, meta={**statistics.meta, **facts, "read": read})


def require_dense(model: PreTrainedModel) -> None:
    """Refuse a model that is compressed or quantised already, before anything is measured.

    Raises:
        ModelError: says which.
    """
    if structure_of(model) is not None:
        raise ModelError("the model is compressed already", "give the dense model that it was made from")
    config = getattr(model.config, "quantization_config", None)
    if config is not None:
        raise ModelError(f"the model is quantised already ({type(config).__name__})", "give the unquantised model")


def held_out_tokens(loaded: LoadedModel, calibration: CalibrationConfig, sequences: int) -> Tensor:
    """More sequences of the calibration corpus, disjoint from those that calibrate.

    Args:
        loaded: model and tokenizer.
        calibration: of the run.
        sequences: how many.

    Returns:
        Tokens, [sequences, length].
    """
    own = calibration.corpus == "self"
    before = 0 if own else calibration.skip + calibration.sequences  # drawn after those, in the same order
    tokens: Tensor = _text(loaded, calibration, before + sequences, calibration.seed + own).tokens[before:]
    return tokens


def _text(loaded: LoadedModel, calibration: CalibrationConfig, sequences: int, seed: int) -> TokenBlock:
    request = TextRequest(
        corpus=calibration.corpus,
        sequences=sequences,
        sequence_length=calibration.sequence_length,
        seed=seed,
        role="calibration",
        data_dir=calibration.data_dir,
        chat_template=calibration.chat_template,
    )
    with torch.no_grad():
        return load_corpus(loaded.model, loaded.tokenizer, request)
