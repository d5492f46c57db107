"""Cross-entropy of a linear head in chunks of tokens, without storing all logits.

With T tokens, width d and vocabulary V the logits would take T x V numbers, more than everything
else at small widths. Here a chunk of C tokens is turned into logits, loss and gradients at once, in
the forward pass; only the two gradients, T x d and V x d, are saved for the backward pass.

Summed over several chunks the head's gradient needs float32, twice the memory of a head in half
precision. That of a large one is computed by rows instead, from logits that are computed again.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lowrank.optimizers import QuantizedWeight

IGNORED = -100
CHUNK_BYTES = 64 << 20
#: Bytes of logits in float32 where those in half precision are there already.
PIECE_BYTES = 8 << 20
#: Bytes of a sum in float32 from which on a head in half precision has its gradient by rows.
SUM_BYTES = 128 << 20


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
        return _forward(hidden_td, _dense(weight, hidden), targets_t, size, None, None)[0]
    loss: Tensor = _ChunkedCrossEntropy.apply(hidden_td, weight, targets_t, size)  # type: ignore[no-untyped-call]
    return loss


def by_rows(weight: Tensor, tokens: int, chunk: int) -> bool:
    """Whether the head's gradient is computed by rows of the vocabulary, not by chunks of tokens.

    Each number is then summed over all tokens in one product and rounded once, as exact as can be;
    it takes another 2 T d V operations for the logits, of the 6 T d V that the head has.
    """
    return _is_half(weight.dtype) and tokens > chunk and 4 * weight.numel() >= SUM_BYTES


def _is_half(dtype: torch.dtype) -> bool:
    return dtype in (torch.bfloat16, torch.float16)


def _dense(weight_vd: Tensor, hidden: Tensor) -> Tensor:
    if isinstance(weight_vd, QuantizedWeight):  # once, not in each product
        return weight_vd.dequantize(hidden.dtype)
    return weight_vd


def _forward(
    hidden_td: Tensor,
    weight_vd: Tensor,
    targets_t: Tensor,
    chunk: int,
    grad_hidden_td: Tensor | None,
    grad_weight_vd: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """The summed loss and each token's logsumexp (T, 1); fills gradients where buffers are given.

    They are those of the sum; the weight's is added to its buffer.
    """
    exact = _exact(hidden_td)
    total = torch.zeros((), dtype=exact, device=hidden_td.device)
    log_sums_t1 = torch.empty(len(hidden_td), 1, dtype=exact, device=hidden_td.device)
    for start in range(0, hidden_td.shape[0], chunk):
        rows = slice(start, start + chunk)
        hidden_cd, targets_c = hidden_td[rows], targets_t[rows]
        counts_c = targets_c != IGNORED
        index_c1 = torch.where(counts_c, targets_c, 0).unsqueeze(1)
        logits_cv = (hidden_cd @ weight_vd.T).to(exact)
        log_sum_c1 = torch.logsumexp(logits_cv, dim=1, keepdim=True)
        log_sums_t1[rows] = log_sum_c1
        losses_c1 = log_sum_c1 - logits_cv.gather(1, index_c1)
        total += torch.where(counts_c, losses_c1.squeeze(1), 0).sum()
        if grad_hidden_td is None and grad_weight_vd is None:
            continue
        ones_c1 = torch.ones_like(log_sum_c1)
        grad_cv = _gradient(logits_cv, log_sum_c1, index_c1, ones_c1, counts_c)
        grad_cv = grad_cv.to(weight_vd.dtype)
        if grad_hidden_td is not None:
            torch.mm(grad_cv, weight_vd, out=grad_hidden_td[rows])
        if grad_weight_vd is not None:
            if grad_weight_vd.dtype == grad_cv.dtype:
                grad_weight_vd.addmm_(grad_cv.T, hidden_cd)
            else:
                grad_weight_vd += grad_cv.T @ hidden_cd
    return total, log_sums_t1


def _weight_by_rows(
    hidden_td: Tensor, weight_vd: Tensor, targets_t: Tensor, log_sums_t1: Tensor
) -> Tensor:
    """The weight's gradient of the summed loss, some rows of the vocabulary at a time."""
    gradient_vd = torch.empty_like(weight_vd)
    counts_t = targets_t != IGNORED
    size = chunk_tokens(len(hidden_td))
    for start in range(0, len(weight_vd), size):
        weight_rd = weight_vd[start : start + size]
        own_t = counts_t & (targets_t >= start) & (targets_t < start + len(weight_rd))
        index_t1 = torch.where(own_t, targets_t - start, 0).unsqueeze(1)
        ones_t1 = own_t.unsqueeze(1).to(log_sums_t1.dtype)
        grad_tr = hidden_td @ weight_rd.T  # logits, replaced a few tokens at a time
        few = max(1, PIECE_BYTES // (4 * len(weight_rd)))
        for first in range(0, len(hidden_td), few):
            piece = slice(first, first + few)
            wide = grad_tr[piece].to(log_sums_t1.dtype)
            own = (t[piece] for t in (log_sums_t1, index_t1, ones_t1, counts_t))
            grad_tr[piece] = _gradient(wide, *own)
        torch.mm(grad_tr.T, hidden_td, out=gradient_vd[start : start + size])
    return gradient_vd


def _gradient(
    logits: Tensor, log_sums: Tensor, index: Tensor, ones: Tensor, counts: Tensor
) -> Tensor:
    """In the place of the logits: softmax minus one-hot."""
    grad = logits.sub_(log_sums).exp_()
    grad.scatter_add_(1, index, -ones)
    # masked_fill_ instead of a product: a masked row may hold inf or nan
    return grad.masked_fill_(~counts.unsqueeze(1), 0)


def _exact(tensor: Tensor) -> torch.dtype:
    return torch.float64 if tensor.dtype == torch.float64 else torch.float32


class _ChunkedCrossEntropy(torch.autograd.Function):
    """Loss and gradients of `chunked_cross_entropy` in one pass over the chunks."""

    @staticmethod
    def forward(
        ctx: Any, hidden_td: Tensor, weight_vd: Tensor, targets_t: Tensor, chunk: int
    ) -> Tensor:
        wants_hidden, wants_weight = ctx.needs_input_grad[:2]
        weight_vd = _dense(weight_vd, hidden_td)
        grad_hidden = torch.empty_like(hidden_td) if wants_hidden else None
        grad_weight = None
        rows = wants_weight and by_rows(weight_vd, len(hidden_td), chunk)
        if wants_weight and not rows:
            # Chunks are summed in float32: in bfloat16 the later ones would be rounded away.
            narrow = _is_half(weight_vd.dtype) and len(hidden_td) > chunk
            dtype = torch.float32 if narrow else weight_vd.dtype
            grad_weight = torch.zeros_like(weight_vd, dtype=dtype)
        loss, log_sums = _forward(hidden_td, weight_vd, targets_t, chunk, grad_hidden, grad_weight)
        if rows:
            grad_weight = _weight_by_rows(hidden_td, weight_vd, targets_t, log_sums)
        elif grad_weight is not None:
            grad_weight = grad_weight.to(weight_vd.dtype)
        ctx.save_for_backward(grad_hidden, grad_weight)
        return loss

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
        # What no later pass will read is scaled in place, without a second head's size of memory.
        again = torch._C._autograd._get_current_graph_task_keep_graph()
        scale = torch.mul if again else Tensor.mul_
        scaled = tuple(
            None if value is None else scale(value, grad.to(value.dtype))
            for value in ctx.saved_tensors
        )
        return scaled[0], scaled[1], None, None
