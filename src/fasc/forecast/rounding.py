"""What rounding a weight costs: ½J with the diagonal of the outputs' metric.

For an error ``E`` of a layer ½J is ``½ tr(Eᵀ M E Σ)`` with ``M = E[h hᵀ]``. Rounding gives errors that are nearly independent
from row to row, so that what stands off the diagonal of ``M`` averages out: ``½ Σ_o E[h_o²] e_oᵀ Σ e_o``.

Before anything is rounded, a step ``s`` is noise of variance ``s²/12``. With error feedback the noise of input ``i`` counts by its
variance given the inputs that are rounded after it.
"""

import torch
from jaxtyping import Float
from torch import Tensor

from fasc.linalg.rounding import Feedback


def rounding_loss(
    error: Float[Tensor, "o i"], moment: Float[Tensor, "i i"], scale: Float[Tensor, " o"], share: float = 1.0
) -> float:
    """π · ½ Σ_o E[h_o²] e_oᵀ Σ e_o, in nats per token of text.

    Args:
        error: ``W − W'``, [d_out, d_in].
        moment: ``Σ`` of the inputs: the second moment, or the covariance where a bias makes good the mean.
        scale: ``E[h_o²]`` of every output, nats² per token.
        share: of the tokens that reach the layer.
    """
    e = error.double()
    return 0.5 * share * float(scale.to(e) @ ((e @ moment.to(e)) * e).sum(1))


def noise_loss(
    weight: Float[Tensor, "o i"], inputs: Feedback, scale: Float[Tensor, " o"], group: int, share: float = 1.0
) -> float:
    """The forecast of :func:`rounding_loss` at one step for the whole range of each group: divide it by ``(2^bits − 1)²``.

    Args:
        weight: to be rounded.
        inputs: of the layer.
        scale: ``E[h_o²]`` of every output.
        group: inputs that share a scale.
        share: of the tokens that reach the layer.
    """
    d_out, d_in = weight.shape
    groups = -(-d_in // group)
    padded = torch.nn.functional.pad(weight, (0, groups * group - d_in)).view(d_out, groups, group)
    spread = (padded.amax(-1).clamp_min(0) - padded.amin(-1).clamp_max(0)).double()
    variances = torch.nn.functional.pad(inputs.variances, (0, groups * group - d_in)).view(groups, group).sum(1)
    return share * float(scale.to(spread) @ (spread.square() @ variances.to(spread))) / 24
