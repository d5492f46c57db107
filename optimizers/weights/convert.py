"""Conversion of a model's linear layers to INT8 weights, and back to dense ones."""

from __future__ import annotations

from torch import nn

from ..engine import checks
from ..layers.convert import check_not_wrapped, merge_factored
from ..param_groups import projected_layers
from ..targets import Patterns
from .int8 import Int8Weight
from .state import attach, detach


def to_int8(
    model: nn.Module,
    *,
    patterns: Patterns = None,
    weight_bits: int | None = 8,
    weight_group_size: int = 256,
) -> None:
    """In place: quantises the weights that `param_groups` projects, if they are not INT8 already.

    A layer remains an `nn.Linear`, with a new parameter as its `weight`: convert before making an
    optimizer or wrapping the model. Processes that train together need equal weights before (one
    seed, or one checkpoint): `DistributedDataParallel` broadcasts dense copies, which are
    requantised.

    Args:
        model: the model.
        patterns: as in `param_groups`.
        weight_bits: 8, or None for no change.
        weight_group_size: entries that share a scale; the last group may have fewer.

    Raises:
        ValueError: an option is out of range, no layer matches, or the model is already wrapped.
    """
    checks.choice("weight_bits", weight_bits, (8, None))
    checks.integer("weight_group_size", weight_group_size, low=1)
    if weight_bits is None:
        return
    for layer in projected_layers(model, patterns):
        weight = layer.weight
        if isinstance(weight, Int8Weight) or not weight.numel():
            continue
        check_not_wrapped(model)
        layer.weight = nn.Parameter(Int8Weight.quantize(weight, weight_group_size))
        attach(layer)


def merge(model: nn.Module) -> nn.Module:
    """Makes a converted model dense again, in place; a dense one is unchanged.

    Factored layers become `nn.Linear` with their effective weight, INT8 weights become dense.
    Parameters of both are replaced, so an optimizer made before no longer trains them.

    Returns:
        The model.
    """
    merge_factored(model)
    for module in model.modules():
        weight = getattr(module, "weight", None)
        if isinstance(weight, Int8Weight):
            module.weight = nn.Parameter(weight.dequantize(), weight.requires_grad)
            module.weight.grad = weight.grad
            detach(module)
    return model
