"""Error propagation: blocks in order, each fitted to the inputs it will really get, against the dense model's outputs.

With ``x`` the input of a layer in the dense model and ``x'`` in the partly compressed one, the best rank-k map minimises
``E‖Rᵀ(W x̃ − W' x̃')‖²`` for the metric ``R Rᵀ`` of the method. ``W B x̃'`` with ``B = Σ_xx' Σ_x'x'⁻¹`` is the part of ``W x̃``
that can be known from ``x'``, and the rest does not depend on ``W'``; so the problem is the ordinary one with ``W B`` for ``W``
and ``Σ_x'x'`` for ``Σ_xx``. Every method is propagated by the same substitution (docs/method.md).
"""

from collections.abc import Iterator, Sequence
from copy import deepcopy
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from fasc.compression.parts import load_part, recorded, save_part
from fasc.edits import Edit
from fasc.edits.factor import Factor, Problem
from fasc.edits.narrow import Narrow
from fasc.errors import StatisticsError, UsageError
from fasc.linalg.psd import cholesky, damped
from fasc.model.blocks import BlockInputs, block_inputs, block_names, input_of, run_block
from fasc.model.groups import stacked_weight
from fasc.model.scopes import evaluating
from fasc.planning.plan import Plan
from fasc.progress import progress
from fasc.statistics.accumulators import Covariance, CrossSum, SymmetricSum, VectorSum
from fasc.statistics.moments import GradientMoment, GroupStatistics, Statistics, UnitStatistics, as_float64
from fasc.statistics.narrowing import narrowed

_TOKENS = 2048
"""Tokens per forward pass of a block."""


def compress_in_order(model: PreTrainedModel, statistics: Statistics, plan: Plan, work: Path | None) -> None:
    """Compress block by block with error propagation; see :func:`~fasc.compression.compress.carry_out`.

    Costs one more forward pass per block and group, of the dense and of the compressed block; no backward pass. Nothing is
    kept per token but the hidden states between blocks, twice.

    Raises:
        StatisticsError: the statistics do not hold their text.
        UsageError: the method uses a moment that cannot be propagated, or the plan has edits that cannot be.
        ModelError: the model's blocks cannot be run one by one.
    """
    for edit in plan.edits:
        if isinstance(edit, Factor) and "cross" in edit.solver.method.moments:
            raise UsageError(f"`{edit.method}` ranks by Σ_xg, which is not known for propagated inputs", "leave --propagate out")
    other = next((edit for edit in plan.edits if not isinstance(edit, (Narrow, Factor))), None)
    if other is not None:
        raise UsageError(
            f"the edit `{other.edit}` goes by the moments of the dense model's inputs, not by propagated ones",
            "leave --propagate out",
        )
    if statistics.text is None:
        raise StatisticsError("the statistics do not hold the text they were measured on", "run `fasc collect` again")
    names = block_names(model, [name for edit in plan.edits for name in edit.touches])
    with progress("compressing with propagation", len(names), "blocks") as advance, torch.no_grad(), evaluating(model):
        states = _States.start(model, statistics.text, names)
        for name in names:
            edits = [edit for edit in plan.edits if edit.touches[0].startswith(f"{name}.")]
            dense = deepcopy(model.get_submodule(name))
            stored = None if work is None else work / f"{name}.safetensors"
            if stored is not None and stored.is_file():
                load_part(model, stored)
            else:
                before = len(recorded(model))
                _compress_block(_Block(model, name, dense, states, {}), statistics, edits)
                if stored is not None:
                    save_part(model, recorded(model)[before:], stored)
            states.advance(name, dense, model.get_submodule(name))
            advance()


@dataclass
class _States:
    """Hidden states before the block in hand, of the dense and of the compressed model, batch by batch."""

    dense: list[Tensor]
    compressed: list[Tensor]
    inputs: BlockInputs

    @staticmethod
    def start(model: PreTrainedModel, tokens: Tensor, names: Sequence[str]) -> "_States":
        rows = max(1, _TOKENS // tokens.shape[1])
        batches = [tokens[start : start + rows].to(model.device) for start in range(0, tokens.shape[0], rows)]
        inputs = block_inputs(model, batches, names)
        return _States(list(inputs.hidden), list(inputs.hidden), inputs)

    def advance(self, name: str, dense: nn.Module, compressed: nn.Module) -> None:
        """Send both through the block."""
        self.dense = [run_block(dense, hidden, self.inputs.rest(name, hidden)) for hidden in self.dense]
        self.compressed = [run_block(compressed, hidden, self.inputs.rest(name, hidden)) for hidden in self.compressed]


@dataclass(frozen=True)
class _Block:
    model: PreTrainedModel
    name: str
    dense: nn.Module
    """A copy from before."""

    states: _States
    channels: dict[str, Tensor]
    """By layer: the inputs that it still has, where its MLP has lost channels."""

    def inputs_of(self, layer: str) -> Iterator[tuple[Tensor, Tensor]]:
        """What a layer reads in the dense and in the compressed block, [tokens, d_in], batch by batch."""
        inner = layer.removeprefix(f"{self.name}.")
        compressed = self.model.get_submodule(self.name)
        for plain, changed in zip(self.states.dense, self.states.compressed, strict=True):
            x = input_of(self.dense, inner, lambda: run_block(self.dense, plain, self.states.inputs.rest(self.name, plain)))  # noqa: B023
            y = input_of(compressed, inner, lambda: run_block(compressed, changed, self.states.inputs.rest(self.name, changed)))  # noqa: B023
            x = x.flatten(0, -2).float()
            yield x if layer not in self.channels else x[:, self.channels[layer].to(x.device)], y.flatten(0, -2).float()


def _compress_block(block: _Block, statistics: Statistics, edits: Sequence[Edit]) -> None:
    """Narrow first; then factor group by group, each from the inputs that the edits before it leave."""
    for edit in edits:
        if isinstance(edit, Narrow):
            narrowing = edit.choose(block.model, statistics)
            edit.carry_out(block.model, statistics, narrowing)
            block.channels[edit.consumer.name] = narrowing.channels
            statistics = narrowed(statistics, narrowing)
    factors = [edit for edit in edits if isinstance(edit, Factor)]
    for name in dict.fromkeys(edit.group for edit in factors):
        members = [edit for edit in factors if edit.group == name]
        group = statistics.group(name)
        change = _measure(block, group, members[0].solver.damping)
        problems = [_problem(block.model, group, edit, change) for edit in members]  # of the layers before any is replaced
        for edit, problem in zip(members, problems, strict=True):
            own = edit.with_loss(None) if edit.solver.method.is_loss else edit
            own.fit(block.model, problem)


@dataclass(frozen=True)
class _Change:
    """How the inputs of a group changed."""

    inputs: Covariance
    """Of ``x'``."""

    predictor: Tensor
    """``B``: the best linear estimate of ``x̃`` from ``x̃'``, float64."""

    dense_mean: Tensor
    """``μ_x`` of the dense model, float64."""


def _measure(block: _Block, group: GroupStatistics, damping: float) -> _Change:
    size, device = group.group.d_in, block.model.device
    sums = VectorSum(size, device), VectorSum(size, device), SymmetricSum(size, device), CrossSum((size, size), device)
    tokens = 0
    for x, y in block.inputs_of(group.group.layers[0].name):
        sums[0].add(x)
        sums[1].add(y)
        sums[2].add(y)
        sums[3].add(x, y)
        tokens += x.shape[0]
    mean_x, mean_y = sums[0].mean(tokens), sums[1].mean(tokens)
    covariance = sums[2].covariance(mean_y, tokens)
    cross = sums[3].covariance((mean_x, mean_y), tokens)
    # Damping both keeps B at the identity where x' says nothing, instead of at zero.
    shift = damping * covariance.diagonal().mean()
    cross.diagonal().add_(shift)
    chol = cholesky(damped(covariance, damping), where=f"`{group.group.name}`: the propagated inputs'", tokens=tokens)
    predictor = torch.cholesky_solve(cross.mT, chol).mT
    return _Change(Covariance(mean_y.float(), covariance.float()), predictor, mean_x)


def propagated(weight: Tensor, unit: UnitStatistics, predictor: Tensor, inputs: Covariance) -> tuple[Tensor, UnitStatistics]:
    """The ordinary problem that has the propagated one's solution: ``W B`` on inputs ``x'``.

    Args:
        weight: ``W``, [d_out, d_in], float64.
        unit: of the dense model.
        predictor: ``B``, [d_in, d_in], float64.
        inputs: mean and covariance of ``x'``.

    Returns:
        ``W B`` and the statistics to decompose it with: gradient moments of the input side become those of ``W B``.
    """
    gradient = unit.gradient
    if gradient is not None and gradient.side == "input":
        mean, covariance = as_float64(gradient.covariance, predictor.device)
        gradient = GradientMoment("input", Covariance(predictor.mT @ mean, predictor.mT @ covariance @ predictor))
    return weight @ predictor, UnitStatistics(unit.name, unit.tokens, inputs, gradient, share=unit.share)


def _problem(model: PreTrainedModel, group: GroupStatistics, edit: Factor, change: _Change) -> Problem:
    """What the unit is fitted to, and the mean output that it shall have."""
    weight = stacked_weight(model, edit.unit)
    fitted, unit = propagated(weight, group.unit(edit.unit.name), change.predictor.to(weight.device), change.inputs)
    if not edit.solver.method.is_loss:  # its forecast would be of other gradients than those that were measured
        unit = replace(unit, gradient=None)
    return Problem(fitted, unit, weight @ change.dense_mean.to(weight))
