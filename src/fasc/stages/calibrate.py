"""Text → statistics."""

import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from fasc.edits.structure import require_uncompressed
from fasc.errors import ModelError, StatisticsError, UsageError
from fasc.model.experts import expert_layers
from fasc.model.groups import find_groups
from fasc.model.load import LoadedModel, model_fingerprint
from fasc.model.options import LayersConfig
from fasc.model.precision import working_precision
from fasc.planning.needs import needs_for
from fasc.planning.options import MethodConfig
from fasc.processes import current
from fasc.progress import say
from fasc.provenance import versions
from fasc.stages.keywords import Corpus, Names, corpus_in, names_in, refuse_rest, take
from fasc.statistics.collect import collect_moments
from fasc.statistics.file import read_statistics
from fasc.statistics.moments import Need, Statistics, text_identity
from fasc.statistics.options import CalibrationConfig
from fasc.statistics.passes import plan_passes
from fasc.statistics.replay import blocks_of, replay_moments
from fasc.statistics.shards import PASS, run_of, shard_name, write_index
from fasc.storage import new_folder, work_folder
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
    with _ready(loaded, calibration) as (tokens, facts):
        statistics = collect_moments(loaded.model, tokens, needs, calibration=calibration, layers=layers)
    return replace(statistics, meta={**statistics.meta, **facts})


@contextmanager
def _ready(loaded: LoadedModel, calibration: CalibrationConfig) -> Iterator[tuple[Tensor, dict[str, Any]]]:
    """The calibration text, what to note of it and of the model, and the model as it is measured."""
    if calibration.skip and calibration.corpus == "self":
        raise UsageError("text sampled from the model has no order to skip in", "draw other text with another --seed")
    require_dense(loaded.model)
    fingerprint = model_fingerprint(loaded.model)
    with working_precision(loaded.model):
        block = _text(loaded, calibration, calibration.skip + calibration.sequences, calibration.seed)
        facts = {"model_fingerprint": fingerprint, "text_digest": block.text_digest}
        read = {"characters": block.characters, "whole": block.whole}
        with expert_layers(loaded.model):
            yield block.tokens[calibration.skip :], {**facts, "read": read}


def calibrate_in_passes(
    loaded: LoadedModel,
    needs: frozenset[Need],
    calibration: CalibrationConfig,
    layers: LayersConfig,
    *,
    limit: int,
    out: Path,
    overwrite: bool = False,
) -> int:
    """Measure moments that do not fit into memory together, a range of blocks in each pass, into a folder of shards.

    A call that was killed goes on with the next range: finished shards lie in a hidden folder beside ``out`` meanwhile. Inside
    :func:`fasc.processes.joined` each process reads its share in every pass, and the first one writes.

    Args:
        loaded: the dense model and its tokenizer.
        needs: the moments.
        calibration: the text.
        layers: which.
        limit: bytes of memory, those of the program and of the model included.
        out: the folder; a path that :func:`fasc.outputs.output` has seen.
        overwrite: replace statistics that are there.

    Returns:
        How many passes it took.

    Raises:
        UsageError: the limit does not hold one block; nothing has been measured then.
    """
    with _ready(loaded, calibration) as (tokens, facts):
        passes = plan_passes(loaded.model, find_groups(loaded.model, layers), needs, calibration, limit)
        what = _identity(tokens, needs, calibration, facts)
        with _shards(out, what, [one.groups for one in passes], facts, overwrite=overwrite) as shards:
            for number, one in enumerate(passes):
                if number in shards.finished:
                    continue
                say(f"pass {number + 1} of {len(passes)}: {len(one.groups)} groups, {one.bytes / 1e9:,.2f} GB of sums")
                shards.keep(
                    number, collect_moments(loaded.model, tokens, needs, calibration=calibration, layers=layers, only=one)
                )
    return len(passes)


def calibrate_by_block(
    loaded: LoadedModel,
    needs: frozenset[Need],
    calibration: CalibrationConfig,
    layers: LayersConfig,
    *,
    out: Path,
    overwrite: bool = False,
) -> int:
    """The same one block at a time, each run again on what it read: see :func:`fasc.statistics.replay.replay_moments`.

    Returns:
        How many blocks were measured.

    Raises:
        ModelError: the blocks hand on more than hidden states.
    """
    with _ready(loaded, calibration) as (tokens, facts):
        blocks = blocks_of(loaded.model, find_groups(loaded.model, layers))
        numbers = [number for number, (_, own) in enumerate(blocks) if own]
        groups = [[group.name for group in blocks[number][1]] for number in numbers]
        what = _identity(tokens, needs, calibration, facts)
        with _shards(out, what, groups, facts, overwrite=overwrite) as shards:
            finished = {numbers[place] for place in shards.finished}

            def take(number: int, part: Statistics) -> None:
                shards.keep(numbers.index(number), part)

            replay_moments(loaded.model, tokens, needs, take, calibration=calibration, layers=layers, finished=finished)
    return len(numbers)


def _identity(tokens: Tensor, needs: frozenset[Need], calibration: CalibrationConfig, facts: Mapping[str, Any]) -> dict[str, str]:
    """What is measured and how, for shards that an earlier call has left."""
    found = {key: str(value) for key, value in facts.items()} | {"tokens": text_identity(tokens), "needs": repr(sorted(needs))}
    found |= {"options": repr(sorted(calibration.model_dump(mode="json").items())), "versions": repr(sorted(versions().items()))}
    return found


@dataclass
class _Shards:
    """Files of moments that belong together."""

    work: Path
    names: list[str]
    run: str
    facts: Mapping[str, Any]
    finished: frozenset[int]
    """Numbers of those that an earlier call of the same has left."""

    def keep(self, number: int, part: Statistics) -> None:
        """Write one; only the first process does."""
        if current().first:
            noted = {**part.meta, **self.facts, PASS: {"run": self.run, "number": number, "of": len(self.names)}}
            replace(part, meta=noted).save(self.work / self.names[number])


@contextmanager
def _shards(
    out: Path, what: Mapping[str, str], groups: Sequence[Sequence[str]], facts: Mapping[str, Any], *, overwrite: bool
) -> Iterator[_Shards]:
    """Where shards are kept until all are there; then they are put together."""
    run = run_of(what, groups)
    names = [shard_name(number, len(groups)) for number in range(len(groups))]
    with _work(out, run) as work:
        done = current().from_first(lambda: torch.tensor([[_is_of(work / name, run) for name in names]], dtype=torch.int64))
        yield _Shards(work, names, run, facts, frozenset(done[0].nonzero().flatten().tolist()))
        if current().first:
            _put_together(work, out, run, list(zip(names, groups, strict=True)), overwrite=overwrite)


def _work(out: Path, run: str) -> AbstractContextManager[Path]:
    """Where finished shards wait; only the first process has it."""
    return work_folder(out.with_name(f".{out.name}.work"), {"run": run}) if current().first else nullcontext(out)


def _is_of(shard: Path, run: str) -> bool:
    """Whether an earlier call of the same has finished this shard."""
    if not shard.is_file():
        return False
    with suppress(StatisticsError):
        return bool(read_statistics(shard)[1][PASS]["run"] == run)
    return False


def _put_together(work: Path, out: Path, run: str, shards: Sequence[tuple[str, Sequence[str]]], *, overwrite: bool) -> None:
    """A folder of all shards and their index; they stay in the work folder until it stands."""
    with new_folder(out, overwrite=overwrite) as scratch:
        for name, _ in shards:
            try:
                os.link(work / name, scratch / name)
            except OSError:  # a file system without links
                shutil.copy2(work / name, scratch / name)
        write_index(scratch, run, shards)


def require_dense(model: PreTrainedModel) -> None:
    """Refuse a model that is compressed or quantised already, before anything is measured.

    Raises:
        ModelError: says which.
    """
    require_uncompressed(model)
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
