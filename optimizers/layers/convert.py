"""Putting factored layers in the place of a model's linear layers, and plain ones back."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from typing import Any

from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from lowrank.cuda.noise import mix

from ..engine import checks
from ..param_groups import PATTERNS, projected_layers
from .base import FactoredLinear


def factored_layers(model: nn.Module) -> Iterator[tuple[str, FactoredLinear]]:
    """Each factored layer once, with its name."""
    for name, module in model.named_modules():
        if isinstance(module, FactoredLinear):
            yield name, module


def to_factored(
    model: nn.Module,
    kind: type[FactoredLinear],
    *,
    patterns: Sequence[str] = PATTERNS,
    rank: int = 128,
    seed: int = 0,
    **options: Any,
) -> None:
    """In place: a layer of `kind` for each linear layer that matches; those that are one stay.

    Args:
        model: the model, before an optimizer is made or it is wrapped.
        kind: the layer.
        patterns: parts of module names.
        rank: r of the factors, clamped to each matrix.
        seed: of everything random; equal seeds give equal layers on every process.
        **options: the layer's own.

    Raises:
        ValueError: an option is out of range, no layer matches, or the model is wrapped or already
            converted for another method.
    """
    checks.integer("rank", rank, low=1)
    checks.integer("seed", seed, low=0)
    present = list(factored_layers(model))
    for name, layer in present:
        if type(layer) is not kind:
            raise ValueError(
                f"{name} is a {type(layer).__name__}: accepted for {kind.__name__} are dense "
                "models (merge(model) makes one)"
            )
    if present:
        return
    targets = projected_layers(model, patterns)
    if any(isinstance(module, DistributedDataParallel) for module in model.modules()):
        raise ValueError(
            "a model inside DistributedDataParallel can't be converted: accepted is "
            "convert(name, model) before wrapping"
        )
    made: dict[nn.Module, nn.Module] = {
        layer: kind.of(layer, mix(seed, index), rank=rank, **options)
        for index, layer in enumerate(targets)
        if layer.weight.numel()
    }
    replace_modules(model, made)


def merge_factored(model: nn.Module) -> None:
    """In place: a plain linear layer for each factored one."""
    replace_modules(model, {layer: layer.to_linear() for _, layer in factored_layers(model)})


def replace_modules(model: nn.Module, made: dict[nn.Module, nn.Module]) -> None:
    """In place: exchanges submodules, wherever they are registered."""
    for parent in list(model.modules()):
        for name, child in list(parent._modules.items()):
            if child is not None and child in made:
                setattr(parent, name, made[child])


def meta_copy(model: nn.Module) -> nn.Module:
    """A copy of a model's structure on the meta device, whose tensors have no memory."""
    memo: dict[int, Any] = {}
    for tensor in (*model.parameters(), *model.buffers()):
        empty: Tensor = tensor.detach().to("meta")
        if isinstance(tensor, nn.Parameter):
            empty = nn.Parameter(empty, tensor.requires_grad)
        memo[id(tensor)] = empty
    return copy.deepcopy(model, memo)
