"""Moments block by block: for a device that holds one block of a deep model, and the sums of one block.

Forward once without gradients, keeping what every block reads in the host's memory; then the end of the model, for the gradient
of what the last block gives; then the blocks from the last to the first, each run again on what it read, with gradients. That is
one forward pass more than measuring all at once, however many blocks there are, and the moments are the same bit by bit.
"""

from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._pytree import tree_map_only
from transformers import PreTrainedModel

from fasc.errors import ModelError, NonFiniteError
from fasc.model.blocks import SAME, Arguments, block_names, call_block, leaving_after, returned, taken, taken_by
from fasc.model.experts import hearing_all
from fasc.model.groups import InputGroup, find_groups
from fasc.model.options import LayersConfig
from fasc.model.scopes import evaluating, forwarding, frozen
from fasc.progress import progress, say
from fasc.statistics.capture import GroupCapture
from fasc.statistics.collect import (
    Loss,
    Work,
    backward,
    batches_of,
    device_of_group,
    listening,
    precision_of,
    prepared,
    put_together,
    starting_at_embedding,
    starting_before,
)
from fasc.statistics.hooks import capturing
from fasc.statistics.moments import Need, Statistics
from fasc.statistics.options import CalibrationConfig
from fasc.statistics.vocabulary import VOCABULARY, VocabularyCapture

_INSTEAD = "use --max-memory, which needs all blocks at once and several passes over the text"


@dataclass
class _Visit:
    """What a block was called with for one batch, and how it gives its result."""

    hidden: Tensor
    """On the host."""

    rest: Arguments
    device: torch.device
    kind: type | None = None
    """Of the sequence that the block gives; none for hidden states alone."""

    more: int = 0
    """How many things it gives beside hidden states."""

    def result(self, hidden: Tensor) -> Any:
        """Hidden states as this block gives them, and nothing in the place of what it gives besides."""
        return hidden if self.kind is None else self.kind([hidden, *[None] * self.more])


@dataclass
class _Text:
    """All visits, by block and batch, and what the last block gave."""

    visits: list[list[_Visit]]
    ends: list[Tensor] = field(default_factory=list)
    """On the host."""

    logits: Tensor | None = None
    """Of the last token of the first batch's sequences."""


def blocks_of(model: PreTrainedModel, groups: Sequence[InputGroup]) -> list[tuple[str, list[InputGroup]]]:
    """Every block of a model with its groups, in order; blocks between them that have none are among them.

    Raises:
        ModelError: a group lies in no block, or the model's blocks are known to share more than hidden states.
    """
    config = model.config.get_text_config()
    if getattr(config, "num_kv_shared_layers", 0):
        raise ModelError(f"blocks of {type(model).__name__} read keys and values of other blocks", _INSTEAD)
    named = [(group, block_names(model, [group.layers[0].name])) for group in groups]
    outside = next((group.name for group, blocks in named if not blocks), None)
    if outside is not None:
        raise ModelError(f"`{outside}` lies in no block", "leave it out by --exclude, or use --max-memory")
    prefixes = {blocks[0].rpartition(".")[0] for _, blocks in named}
    if len(prefixes) > 1:
        raise ModelError(f"{type(model).__name__} has blocks in {len(prefixes)} places: {', '.join(sorted(prefixes))}", _INSTEAD)
    every = [
        name for name in block_names(model, [name for name, _ in model.named_modules()]) if name.rpartition(".")[0] in prefixes
    ]
    return [(block, [group for group, blocks in named if blocks[0] == block]) for block in every]


def replay_moments(  # noqa: C901 - one loop with its two ends, each left out where nothing needs it
    model: PreTrainedModel,
    tokens: Tensor,
    needs: frozenset[Need],
    take: Callable[[int, Statistics], None],
    *,
    calibration: CalibrationConfig,
    layers: LayersConfig | None = None,
    finished: Collection[int] = (),
) -> None:
    """Measure moments one block at a time, the last block first.

    Inside :func:`fasc.processes.joined` each process reads its own batches, and the first one gets the moments.

    Args:
        model: a dense causal language model whose blocks hand on hidden states and nothing else.
        tokens: int64 [sequences, length], without padding.
        needs: the moments.
        take: gets the number of a block that has groups and its moments, as soon as they are known.
        calibration: labels, seed, batch size.
        layers: which.
        finished: numbers of blocks whose moments are known; these are run again for their gradients alone, and only where a block
            below them is measured.

    Raises:
        ModelError: the blocks hand on something else, or are not called one after the other.
        CorpusError, UsageError, NonFiniteError: as :func:`~fasc.statistics.collect.collect_moments`.
    """
    groups = find_groups(model, layers or LayersConfig())
    blocks = blocks_of(model, groups)
    wanted = [number for number, (_, own) in enumerate(blocks) if own and number not in finished]
    if not wanted:
        return
    lowest = next(number for number, (_, own) in enumerate(blocks) if own)
    ends = VocabularyCapture.of(model) if VOCABULARY in needs and lowest in wanted else None
    work = prepared(model, tokens, None, needs, calibration, groups)
    modules = [model.get_submodule(name) for name, _ in blocks]
    with evaluating(model), frozen(model), ExitStack() as stack:
        if calibration.route_all:
            stack.enter_context(hearing_all(model))
        back = _wants_gradients(groups[0], needs) or ends is not None
        text = _forward(model, work, modules, gradients=back, embedding=ends is not None)
        loss, gradients = Loss(), list[Tensor | None]()
        if back:
            gradients = list(_tail(model, work, modules, text, ends, loss))
        waiting: list[GroupCapture] = []
        down_to = 0 if ends is not None else min(wanted)
        with progress("replaying", len(blocks) - down_to, "blocks") as advance:
            for number in reversed(range(down_to, len(blocks))):
                own = blocks[number][1] if number in wanted else []
                captures = [GroupCapture(group, needs, device_of_group(model, group)) for group in own]
                if gradients or captures:
                    with capturing(model, captures):
                        gradients = _replay(modules[number], text.visits[number], gradients, captures, work)
                if number == lowest and ends is not None:
                    waiting = captures  # until the embedding has been reached, whose moments lie beside these
                elif captures:
                    take(number, put_together(own, captures, None, work, loss))
                if number:
                    text.visits[number] = []
                advance()
        if ends is not None:
            _embedding(model, work, modules[0], gradients, ends)
            take(lowest, put_together(blocks[lowest][1], waiting, ends, work, loss))


def _wants_gradients(group: InputGroup, needs: frozenset[Need]) -> bool:
    return GroupCapture(group, needs, torch.device("meta")).wants_gradients


def _forward(model: PreTrainedModel, work: Work, modules: Sequence[nn.Module], *, gradients: bool, embedding: bool) -> _Text:
    """What every block reads.

    Args:
        model: in evaluation mode.
        work: its text.
        modules: the blocks.
        gradients: will be asked for; then each forward pass also tells who depends on whom, and keeps nothing else of the graph.
        embedding: they will be asked for down to the embedding.

    Raises:
        ModelError: a block reads something else than what the one before it gives, or they do not take turns.
    """
    text = _Text([[] for _ in modules])
    watch = _Watch(model, modules, text)
    with ExitStack() as stack, progress("reading what blocks read", work.amount, "tokens") as advance:
        if gradients:
            stack.enter_context(starting_at_embedding(model) if embedding else starting_before(modules[0]))
            stack.enter_context(saved_tensors_hooks(lambda tensor: tensor.new_empty(0), lambda tensor: tensor))
        else:
            stack.enter_context(torch.no_grad())
        for module in modules:
            stack.callback(module.register_forward_pre_hook(watch.before, with_kwargs=True).remove)
            stack.callback(module.register_forward_hook(watch.after).remove)
        for _, batch, _ in batches_of(work, model.device):
            watch.begin()
            with precision_of(work, model.device), leaving_after(modules[-1]) if text.ends else nullcontext():
                text.logits = model(input_ids=batch, use_cache=False).logits[:, -1].detach().to("cpu", copy=True)
            text.ends.append(watch.end())
            advance(batch.numel())
    kept = sum(visit.hidden.nbytes for visits in text.visits for visit in visits)
    say(f"what the blocks read is kept in memory: {kept / 1e9:,.2f} GB")
    return text


@dataclass
class _Watch:
    """Sees that each block reads what the one before it gives and nothing else that a gradient flows through, in turn."""

    model: PreTrainedModel
    modules: Sequence[nn.Module]
    text: _Text
    called: int = 0
    last: Tensor | None = None

    def begin(self) -> None:
        """A batch."""
        self.called, self.last = 0, None

    def before(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Hook of a block."""
        name, number = type(self.model).__name__, self._number(module)
        hidden, rest = taken(args, kwargs)
        if not bool(torch.isfinite(hidden).all()):
            raise NonFiniteError(
                f"what block {number} reads", "load the model as --dtype float32, or check the text for degenerate sequences"
            )
        if number != self.called or (self.last is not None and not torch.equal(self.last, hidden)):
            raise ModelError(f"blocks of {name} do not read what the one before them gives", _INSTEAD)
        if _depends(rest):
            raise ModelError(f"block {number} of {name} reads more of what comes before it than hidden states", _INSTEAD)
        self.called += 1
        visits = self.text.visits[number]
        kept = hidden.detach().to("cpu", copy=True)
        visits.append(_Visit(kept, _shared(rest, visits[0].rest) if visits else rest, hidden.device))

    def after(self, module: nn.Module, _args: tuple[Any, ...], output: Any) -> None:
        """Hook of a block."""
        self.last = returned(output)
        visit = self.text.visits[self._number(module)][-1]
        if not isinstance(output, Tensor):
            visit.kind, visit.more = type(output), len(output) - 1

    def end(self) -> Tensor:
        """What the last block gives."""
        if self.last is None or self.called != len(self.modules):
            raise ModelError(f"{type(self.model).__name__} calls {self.called} of its {len(self.modules)} blocks", _INSTEAD)
        return self.last.detach().to("cpu", copy=True)

    def _number(self, module: nn.Module) -> int:
        return next(number for number, one in enumerate(self.modules) if one is module)


def _depends(rest: Arguments) -> bool:
    """Whether a gradient would flow through what a block is given besides hidden states."""
    found = list[Tensor]()
    tree_map_only(Tensor, found.append, rest)
    return any(tensor.requires_grad for tensor in found)


def _differ(one: Tensor, other: Tensor) -> bool:
    """Whether they cannot be two computations of the same."""
    return one.shape != other.shape or not bool((one - other).abs().max() <= SAME * other.abs().max())


def _shared(found: Arguments, first: Arguments) -> Arguments:
    """What a block is given besides, with the first batch's tensors in the place of equal ones: masks and positions repeat."""
    known = list[Tensor]()
    tree_map_only(Tensor, known.append, first)

    def own(tensor: Tensor) -> Tensor:
        return next((one for one in known if one.shape == tensor.shape and torch.equal(one, tensor)), tensor)

    shared: Arguments = tree_map_only(Tensor, own, found)
    return shared


def _tail(
    model: PreTrainedModel, work: Work, modules: Sequence[nn.Module], text: _Text, ends: VocabularyCapture | None, loss: Loss
) -> Iterator[Tensor]:
    """The gradient of what the last block gives, batch by batch, on the host."""
    heads = [] if ends is None else [ends]
    with nullcontext() if ends is None else ends.hooks(model, table=False):
        for number, (chosen, batch, shape) in enumerate(batches_of(work, model.device)):
            leaf = text.ends[number].to(text.visits[-1][number].device).requires_grad_()
            with _instead(modules, text, number, leaf), listening(heads, shape), precision_of(work, model.device):
                logits = _logits(model, batch)
            if text.logits is not None and number == 0 and _differ(logits[:, -1].detach().cpu(), text.logits):
                raise ModelError(f"{type(model).__name__} reads more of its blocks than hidden states", _INSTEAD)
            backward(model, loss.of(logits, batch, None, work.calibration, chosen))
            if leaf.grad is None:
                raise ModelError(f"the loss of {type(model).__name__} does not depend on its last block", _INSTEAD)
            yield leaf.grad.cpu()
            text.ends[number] = text.ends[number].new_empty(0)


def _logits(model: PreTrainedModel, batch: Tensor) -> Tensor:
    try:
        logits: Tensor = model(input_ids=batch, use_cache=False).logits
    except (TypeError, ValueError, AttributeError, IndexError, KeyError) as error:  # it got nothing but hidden states
        raise ModelError(f"{type(model).__name__} reads more of its blocks than hidden states", _INSTEAD) from error
    return logits


@contextmanager
def _instead(modules: Sequence[nn.Module], text: _Text, number: int, leaf: Tensor) -> Iterator[None]:
    """Blocks that compute nothing; the last one gives what is known of it."""

    def passing(visit: _Visit, *args: Any, **kwargs: Any) -> Any:
        return visit.result(taken(args, kwargs)[0])

    visits = [visits[number] for visits in text.visits]
    with ExitStack() as stack:
        for module, visit in zip(modules[:-1], visits[:-1], strict=True):
            stack.enter_context(forwarding(module, partial(passing, visit)))
        stack.enter_context(forwarding(modules[-1], lambda *_args, **_kwargs: visits[-1].result(leaf.clone())))
        yield


def _replay(
    block: nn.Module, visits: Sequence[_Visit], gradients: Sequence[Tensor | None], captures: Sequence[GroupCapture], work: Work
) -> list[Tensor | None]:
    """Every batch through a block once more, forward and backward; gives the gradients of what the block read."""
    found: list[Tensor | None] = []
    back = bool(gradients)
    for number, (_, _, shape) in enumerate(batches_of(work, torch.device("cpu"))):
        visit = visits[number]
        leaf = visit.hidden.to(visit.device).requires_grad_(back)
        with torch.set_grad_enabled(back), listening(captures, shape), precision_of(work, visit.device):
            output = call_block(block, leaf.clone(), visit.rest)  # not the leaf itself: a block may add to what it reads
        gradient = gradients[number] if back else None
        if gradient is not None:
            output.backward(gradient.to(output.device))
            for capture in captures:
                capture.finish_call()
        if back:
            found.append(None if leaf.grad is None else leaf.grad.cpu())
    return found


def _embedding(
    model: PreTrainedModel, work: Work, first: nn.Module, gradients: Sequence[Tensor | None], ends: VocabularyCapture
) -> None:
    """From what the first block reads back to the embedding."""
    with starting_at_embedding(model), ends.hooks(model, head=False):
        for (_, batch, shape), gradient in zip(batches_of(work, model.device), gradients, strict=True):
            with listening([ends], shape), precision_of(work, model.device):
                hidden = taken_by(first, partial(model, input_ids=batch, use_cache=False))
            if gradient is not None:
                hidden.backward(gradient.to(hidden.device))
