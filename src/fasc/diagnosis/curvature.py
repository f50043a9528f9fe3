"""The Hessian of the loss with respect to a group's input, by Hessian-vector products; its leading eigenvectors by Lanczos."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from numpy.typing import NDArray
from scipy.sparse.linalg import ArpackNoConvergence, LinearOperator, eigsh
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import PreTrainedModel

from fasc.diagnosis.dependence import dependence_violation, group_weight
from fasc.diagnosis.overlap import chance, overlap
from fasc.errors import NonFiniteError
from fasc.linalg.psd import cholesky, damped, descending_eigh
from fasc.model.groups import InputGroup
from fasc.model.scopes import evaluating
from fasc.progress import progress
from fasc.statistics.moments import Statistics, as_float64
from fasc.statistics.objective import summed_nll

Product = Callable[[Tensor], Tensor]


@contextmanager
def hessian_product(model: PreTrainedModel, tokens: Tensor, group: InputGroup, *, seed: int = 0) -> Iterator[Product]:
    """Multiply by ``E_t[∂²L/∂x_t∂x_tᵀ]``, the mean of the Hessian's diagonal blocks: what Σ_gg stands for.

    All blocks are touched by one product: with random signs ``s_t``, ``E_s[s_t (H (s ⊗ v))_t] = H_tt v``. The signs are drawn
    once, so this is a fixed symmetric operator, unbiased over draws; what other tokens bring averages out over the tokens.

    Args:
        model: dense.
        tokens: [sequences, length], all run as one batch whose graph is kept.
        group: at whose input.
        seed: of the signs.

    Yields:
        ``v [d] → H v [d]``, nats per token and squared input, float64.

    Raises:
        NonFiniteError: the loss is NaN or infinite.
    """
    count = tokens.numel()
    shift = torch.zeros(*tokens.shape, group.d_in, device=model.device, dtype=model.dtype, requires_grad=True)
    generator = torch.Generator().manual_seed(seed)
    signs = (torch.randint(2, (*tokens.shape, 1), generator=generator) * 2 - 1).to(shift)

    def move(_module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        return (args[0] + shift, *args[1:])

    flags = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    with ExitStack() as stack:
        stack.enter_context(evaluating(model))
        stack.enter_context(sdpa_kernel(SDPBackend.MATH))  # the fused kernels have no second derivative
        for parameter, flag in flags:
            parameter.requires_grad_(False)  # noqa: FBT003 - torch's own signature
            stack.callback(parameter.requires_grad_, flag)
        for layer in group.layers:
            stack.callback(model.get_submodule(layer.name).register_forward_pre_hook(move).remove)
        with torch.enable_grad():
            logits = model(input_ids=tokens.to(model.device), use_cache=False).logits
            loss = summed_nll(logits, tokens.to(model.device), None, "corpus")
            if not bool(torch.isfinite(loss)):
                raise NonFiniteError(f"the loss at `{group.name}`", "load the model as --dtype float32")
            (gradient,) = torch.autograd.grad(loss, shift, create_graph=True)

        def product(vector: Tensor) -> Tensor:
            direction = signs * vector.to(shift)
            (found,) = torch.autograd.grad(gradient, shift, grad_outputs=direction, retain_graph=True)
            return (signs * found).flatten(0, 1).sum(0).double() / count

        yield product


def leading_eigenvectors(product: Product, d: int, k: int, *, what: str, seed: int = 0) -> tuple[Tensor, Float[Tensor, "d k"]]:
    """The k largest eigenvalues of a symmetric operator, descending, and their eigenvectors, by Lanczos (ARPACK through scipy).

    Args:
        product: the operator.
        d: its size; above ``k + 1``.
        k: how many.
        what: named in the progress line.
        seed: of the start vector.

    Raises:
        NonFiniteError: Lanczos did not converge.
    """
    products = 10 * d
    with progress(f"Lanczos on {what}", 6 * k, "products") as advance:

        def multiply(vector: NDArray[np.float64]) -> NDArray[np.float64]:
            advance()
            return product(torch.from_numpy(vector.ravel().copy())).cpu().numpy()

        operator = LinearOperator((d, d), matvec=multiply, dtype=np.float64)
        start = np.random.default_rng(seed).standard_normal(d)
        try:
            values, vectors = eigsh(operator, k=k, which="LA", ncv=min(d, 2 * k + 8), v0=start, tol=1e-3, maxiter=products)
        except ArpackNoConvergence as problem:
            raise NonFiniteError(
                f"the eigenvectors of {what} ({len(problem.eigenvalues)} of {k} found)", "ask for fewer"
            ) from problem
    order = np.argsort(-values)
    return torch.from_numpy(values[order].copy()), torch.from_numpy(vectors[:, order].copy())


def compare_with_hessian(
    model: PreTrainedModel,
    statistics: Statistics,
    tokens: Tensor,
    groups: Sequence[str],
    k: int,
    damping: float = 1e-4,
) -> list[dict[str, Any]]:
    """Overlap of the Hessian's k leading eigenvectors at a group's input with what the Fisher moments and the methods choose.

    ``fisher``: eigenvectors of Σ_gg against those of the Hessian H. ``fasc_white``: with Σ_xx = L Lᵀ, what fasc keeps, the
    eigenvectors of LᵀΣ_ggL, against those of LᵀHL: the same problem with the Hessian in the place of the Fisher moment.
    ``svd``: the leading directions of Σ_xx against those of H.

    Args:
        model: dense.
        statistics: with the gradient moments of the groups.
        tokens: held-out or calibration text, [sequences, length], for the Hessian.
        groups: names.
        k: eigenvectors.
        damping: of Σ_xx, relative.

    Raises:
        StatisticsError: a group or its gradient moment is missing.
        NonFiniteError: Lanczos did not converge.
    """
    rows = []
    for name in groups:
        moments = statistics.group(name)
        weight = group_weight(model, moments.group)
        gg, _ = moments.unit(name).require_gradient().at_input(weight)
        _, xx = as_float64(moments.input)
        chol = cholesky(damped(xx, damping), where=f"`{name}`: the inputs'", tokens=moments.tokens)
        with hessian_product(model, tokens, moments.group) as product:
            d = moments.group.d_in
            values, plain = leading_eigenvectors(product, d, k, what=name)
            white = partial(_white, product, chol)
            _, whitened = leading_eigenvectors(white, d, k, what=f"{name}, white inputs")
        dependence = dependence_violation(moments.unit(name), weight)
        rows.append(
            {
                "group": name,
                "rho": None if dependence is None else dependence.rho,
                "k": k,
                "fisher": overlap(_leading(gg, k), plain),
                "fasc_white": overlap(_leading(chol.mT @ gg @ chol, k), whitened),
                "svd": overlap(_leading(xx, k), plain),
                "chance": chance(k, d),
                "decay": float(values[0] / values[-1]),
                "eigenvalues": values.tolist(),
            }
        )
    return rows


def _white(product: Product, chol: Tensor, vector: Tensor) -> Tensor:
    return chol.mT @ product(chol @ vector).cpu()


def _leading(matrix: Tensor, k: int) -> Tensor:
    return descending_eigh(matrix)[1][:, :k]
