"""Adam on lists of projected gradients, in plain torch.

    M <- b1 M + (1 - b1) G,    V <- b2 V + (1 - b2) G o G,    direction = size M / (sqrt(V) + eps)

`size` and `eps` contain the bias corrections; weight decay and learning rate are the caller's.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .blockwise import dequantize_flat, quantize_flat

Number = float | Tensor

BLOCK = 256  # entries that share a scale of 8-bit moments


def adam_step(
    grads: list[Tensor],
    exp_avgs: list[Tensor],
    exp_avg_sqs: list[Tensor],
    beta1: float,
    beta2: float,
    eps: Number,
    size: Number,
) -> list[Tensor]:
    """Advances the moments in place; returns size * M / (sqrt(V) + eps) for each gradient.

    Low-precision moments are advanced in fp32 and rounded once.
    """
    half = torch.bfloat16, torch.float16
    narrow = exp_avgs[0].dtype in half
    if grads[0].dtype in half:
        grads = [grad.float() for grad in grads]
    m = [t.float() for t in exp_avgs] if narrow else exp_avgs
    v = [t.float() for t in exp_avg_sqs] if narrow else exp_avg_sqs
    torch._foreach_lerp_(m, grads, 1 - beta1)
    torch._foreach_mul_(v, beta2)
    torch._foreach_addcmul_(v, grads, grads, 1 - beta2)
    denominators = torch._foreach_sqrt(v)
    torch._foreach_add_(denominators, eps)
    directions = torch._foreach_div(m, denominators)
    torch._foreach_mul_(directions, size)
    if narrow:
        torch._foreach_copy_(exp_avgs, m)
        torch._foreach_copy_(exp_avg_sqs, v)
    return list(directions)


def adam(
    grads: list[Tensor],
    exp_avgs: list[Tensor],
    exp_avg_sqs: list[Tensor],
    directions: list[Tensor],
    grad_norms: list[Tensor],
    direction_norms: list[Tensor],
    axis: int,
    beta1: float,
    beta2: float,
    eps: float,
    size: float,
    sizes: Tensor | None,
) -> None:
    """The reference of `torch.ops.lowrank.adam`.

    Args:
        grads: gradients of one precision, of any shapes.
        exp_avgs: M, advanced in place.
        exp_avg_sqs: V, advanced in place.
        directions: outputs, of the gradients' shapes.
        grad_norms: with `axis` 0 (1), fp32 norms of the columns (rows) of each matrix, written.
        direction_norms: the same for the directions.
        axis: -1 for no norms.
        beta1: b1.
        beta2: b2.
        eps: added to sqrt(V).
        size: factor on the direction.
        sizes: fp32 (count, 2), (eps, size) of each tensor, which replaces those arguments without
            being read back.
    """
    if sizes is not None:
        made = [
            adam_step([g], [m], [v], beta1, beta2, own[0], own[1])[0]
            for g, m, v, own in zip(grads, exp_avgs, exp_avg_sqs, sizes, strict=True)
        ]
    else:
        made = adam_step(grads, exp_avgs, exp_avg_sqs, beta1, beta2, eps, size)
    torch._foreach_copy_(directions, made)
    if axis >= 0:
        for tensors, norms in ((grads, grad_norms), (made, direction_norms)):
            for tensor, norm in zip(tensors, norms, strict=True):
                torch.linalg.vector_norm(tensor.float(), dim=axis, out=norm)


def adam_weights(
    weights: list[Tensor],
    grads: list[Tensor],
    exp_avgs: list[Tensor],
    exp_avg_sqs: list[Tensor],
    beta1: float,
    beta2: float,
    eps: float,
    size: float,
    decay_factor: float,
    alpha: float,
    sizes: Tensor | None,
) -> None:
    """The reference of `torch.ops.lowrank.adam_weights`: W <- decay_factor W - alpha direction.

    Args:
        weights: W, of the gradients' shapes and precision; rounded once.
        grads: as in `adam`.
        exp_avgs: as in `adam`.
        exp_avg_sqs: as in `adam`.
        beta1: b1.
        beta2: b2.
        eps: added to sqrt(V).
        size: factor on the direction.
        decay_factor: 1 less the weight decay.
        alpha: step size.
        sizes: fp32 (count, 4), (eps, size, decay_factor, alpha) of each tensor, which replaces
            those arguments without being read back. A gradient whose size there is 0 counts as
            zero, even if it is NaN.
    """
    for i, weight in enumerate(weights):
        own: Sequence[Number] | Tensor = (eps, size, decay_factor, alpha)
        grad = grads[i]
        if sizes is not None:
            own = sizes[i]
            grad = torch.where(own[1] != 0, grad, 0.0)
        lists = [grad], [exp_avgs[i]], [exp_avg_sqs[i]]
        (direction,) = adam_step(*lists, beta1, beta2, own[0], own[1])
        wide = weight.to(direction.dtype)
        weight.copy_(wide * own[2] - direction * own[3])


def adam_8bit(
    grads: list[Tensor],
    exp_avgs: list[Tensor],
    exp_avg_absmax: list[Tensor],
    exp_avg_sqs: list[Tensor],
    exp_avg_sq_absmax: list[Tensor],
    directions: list[Tensor],
    beta1: float,
    beta2: float,
    eps: float,
    size: float,
    sizes: Tensor | None,
) -> None:
    """The reference of `torch.ops.lowrank.adam_8bit`: `adam` on moments in blocks of 256 codes."""
    for i, (grad, direction) in enumerate(zip(grads, directions, strict=True)):
        stored = (
            (exp_avgs[i], exp_avg_absmax[i], True),
            (exp_avg_sqs[i], exp_avg_sq_absmax[i], False),
        )
        moments: list[Tensor] = []
        for codes, absmax, signed in stored:
            dense = torch.empty(codes.shape, dtype=torch.float32, device=codes.device)
            dequantize_flat(codes.view(-1), absmax, dense.view(-1), signed, BLOCK)
            moments.append(dense)
        m, v = moments
        own = None if sizes is None else sizes[i : i + 1]
        adam([grad], [m], [v], [direction], [], [], -1, beta1, beta2, eps, size, own)
        for moment, (codes, absmax, signed) in zip(moments, stored, strict=True):
            quantize_flat(moment.view(-1), codes.view(-1), absmax, signed, BLOCK)
