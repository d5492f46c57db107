"""Cross-entropy of a linear head in chunks of tokens, without storing all logits.

With T tokens, width d and vocabulary V the logits would take T x V numbers, more than everything
else at small widths. Here a chunk of C tokens is turned into logits, loss and gradients at once, in
the forward pass; only the two gradients, T x d and V x d, are saved for the backward pass.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lowrank.optimizers import QuantizedWeight

IGNORED = -100
CHUNK_BYTES = 64 << 20


def chunk_tokens(vocabulary: int, budget_bytes: int = CHUNK_BYTES) -> int:
    """Tokens per chunk for which float32 logits stay within `budget_bytes` (at least 1)."""
    return max(1, budget_bytes // (4 * vocabulary))


def chunked_cross_entropy(
    hidden: Tensor, weight: Tensor, targets: Tensor, chunk: int | None = None
) -> Tensor:
    """Sum of the negative log-likelihoods of `targets` under softmax(hidden @ weight^T).

    The softmax and the sums are in float32 (float64 for float64 input). Differentiable once, with
    respect to `hidden` and `weight`; under `torch.no_grad` no gradient is computed at all.

    Args:
        hidden: (..., d) activations.
        weight: (V, d) rows of the head, same dtype; a quantised one is dequantised once.
        targets: (...) int64 token numbers; -100 marks a token that doesn't count.
        chunk: tokens per chunk; by default as many as 64 MiB of float32 logits hold.

    Returns:
        A scalar: the loss in nats, summed over the tokens that count.
    """
    hidden_td = hidden.flatten(0, -2)
    targets_t = targets.flatten()
    size = chunk or chunk_tokens(weight.shape[0])
    wanted = torch.is_grad_enabled() and (hidden.requires_grad or weight.requires_grad)
    if not wanted:
        return _forward(hidden_td, weight, targets_t, size, None, None)
    loss: Tensor = _ChunkedCrossEntropy.apply(hidden_td, weight, targets_t, size)  # type: ignore[no-untyped-call]
    return loss


def _forward(
    hidden_td: Tensor,
    weight_vd: Tensor,
    targets_t: Tensor,
    chunk: int,
    grad_hidden_td: Tensor | None,
    grad_weight_vd: Tensor | None,
) -> Tensor:
    """The summed loss; fills the gradients (of the sum) where buffers are given."""
    if isinstance(weight_vd, QuantizedWeight):  # once, not in each product
        weight_vd = weight_vd.dequantize(hidden_td.dtype)
    exact = torch.float64 if hidden_td.dtype == torch.float64 else torch.float32
    total = torch.zeros((), dtype=exact, device=hidden_td.device)
    for start in range(0, hidden_td.shape[0], chunk):
        rows = slice(start, start + chunk)
        hidden_cd, targets_c = hidden_td[rows], targets_t[rows]
        counts_c = targets_c != IGNORED
        index_c1 = torch.where(counts_c, targets_c, 0).unsqueeze(1)
        logits_cv = (hidden_cd @ weight_vd.T).to(exact)
        log_sum_c1 = torch.logsumexp(logits_cv, dim=1, keepdim=True)
        losses_c1 = log_sum_c1 - logits_cv.gather(1, index_c1)
        total += torch.where(counts_c, losses_c1.squeeze(1), 0).sum()
        if grad_hidden_td is None and grad_weight_vd is None:
            continue
        # softmax minus one-hot, in place of the logits
        grad_cv = logits_cv.sub_(log_sum_c1).exp_()
        grad_cv.scatter_add_(1, index_c1, torch.full_like(log_sum_c1, -1.0))
        # masked_fill_ instead of a product: a masked row may hold inf or nan
        grad_cv.masked_fill_(~counts_c.unsqueeze(1), 0)
        grad_cv = grad_cv.to(weight_vd.dtype)
        if grad_hidden_td is not None:
            torch.mm(grad_cv, weight_vd, out=grad_hidden_td[rows])
        if grad_weight_vd is not None:
            if grad_weight_vd.dtype == grad_cv.dtype:
                grad_weight_vd.addmm_(grad_cv.T, hidden_cd)
            else:
                grad_weight_vd += grad_cv.T @ hidden_cd
    return total


class _ChunkedCrossEntropy(torch.autograd.Function):
    """Loss and gradients of `chunked_cross_entropy` in one pass over the chunks."""

    @staticmethod
    def forward(
        ctx: Any, hidden_td: Tensor, weight_vd: Tensor, targets_t: Tensor, chunk: int
    ) -> Tensor:
        wants_hidden, wants_weight = ctx.needs_input_grad[:2]
        grad_hidden = torch.empty_like(hidden_td) if wants_hidden else None
        # Chunks are summed in float32: in bfloat16 the later ones would be rounded away.
        narrow = weight_vd.dtype in (torch.bfloat16, torch.float16)
        dtype = torch.float32 if narrow else weight_vd.dtype
        grad_weight = torch.zeros_like(weight_vd, dtype=dtype) if wants_weight else None
        loss = _forward(hidden_td, weight_vd, targets_t, chunk, grad_hidden, grad_weight)
        if grad_weight is not None:
            grad_weight = grad_weight.to(weight_vd.dtype)
        ctx.save_for_backward(grad_hidden, grad_weight)
        return loss

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
        hidden, weight = ctx.saved_tensors
        scaled = tuple(
            None if value is None else value * grad.to(value.dtype) for value in (hidden, weight)
        )
        return scaled[0], scaled[1], None, None
