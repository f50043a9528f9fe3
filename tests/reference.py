"""Slow, obvious versions of the fast code."""

import torch


def moments_by_hand(model, tokens, names):
    """Inputs x and output gradients h of the layers for every token, kept whole: [tokens, d]."""
    xs, hs = {name: [] for name in names}, {name: [] for name in names}
    handles = []
    for name in names:
        module = model.get_submodule(name)
        handles.append(
            module.register_forward_hook(
                lambda _m, args, output, name=name: (
                    (xs[name].append(args[0].detach()), output.retain_grad(), hs[name].append(output))[0] and None
                )
            )
        )
    logits = model(input_ids=tokens, use_cache=False).logits
    loss = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten(), reduction="sum")
    loss.backward()
    for handle in handles:
        handle.remove()
    x = {name: torch.cat([part.flatten(0, -2) for part in parts]).double() for name, parts in xs.items()}
    h = {name: torch.cat([part.grad.flatten(0, -2) for part in parts]).double() for name, parts in hs.items()}
    model.zero_grad(set_to_none=True)
    return x, h


def covariance(a, b=None):
    b = a if b is None else b
    return (a - a.mean(0)).mT @ (b - b.mean(0)) / a.shape[0]


def input_error(factors, statistics, weight, gradient):
    """E‖x̃ − P x̃‖² with P = downᵀ down (orthonormal rows)."""
    del weight, gradient
    rest = torch.eye(factors.down.shape[1], dtype=torch.float64) - factors.down.mT @ factors.down
    return torch.trace(rest.mT @ rest @ statistics.input.matrix.double())


def output_error(factors, statistics, weight, gradient):
    """E‖(W − W') x̃‖²."""
    del gradient
    error = weight - factors.dense()
    return torch.trace(error @ statistics.input.matrix.double() @ error.mT)


def fisher_loss(factors, statistics, weight, gradient):
    """tr((W−W')ᵀ Σ_hh (W−W') Σ_xx)."""
    error = weight - factors.dense()
    return torch.trace(error.mT @ gradient @ error @ statistics.input.matrix.double())


def dropped_quotients(factors, statistics, weight, gradient):
    """Σ v_jᵀ A v_j over the dropped generalised eigenvectors of Eq. 6, from scipy's own solver."""
    import scipy.linalg

    cross = statistics.gradient.cross.double()
    metric = statistics.gradient.covariance.matrix.double()
    if statistics.gradient.side == "output":
        cross, metric = cross @ weight, weight.mT @ metric @ weight
    printed = cross @ metric @ cross.mT
    shifted = statistics.input.matrix.double() + 1e-8 * torch.eye(cross.shape[0], dtype=torch.float64)
    values = scipy.linalg.eigh(((printed + printed.mT) / 2).numpy(), shifted.numpy(), eigvals_only=True)
    return torch.from_numpy(values[::-1].copy()).clamp_min(0)[factors.down.shape[0] :].sum()


def product_error(factors, statistics, weight, gradient):
    """E‖(I − P)(g ⊙ x)‖² with P = downᵀ down (orthonormal rows)."""
    del weight, gradient
    rest = torch.eye(factors.down.shape[1], dtype=torch.float64) - factors.down.mT @ factors.down
    return torch.trace(rest.mT @ rest @ statistics.extras["product"].double())


def diagonal_fisher_loss(factors, statistics, weight, gradient):
    """tr(Aᵀ diag(Σ_gg) A Σ_xx)."""
    metric = torch.diag((weight.mT @ gradient @ weight).diagonal())
    # The projector onto the coordinates down·x that leaves nothing of x̃ to be known from them: P = Σ downᵀ (down Σ downᵀ)⁻¹ down.
    xx = statistics.input.matrix.double()
    lift = xx @ factors.down.mT @ torch.linalg.inv(factors.down @ xx @ factors.down.mT)
    error = torch.eye(weight.shape[1], dtype=torch.float64) - lift @ factors.down
    return torch.trace(error.mT @ metric @ error @ statistics.input.matrix.double())


def weight_error(factors, statistics, weight, gradient):
    """‖W − W'‖²."""
    del statistics, gradient
    return (weight - factors.dense()).square().sum()


def scaled_weight_error(factors, statistics, weight, gradient):
    """‖(W − W') diag(E|x|)^½‖²."""
    del gradient
    return ((weight - factors.dense()).square() * statistics.extras["magnitude"].double()).sum()


def row_weighted_error(factors, statistics, weight, gradient):
    """Σ_o F_o ‖(W − W')_o‖²."""
    del gradient
    return (statistics.extras["rows/unit"].double()[:, None] * (weight - factors.dense()).square()).sum()


SURROGATE = {
    "svd": input_error,
    "whitened": output_error,
    "two-sided": fisher_loss,
    "two-sided-sketch": fisher_loss,
    "fasc": fisher_loss,
    "fasc-sketch": fisher_loss,
    "fasc-eq6": dropped_quotients,
    "grad-weighted": product_error,
    "fisher-diag": diagonal_fisher_loss,
    "weight-svd": weight_error,
    "asvd": scaled_weight_error,
    "fwsvd": row_weighted_error,
}
"""Method ↦ slow(factors, unit statistics, weight, Σ_hh): what its dropped energies must sum to."""


def greedy_elimination(weight, covariance, fewest):
    """Remove the feature whose removal loses least, by refitting from scratch without each of those left."""
    alive, order, losses = list(range(weight.shape[1])), [], [0.0]
    while len(alive) > fewest:
        tried = {}
        for feature in alive:
            others = [one for one in alive if one != feature]
            fitted = weight @ covariance[:, others] @ torch.linalg.inv(covariance[others][:, others])
            error = weight.clone()
            error[:, others] -= fitted
            tried[feature] = float(torch.trace(error @ covariance @ error.mT))
        best = min(tried, key=tried.get)
        alive.remove(best)
        order.append(best)
        losses.append(tried[best])
    return order, losses
