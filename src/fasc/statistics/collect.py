"""The loop: batches through the model, moments out, the model left as it was."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint, set_checkpoint_early_stop
from transformers import PreTrainedModel

from fasc.errors import CorpusError, ModelError, NonFiniteError
from fasc.model.blocks import block_names, stopping_after
from fasc.model.experts import hearing_all, unknown_experts
from fasc.model.groups import InputGroup, find_groups
from fasc.model.load import model_fingerprint
from fasc.model.offload import device_of, is_offloaded
from fasc.model.options import LayersConfig
from fasc.model.scopes import evaluating, forwarding, frozen
from fasc.processes import current
from fasc.progress import progress, say
from fasc.provenance import digest, provenance, versions
from fasc.statistics.capture import Batch, GroupCapture
from fasc.statistics.hooks import capturing
from fasc.statistics.moments import GroupStatistics, Need, Statistics, text_identity, without_gradient
from fasc.statistics.objective import label_seed, summed_nll
from fasc.statistics.options import CalibrationConfig, Labels
from fasc.statistics.passes import Pass
from fasc.statistics.pooling import pooled
from fasc.statistics.vocabulary import VOCABULARY, VocabularyCapture, VocabularyMoments
from fasc.text.limits import require_length, require_tokens

_LISTED = 8
"""Experts that a message names, at most."""


def collect_moments(
    model: PreTrainedModel,
    tokens: Tensor,
    needs: frozenset[Need],
    *,
    calibration: CalibrationConfig | None = None,
    layers: LayersConfig | None = None,
    mask: Tensor | None = None,
    only: Pass | None = None,
) -> Statistics:
    """Measure the moments that ``needs`` names, on every input group of the model.

    Moments are streamed. The backward pass runs only if a gradient moment is asked for, and computes gradients of
    activations only. The model comes out as it went in: hooks, ``requires_grad``, ``.grad``, training mode, random state.

    Inside :func:`fasc.processes.joined` each process reads its own batches, and the first one gets the moments; to the others
    no group is returned.

    Args:
        model: a dense causal language model.
        tokens: int64 [sequences, length].
        needs: the moments, e.g. the union of ``METHODS[name].needs`` over the methods to be used.
        calibration: labels, seed, batch size, checkpointing.
        layers: which layers.
        mask: 1 where there is text, [sequences, length]; padding is excluded from every moment.
        only: a pass over some of the groups; sums are kept for these, and the backward pass ends below the first of them.

    Raises:
        CorpusError: no tokens, or some that the model cannot read.
        UsageError: more processes than sequences, or processes that were given different things.
        ModelError: no layer to compress.
        NonFiniteError: a loss or a moment is NaN or infinite; names the batch or the layer.
    """
    calibration = calibration or CalibrationConfig()
    groups = _chosen(find_groups(model, layers or LayersConfig()), only)
    start = None if only is None else only.start
    ends = VocabularyCapture.of(model) if VOCABULARY in needs and start is None else None
    work = prepared(model, tokens, mask, needs, calibration, groups)
    captures = [GroupCapture(group, needs, device_of_group(model, group)) for group in groups]
    beginning = starting_at_embedding(model) if start is None else starting_before(model.get_submodule(start))
    with capturing(model, captures), evaluating(model), frozen(model), beginning, ExitStack() as stack:
        if ends is not None:
            stack.enter_context(ends.hooks(model))
        if calibration.route_all:
            stack.enter_context(hearing_all(model))
        away = is_offloaded(model)
        if calibration.gradient_checkpointing or away:  # otherwise the backward pass holds all that was fetched
            for name in block_names(model, [group.layers[0].name for group in groups]):
                block = model.get_submodule(name)
                stack.enter_context(forwarding(block, _recomputing(block.forward, whole=away)))
        every: Sequence[Capture] = captures if ends is None else [*captures, ends]
        run = stack.enter_context(_as_far_as(model, groups, only))
        loss = _run(model, every, work, run)
    return put_together(groups, captures, ends, work, loss)


@dataclass(frozen=True)
class Work:
    """What is measured on what, by this process."""

    text: Tensor
    """int64 [sequences, length]."""

    mask: Tensor | None
    needs: frozenset[Need]
    calibration: CalibrationConfig
    fingerprint: str
    """Of the model."""

    own: Sequence[slice]
    """The sequences of each batch."""

    @property
    def amount(self) -> int:
        """Tokens that this process reads, padding included."""
        return sum(self.text[part].numel() for part in self.own)

    @property
    def read(self) -> int:
        """The same without padding."""
        return sum(self.text[part].numel() if self.mask is None else int(self.mask[part].sum()) for part in self.own)


def prepared(
    model: PreTrainedModel,
    tokens: Tensor,
    mask: Tensor | None,
    needs: frozenset[Need],
    calibration: CalibrationConfig,
    groups: Sequence[InputGroup],
) -> Work:
    """See that text and model can be measured, and that all processes measure the same.

    Raises:
        CorpusError: no tokens, or some that the model cannot read.
        UsageError: more processes than sequences, or processes that were given different things.
    """
    _require_text(model, tokens, mask)
    for name, count in unknown_experts(model).items():
        say(f"experts of {name} run by code of their own and stay dense: {count:,} of {model.num_parameters():,} parameters")
    fingerprint = model_fingerprint(model)
    if current().count > 1:
        same = {"model": fingerprint, "device": model.device.type, "text": text_identity(tokens)}
        same |= {"mask": "none" if mask is None else text_identity(mask), "moments": repr(sorted(needs))}
        same |= {"layers": digest(group.name.encode() for group in groups)}
        same |= {name: str(value) for name, value in calibration.model_dump(exclude={"corpus", "data_dir"}).items()}
        current().require_same(versions() | same)
    rows = max(1, calibration.batch_tokens // tokens.shape[1])
    return Work(tokens, mask, needs, calibration, fingerprint, current().batches(len(tokens), rows))


def batches_of(work: Work, device: torch.device) -> Iterator[tuple[slice, Tensor, Batch]]:
    """This process's own, one after the other: which sequences, their tokens, their shape and mask."""
    for chosen in work.own:
        part = None if work.mask is None else work.mask[chosen].to(device)
        batch = work.text[chosen].to(device)
        yield chosen, batch, Batch.of(batch, part)


def precision_of(work: Work, device: torch.device) -> AbstractContextManager[Any]:
    """In which the model multiplies."""
    return torch.autocast(device.type, dtype=torch.bfloat16) if work.calibration.mixed_precision else nullcontext()


class Loss:
    """The summed loss of a text, nats, batch after batch."""

    def __init__(self) -> None:
        self._total, self._scored = 0.0, 0
        self._everywhere: tuple[float | None, int] | None = None

    def of(self, logits: Tensor, tokens: Tensor, mask: Tensor | None, calibration: CalibrationConfig, chosen: slice) -> Tensor:
        """That of one batch, a scalar; it is added to the sum.

        Raises:
            NonFiniteError: it is NaN or infinite; names the sequences.
        """
        seeds = [label_seed(calibration.seed, calibration.skip + one) for one in range(chosen.start, chosen.stop)]
        loss = summed_nll(logits, tokens, mask, calibration.labels, seeds)
        self._total += float(loss.detach())
        self._scored += _scored(tokens, mask, calibration.labels)
        if not bool(torch.isfinite(loss)):
            raise NonFiniteError(
                f"the loss of calibration sequences {chosen.start}-{chosen.stop - 1}",
                "load the model as --dtype float32, or check the text for degenerate sequences",
            )
        return loss

    def everywhere(self) -> tuple[float | None, int]:
        """Mean over the scored tokens of all processes, if any were, and how many; asked for once, by all of them."""
        if self._everywhere is None:
            total, scored = current().to_first(torch.tensor([self._total, self._scored], dtype=torch.float64)).tolist()
            self._everywhere = (total / scored if scored else None), int(scored)
        return self._everywhere


def put_together(
    groups: Sequence[InputGroup],
    captures: list[GroupCapture],
    ends: VocabularyCapture | None,
    work: Work,
    loss: Loss,
) -> Statistics:
    """The moments of all processes, at the first of them; empties ``captures``."""
    calibration = work.calibration
    nll, scored = loss.everywhere()
    read = current().gathered(torch.tensor([work.read])).tolist()
    published, few = pooled(_published(captures), groups, calibration.expert_floor)
    _say_experts(groups, published, few, calibration.expert_floor)
    constant = without_gradient(published.values())
    if constant:
        say(f"the loss does not depend on {len(constant)} layers, the first is `{constant[0]}`: they have no gradient moments")
    vocabulary = _vocabulary(ends)
    meta = {
        "model_fingerprint": work.fingerprint,
        "token_digest": text_identity(work.text),
        "labels": calibration.labels,
        "nll": nll,
        "scored_tokens": scored,
        "needs": sorted([need.moment, need.scope] for need in work.needs - (frozenset() if vocabulary else {VOCABULARY})),
        "groups": [group.name for group in groups],
        "processes": len(read),
        "tokens_by_process": read,
        "without_gradient": constant,
        "pooled": few,
        "calibration": calibration.model_dump(mode="json", exclude_none=True),
        "provenance": provenance(),
    }
    return Statistics(published, meta, work.text.cpu() if work.mask is None else None, vocabulary)


@contextmanager
def _as_far_as(
    model: PreTrainedModel, groups: Sequence[InputGroup], only: Pass | None
) -> Iterator[Callable[[Callable[[], Any]], Any]]:
    """How a forward pass without gradients is run: to its end, or in a pass over some of the blocks to the last of these."""
    if only is None:
        yield lambda forward: forward()
        return
    blocks = block_names(model, [name for name, _ in model.named_modules()])
    with stopping_after(model, blocks, block_names(model, [group.layers[0].name for group in groups])) as run:
        yield run


def device_of_group(model: PreTrainedModel, group: InputGroup) -> torch.device:
    """Where the sums of a group lie: where its layers work."""
    return device_of(model.get_submodule(group.layers[0].name), model.device)


def _chosen(groups: list[InputGroup], only: Pass | None) -> list[InputGroup]:
    return groups if only is None else [group for group in groups if group.name in only.groups]


def _vocabulary(ends: VocabularyCapture | None) -> VocabularyMoments | None:
    if ends is None or not ends.usable:
        return None
    ends.reduce(current())
    return ends.publish() if current().first else None


def _require_text(model: PreTrainedModel, tokens: Tensor, mask: Tensor | None) -> None:
    if tokens.numel() == 0 or (mask is not None and not bool(mask.any())):
        raise CorpusError("there are no calibration tokens", "give more text or raise --sequences")
    require_tokens(model, tokens)
    require_length(model, tokens.shape[1])


class Capture(Protocol):
    """What listens during a pass."""

    listening: bool

    @property
    def wants_gradients(self) -> bool:
        """Whether a backward pass is needed."""

    def begin_batch(self, batch: Batch) -> None:
        """Get ready for a batch."""

    def finish_call(self) -> None:
        """After the backward pass."""


def _published(captures: list[GroupCapture]) -> dict[str, GroupStatistics]:
    """The moments of every group that got a token, at the first process; each group's sums are freed as its moments are made."""
    published: dict[str, GroupStatistics] = {}
    while captures:
        capture = captures.pop(0)
        capture.reduce(current())
        if not current().first:
            continue
        if capture.tokens:
            published[capture.group.name] = capture.publish()
        del capture
    return published


def _say_experts(
    groups: Sequence[InputGroup],
    published: Mapping[str, GroupStatistics],
    few: Mapping[str, int],
    floor: int,
) -> None:
    """Name groups without moments, and experts whose moments are in part those of their block."""
    idle = [group.name for group in groups if group.name not in published]
    if idle:
        say(f"{len(idle)} groups got no token and have no moments, the first is `{idle[0]}`: give more text, or --expert-floor")
    experts = {name.rpartition(".")[0]: tokens for name, tokens in few.items()}
    if experts:
        listed = ", ".join(f"{name} ({tokens:,})" for name, tokens in list(experts.items())[:_LISTED])
        rest = f" and {len(experts) - _LISTED} more" if len(experts) > _LISTED else ""
        say(f"{len(experts)} experts got fewer than {floor:,} tokens and are pooled with their block: {listed}{rest}")


def _run(model: PreTrainedModel, captures: Sequence[Capture], work: Work, run: Callable[[Callable[[], Any]], Any]) -> Loss:
    """Feed the captures with this process's batches.

    Args:
        model: as it is measured.
        captures: what listens.
        work: the text, and which of it is this process's.
        run: calls a forward pass that no backward pass follows.
    """
    loss, back = Loss(), any(capture.wants_gradients for capture in captures)
    with progress("measuring moments", work.amount, "tokens") as advance, torch.set_grad_enabled(back):
        for chosen, batch, shape in batches_of(work, model.device):
            with listening(captures, shape), precision_of(work, model.device):
                forward = partial(model, input_ids=batch, attention_mask=shape.mask, use_cache=False)
                logits = forward().logits if back else run(forward)
            if back:
                of_batch = loss.of(logits, batch, shape.mask, work.calibration, chosen)
                del logits  # the largest tensor of the pass, and the backward pass does not need it
                backward(model, of_batch)
                for capture in captures:
                    capture.finish_call()
            advance(batch.numel())
    return loss


def backward(model: PreTrainedModel, loss: Tensor) -> None:
    """The gradients, or a line for a model whose own code refuses to make any in evaluation.

    Raises:
        ModelError: it does.
    """
    try:
        loss.backward()
    except (AssertionError, NotImplementedError) as problem:
        raise ModelError(
            f"{type(model).__name__} makes no gradients in evaluation: {' '.join(str(problem).split())[:200]}",
            "use a method that needs none: --methods svd, whitened",
        ) from problem


def _scored(batch: Tensor, mask: Tensor | None, labels: Labels) -> int:
    """How many tokens the loss of a batch sums over."""
    text = torch.ones_like(batch) if mask is None else mask
    return int(text.sum()) if labels == "sampled" else int((text[:, 1:] * text[:, :-1]).sum())


@contextmanager
def listening(captures: Sequence[Capture], batch: Batch) -> Iterator[None]:
    """Captures listen while a batch goes forward."""
    for capture in captures:
        capture.begin_batch(batch)
        capture.listening = True
    try:
        yield
    finally:
        for capture in captures:
            capture.listening = False


def _required(hidden: Tensor) -> Tensor:
    # Not the leaf itself: a model may scale its embeddings in place (CTRL).
    return hidden.requires_grad_().clone() if torch.is_grad_enabled() else hidden


@contextmanager
def starting_at_embedding(model: PreTrainedModel) -> Iterator[None]:
    """Gradients of activations start at the embedding."""

    def after(_module: nn.Module, _args: tuple[Any, ...], output: Tensor) -> Tensor:
        return _required(output)

    handle = model.get_input_embeddings().register_forward_hook(after)
    try:
        yield
    finally:
        handle.remove()


@contextmanager
def starting_before(block: nn.Module) -> Iterator[None]:
    """Gradients of activations start at what a block reads."""

    def before(_module: nn.Module, args: tuple[Any, ...], given: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        if args:
            return (_required(args[0]), *args[1:]), given
        return args, given | {"hidden_states": _required(given["hidden_states"])}

    handle = block.register_forward_pre_hook(before, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()


def _recomputing(forward: Any, *, whole: bool) -> Any:
    """A forward that is done again in the backward pass.

    Args:
        forward: of a block.
        whole: to its end, where an offloaded layer is sent away again, and not only as far as the gradients need it.
    """

    def wrapped(*args: Any, **kwargs: Any) -> Any:
        with set_checkpoint_early_stop(not whole):
            return checkpoint(forward, *args, use_reentrant=False, **kwargs)

    return wrapped
