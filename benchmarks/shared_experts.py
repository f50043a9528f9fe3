"""Does one projector for all experts of a block pay? The first layers of a block's experts read the same x, each some tokens of it.

Forecasts, at equal numbers of parameters: every expert with factors of its own, its rank chosen by ½J, against one `down` for all of
them with an `up` for each. The shared `down` is the best of two: that of the pooled moments, and the same after some steps of descent
on the sum of the experts' losses; each `up` is the least-squares one of its expert. Nothing is compressed.

    fasc collect MODEL --diagnosis --out moments.safetensors
    python benchmarks/shared_experts.py MODEL moments.safetensors --out benchmarks/results/shared_experts.json
"""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from fasc.linalg.psd import damped
from fasc.model.experts import expert_layers
from fasc.model.groups import stacked_weight
from fasc.model.layers import expert_of
from fasc.provenance import provenance
from fasc.statistics.moments import Statistics, as_float64
from fasc.storage import write_json

SHARES = (0.8, 0.6, 0.4)
"""Of the parameters of the experts' first layers."""

STEPS = 60
"""Of descent, by default."""


class Expert(NamedTuple):
    """The problem of one expert, at its input."""

    covariance: Tensor
    metric: Tensor
    share: float
    d_out: int

    @property
    def tails(self) -> Tensor:
        """π ½J at each rank, with a projector of its own."""
        root = torch.linalg.cholesky(self.covariance)
        energies = torch.linalg.eigvalsh(root.mT @ self.metric @ root).flip(-1).clamp_min(0)
        return 0.5 * self.share * torch.cat([energies.flip(0).cumsum(0).flip(0), energies.new_zeros(1)])

    def loss(self, down: Tensor) -> Tensor:
        """π ½J where only ``down · x`` is known of x."""
        seen = down @ self.covariance
        known = torch.linalg.solve(seen @ down.mT, seen)
        return 0.5 * self.share * ((self.metric * self.covariance).sum() - (self.metric * (seen.mT @ known)).sum())


def experts_of(model: Any, statistics: Statistics, damping: float) -> dict[str, list[Expert]]:
    """By what holds them, the first layers of the experts of each block."""
    found: dict[str, list[Expert]] = {}
    with expert_layers(model), torch.no_grad():
        for name, group in statistics.groups.items():
            expert = expert_of(name)
            if expert is None or name.endswith("down_proj"):
                continue
            unit = group.unit(name)
            gradient = unit.require_gradient()
            _, metric = as_float64(gradient.covariance)
            _, covariance = as_float64(unit.input)
            if gradient.side == "output":
                weight = stacked_weight(model, group.group.unit()).double()
                metric = weight.mT @ metric @ weight
            one = Expert(damped(covariance, damping), metric, unit.share, group.group.d_out)
            found.setdefault(expert.rpartition(".")[0], []).append(one)
    return found


def parameters(rank: Tensor | int, d_in: int, d_out: int, *, pivoted: bool) -> Any:
    """Of two factors, or of some rows and what makes the others of them."""
    return rank * (d_in + d_out) - (rank * rank - rank if pivoted else 0)


def separate(experts: Sequence[Expert], limit: float, *, pivoted: bool) -> float:
    """The least loss with a projector each: by bisection of the price of a parameter, dense where that is no larger."""
    d_in = len(experts[0].covariance)
    options = []
    for one in experts:
        costs = parameters(torch.arange(d_in + 1), d_in, one.d_out, pivoted=pivoted).double()
        smaller = costs < d_in * one.d_out
        losses, costs = one.tails[smaller], costs[smaller]
        options.append((torch.cat([losses, losses.new_zeros(1)]), torch.cat([costs, costs.new_tensor([d_in * one.d_out])])))
    low, high = 0.0, 1.0
    for _ in range(200):
        price = (low + high) / 2
        picks = [int((losses + price * costs).argmin()) for losses, costs in options]
        used = sum(float(costs[pick]) for (_, costs), pick in zip(options, picks, strict=True))
        low, high = (low, price) if used <= limit else (price, high)
    picks = [int((losses + high * costs).argmin()) for losses, costs in options]
    return sum(float(losses[pick]) for (losses, _), pick in zip(options, picks, strict=True))


def shared(experts: Sequence[Expert], limit: float, steps: int, *, pivoted: bool) -> tuple[float, float, float, int]:
    """The loss with one projector, pooled and after descent; what no shared projector of this rank can beat; the rank."""
    d_in, d_out = len(experts[0].covariance), sum(one.d_out for one in experts)
    rank = max(k for k in range(1, d_in) if parameters(k, d_in, d_out, pivoted=pivoted) <= limit)
    weights = sum(one.share for one in experts)
    covariance = sum(one.share * one.covariance for one in experts) / weights
    metric = sum(one.share * one.metric for one in experts)
    root = torch.linalg.cholesky(covariance)  # type: ignore[arg-type]
    vectors = torch.linalg.eigh(root.mT @ metric @ root).eigenvectors.flip(-1)[:, :rank]
    down = torch.linalg.solve_triangular(root, vectors.mT, upper=False, left=False)
    down = torch.linalg.qr(down.mT).Q.mT.contiguous().requires_grad_()
    pooled = float(sum(one.loss(down).detach() for one in experts))
    best = pooled
    optimizer = torch.optim.Adam([down], lr=3e-3)
    for _ in range(steps):
        loss = sum(one.loss(down) for one in experts)
        best = min(best, float(loss.detach()))
        optimizer.zero_grad()
        (loss / pooled).backward()  # type: ignore[union-attr, operator]
        optimizer.step()
    return pooled, best, sum(float(one.tails[rank]) for one in experts), rank


def main() -> None:
    """Print and keep a row per block, share and layout."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("statistics", type=Path)
    parser.add_argument("--damping", type=float, default=1e-4)
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--out", type=Path)
    asked = parser.parse_args()
    torch.set_num_threads(1)
    model = AutoModelForCausalLM.from_pretrained(asked.model).eval()
    rows = []
    print("holder, parameters, layout: separate; shared pooled, descended, bound (π ½J, nats per token); rank")
    for holder, experts in experts_of(model, Statistics.load(asked.statistics), asked.damping).items():
        dense = sum(one.d_out for one in experts) * len(experts[0].covariance)
        for share in SHARES:
            for pivoted in (False, True):
                own = separate(experts, share * dense, pivoted=pivoted)
                pooled, best, bound, rank = shared(experts, share * dense, asked.steps, pivoted=pivoted)
                kind = "pivoted" if pivoted else "factors"
                row = {"holder": holder, "share": share, "layout": kind, "separate": own, "pooled": pooled, "descended": best}
                rows.append(row | {"bound": bound, "rank": rank})
                print(f"{holder} {share:g} {kind}: {own:.3e}; {pooled:.3e} {best:.3e} {bound:.3e}; {rank}", flush=True)
    if asked.out is not None:
        write_json(asked.out, {"rows": rows, "provenance": provenance(model=asked.model)})


if __name__ == "__main__":
    main()
