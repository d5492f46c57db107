"""torch's fused Adam kernel for both of Adam's forms."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.optim.adam import adam as torch_adam

FUSED_DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def bias_corrections(beta1: float, beta2: float, step: int) -> tuple[float, float]:
    """(1 - b1^t, sqrt(1 - b2^t))."""
    return 1.0 - beta1**step, (1.0 - beta2**step) ** 0.5


def fused_step(
    weights: list[Tensor],
    grads: list[Tensor],
    exp_avgs: list[Tensor],
    exp_avg_sqs: list[Tensor],
    *,
    steps_done: int,
    size: float,
    beta1: float,
    beta2: float,
    eps: float,
    decay: float = 0.0,
) -> None:
    """In place, torch's fused Adam: weights <- (1 - decay) weights - size M / (sqrt(V) + eps).

    Args:
        weights: updated in place.
        grads: gradients of the same precision.
        exp_avgs: first moments, advanced.
        exp_avg_sqs: second moments, advanced.
        steps_done: steps before this one.
        size: step size, bias corrections included.
        beta1: decay rate of the first moment.
        beta2: decay rate of the second moment.
        eps: added to the uncorrected sqrt(V).
        decay: share of the weights that is subtracted first.
    """
    correction1, correction2 = bias_corrections(beta1, beta2, steps_done + 1)
    # The kernel takes lr / correction1 * M / (sqrt(V) / correction2 + eps'): solve for lr and eps'.
    lr = size * correction1 / correction2
    device = grads[0].device
    steps = list(torch.full((len(grads),), float(steps_done), device=device).unbind(0))
    torch_adam(
        weights,
        grads,
        exp_avgs,
        exp_avg_sqs,
        [],
        steps,
        fused=True,
        amsgrad=False,
        beta1=beta1,
        beta2=beta2,
        lr=lr,
        weight_decay=decay / lr if decay and lr else 0.0,
        decoupled_weight_decay=True,
        eps=eps / correction2,
        maximize=False,
    )
    # torch's fused kernel does not increment the version counter of autograd.
    torch.autograd.graph.increment_version(weights)
