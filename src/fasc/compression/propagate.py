"""Error propagation: blocks in order, each fitted to the inputs it will really get, against the dense model's outputs.

With ``x`` the input of a layer in the dense model and ``x'`` in the partly compressed one, the best rank-k map minimises
``E‖Rᵀ(W x̃ − W' x̃')‖²`` for the metric ``R Rᵀ`` of the method. ``W B x̃'`` with ``B = Σ_xx' Σ_x'x'⁻¹`` is the part of ``W x̃``
that can be known from ``x'``, and the rest does not depend on ``W'``; so the problem is the ordinary one with ``W B`` for ``W``
and ``Σ_x'x'`` for ``Σ_xx``. Every method is propagated by the same substitution (docs/method.md).
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import PreTrainedModel

from fasc.planning.plan import RankPlan, UnitPlan
from fasc.statistics.moments import GradientMoment, GroupStatistics, Statistics, UnitStatistics, as_float64
from fasc.compression.trial import options_of
from fasc.forecast.channels import cut_all, cutting_of
from fasc.layouts.install import finish, install
from fasc.planning.options import MethodConfig
from fasc.forecast.half_j import half_energies
from fasc.errors import ModelError, StatisticsError, UsageError
from fasc.linalg.decomposition import Decomposition
from fasc.statistics.accumulators import Covariance, CrossSum, SymmetricSum, VectorSum
from fasc.linalg.psd import cholesky, damped
from fasc.methods import get_method, stacked_weight
from fasc.model.blocks import BlockInputs, block_inputs, block_names, input_of, run_block
from fasc.model.groups import evaluating
from fasc.serving.quantizer import build_structure
from fasc.progress import progress
from fasc.storage import new_file

_TOKENS = 2048
"""Tokens per forward pass of a block."""


def compress_in_order(
    model: PreTrainedModel,
    statistics: Statistics,
    plan: RankPlan,
    options: MethodConfig,
    work: Path | None,
) -> RankPlan:
    """Compress block by block with error propagation; see :func:`~fasc.compression.compress.compress`.

    Costs one more forward pass per block and group, of the dense and of the compressed block; no backward pass. Nothing is
    kept per token but the hidden states between blocks, twice.

    Raises:
        StatisticsError: the statistics do not hold their tokens.
        UsageError: the method uses a moment that cannot be propagated.
        ModelError: the model's blocks cannot be run one by one.
    """
    if "cross" in get_method(plan.method).moments:
        raise UsageError(f"`{plan.method}` ranks by Σ_xg, which is not known for propagated inputs", "leave --propagate out")
    if statistics.tokens is None:
        raise StatisticsError("the statistics do not hold the tokens they were measured on", "run `fasc collect` again")
    names = block_names(model, [layer for unit in plan.units for layer in unit.layers])
    structure: list[dict[str, Any]] = []
    losses: dict[str, float] = {unit.unit: 0.0 for unit in plan.units if unit.layout == "dense"}
    with progress("compressing with propagation", len(names), "blocks") as advance, torch.no_grad(), evaluating(model):
        states = _States.start(model, statistics.tokens, names)
        for name in names:
            units = [unit for unit in plan.units if unit.layers[0].startswith(f"{name}.")]
            dense = deepcopy(model.get_submodule(name))
            stored = None if work is None else work / f"{name}.safetensors"
            if stored is not None and stored.is_file():
                found = _load_block(model, stored)
            else:
                cuts = [cut for cut in plan.cuts if cut.reader.startswith(f"{name}.")]
                cuttings = (cutting_of(model, statistics, cut, options.damping) for cut in cuts)
                narrow, kept, structure_of_cuts = cut_all(model, statistics, cuttings)
                found = _compress_block(_Block(model, name, dense, states, kept), narrow, units, options)
                found["structure"] = structure_of_cuts + found["structure"]
                if stored is not None:
                    _save_block(model, found, stored)
            structure += found["structure"]
            losses |= found["losses"]
            states.advance(name, dense, model.get_submodule(name))
            advance()
    finish(model, structure)
    return plan.with_predicted_losses(losses)


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
    kept: Mapping[str, Tensor]
    """By layer: the inputs that it still has, where its MLP has lost channels."""

    def readers(self, layer: str) -> Iterator[tuple[Tensor, Tensor]]:
        """What a layer reads in the dense and in the compressed block, [tokens, d_in], batch by batch."""
        inner = layer.removeprefix(f"{self.name}.")
        compressed = self.model.get_submodule(self.name)
        for plain, changed in zip(self.states.dense, self.states.compressed, strict=True):
            x = input_of(self.dense, inner, lambda: run_block(self.dense, plain, self.states.inputs.rest(self.name, plain)))  # noqa: B023
            y = input_of(compressed, inner, lambda: run_block(compressed, changed, self.states.inputs.rest(self.name, changed)))  # noqa: B023
            x = x.flatten(0, -2).float()
            yield x if layer not in self.kept else x[:, self.kept[layer].to(x.device)], y.flatten(0, -2).float()


def _compress_block(block: _Block, statistics: Statistics, units: Sequence[UnitPlan], options: MethodConfig) -> dict[str, Any]:
    structure, losses = [], {}
    for group in dict.fromkeys(unit.group for unit in units):
        members = [unit for unit in units if unit.group == group and unit.layout != "dense"]
        if not members:
            continue
        found = statistics.groups[group]
        change = _measure(block, found, options.damping)
        pairs = [(unit, _decompose(block.model, statistics, unit, options, change)) for unit in members]
        for unit, (decomposition, target) in pairs:
            if get_method(options_of(unit, options).name).is_loss:
                losses[unit.unit] = float(half_energies(decomposition)[unit.rank])
            factors = decomposition.truncate(unit.rank, change.inputs.mean.to(decomposition.down), target)
            structure.append(install(block.model, unit, factors, change.inputs))
    return {"structure": structure, "losses": losses}


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
    for x, y in block.readers(group.group.layers[0].name):
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
    return weight @ predictor, UnitStatistics(unit.name, unit.tokens, inputs, gradient)


def _decompose(
    model: PreTrainedModel, statistics: Statistics, unit: UnitPlan, options: MethodConfig, change: _Change
) -> tuple[Decomposition, Tensor]:
    """The decomposition, and the mean output that it shall have."""
    weight = stacked_weight(model, statistics, unit)
    one = statistics.groups[unit.group].unit(unit.unit)
    predictor = change.predictor.to(weight.device)
    fitted, changed = propagated(weight, one, predictor, change.inputs)
    chosen = options_of(unit, options)
    return get_method(chosen.name).decompose(fitted, changed, chosen), weight @ change.dense_mean.to(weight)


@contextmanager
def _as_model_error(path: Path) -> Iterator[None]:
    try:
        yield
    except (OSError, ValueError, KeyError) as problem:
        raise ModelError(f"`{path}` is damaged: {problem}", "delete it and run the same command again") from problem


def _save_block(model: nn.Module, found: Mapping[str, Any], path: Path) -> None:
    tensors: dict[str, Tensor] = {}
    for entry in found["structure"]:
        for layer in entry["layers"]:
            module = model.get_submodule(layer)
            tensors |= {f"{layer}.{key}": value.contiguous() for key, value in module.state_dict().items()}
    with new_file(path) as scratch:
        save_file(tensors, scratch, metadata={"block": json.dumps(found)})


def _load_block(model: nn.Module, path: Path) -> dict[str, Any]:
    with _as_model_error(path), safe_open(path, framework="pt") as file:
        found: dict[str, Any] = json.loads(file.metadata()["block"])
        build_structure(model, found["structure"])
        for entry in found["structure"]:
            for layer in entry["layers"]:
                module = model.get_submodule(layer)
                module.load_state_dict({key: file.get_tensor(f"{layer}.{key}") for key in module.state_dict()})
    return found
