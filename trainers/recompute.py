"""Cheap intermediate results of LLaMA's blocks, computed again in the backward pass.

While a block is differentiated everything between its products is alive: of each norm its input in
float32 and its result before the weight, of the MLP the activated gate. They are functions of a
norm's input and of the MLP's products, which are kept anyway, and take no products themselves.
Norms of float32 inputs, which they keep without a copy, stay as they are.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.autograd.graph import get_gradient_edge

from .missing import require


def recompute_between_products(network: nn.Module) -> None:
    """In place: the norms and gates of a LLaMA keep no intermediate results for the backward pass.

    Losses and gradients stay the same to the bit. Modules of other classes, subclasses too, are
    left as they are.

    Raises:
        MissingExtraError: `transformers` is not installed.
    """
    require("transformers", "train")
    from transformers.models.llama.modeling_llama import LlamaMLP, LlamaRMSNorm

    for module in network.modules():
        if type(module) is LlamaRMSNorm:
            module.forward = partial(_norm, module, LlamaRMSNorm.forward)
        elif type(module) is LlamaMLP:
            module.forward = partial(_mlp, module)


def again(function: Callable[..., Tensor], *tensors: Tensor) -> Tensor:
    """A function of tensors that keeps nothing but them for its backward pass.

    Args:
        function: of the tensors alone, without randomness; it is called once more in the pass.
        tensors: each is differentiated if it requires a gradient.
    """
    result: Tensor = _Again.apply(function, *tensors)  # type: ignore[no-untyped-call]
    return result


class _Again(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, function: Callable[..., Tensor], *tensors: Tensor) -> Tensor:
        ctx.function = function
        ctx.save_for_backward(*tensors)
        return function(*tensors)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        wanted = ctx.needs_input_grad[1:]
        own = [
            tensor.detach().requires_grad_(needed)
            for tensor, needed in zip(ctx.saved_tensors, wanted, strict=True)
        ]
        with torch.enable_grad():
            edge = get_gradient_edge(ctx.function(*own))  # of a result that is not kept
        leaves = [tensor for tensor in own if tensor.requires_grad]
        found = iter(torch.autograd.grad(edge, leaves, grad))
        return None, *(next(found) if needed else None for needed in wanted)


def _norm(norm: Any, forward: Callable[..., Tensor], hidden: Tensor) -> Tensor:
    def scaled(hidden: Tensor, weight: Tensor) -> Tensor:
        return forward(SimpleNamespace(**{**vars(norm), "weight": weight}), hidden)

    if hidden.dtype == torch.float32:  # no copy, but a sum of gradients in another order
        return forward(norm, hidden)
    return again(scaled, hidden, norm.weight)


def _mlp(mlp: Any, hidden: Tensor) -> Tensor:
    def gated(gate: Tensor, up: Tensor) -> Tensor:
        activated: Tensor = mlp.act_fn(gate) * up
        return activated

    product: Tensor = mlp.down_proj(again(gated, mlp.gate_proj(hidden), mlp.up_proj(hidden)))
    return product
