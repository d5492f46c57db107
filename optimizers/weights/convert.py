"""Conversion of a model's weights to eight or four bits, and back to dense ones."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain
from types import EllipsisType

from torch import nn

from ..coverage import tell
from ..engine import checks
from ..engine.parameters import whole_shape
from ..layers.convert import check_not_wrapped, merge_factored
from ..param_groups import projected_layers
from ..targets import Patterns, selector
from .formats import GROUP_SIZES
from .int4 import Int4Weight
from .int8 import Int8Weight
from .quantized import QuantizedWeight
from .state import attach, detach, is_attached

#: Names of the options of `to_quantized`.
OPTIONS = ("weight_bits", "weight_group_size", "weight_include")
#: What else may be quantised besides the layers that are projected.
INCLUDE = ("embeddings", "head")
KINDS: dict[int, type[QuantizedWeight]] = {8: Int8Weight, 4: Int4Weight}


def to_quantized(
    model: nn.Module,
    *,
    patterns: Patterns = None,
    weight_bits: int | EllipsisType | None = ...,
    weight_group_size: int | None = None,
    weight_include: Sequence[str] = (),
    default_bits: int | None = None,
) -> None:
    """In place: quantises the weights that `param_groups` projects, and others on request.

    A layer remains an `nn.Linear` or `nn.Embedding`, with a new parameter as its `weight`: convert
    before making an optimizer or wrapping the model. What is quantised already stays as it is.
    Processes that train together need equal weights before (one seed, or one checkpoint):
    `DistributedDataParallel` broadcasts dense copies, which are requantised.

    Args:
        model: the model.
        patterns: as in `param_groups`.
        weight_bits: 8, 4, or None for dense weights; `default_bits` unless given.
        weight_group_size: entries that share a scale (the last group may have fewer); 256 in eight
            bits and 64 in four unless given. An even number in four bits.
        weight_include: what else to quantise: "embeddings" (each `nn.Embedding`), "head" (each
            `nn.Linear` that the patterns don't match).
        default_bits: the method's.

    Raises:
        ValueError: an option is out of range or contradicts another or the model, no layer matches,
            or the model is already wrapped. Nothing is changed then.
    """
    bits = default_bits if isinstance(weight_bits, EllipsisType) else weight_bits
    checks.choice("weight_bits", bits, (8, 4, None))
    include = (weight_include,) if isinstance(weight_include, str) else tuple(weight_include)
    for asked in include:
        checks.choice("weight_include", asked, INCLUDE)
    if weight_group_size is not None:
        checks.integer("weight_group_size", weight_group_size, low=1)
        if bits == 4 and weight_group_size % 2:
            raise ValueError(
                f"weight_group_size={weight_group_size} with weight_bits=4: accepted are even "
                "numbers"
            )
    _check_present(model, bits, given=not isinstance(weight_bits, EllipsisType))
    if bits is None:
        if include or weight_group_size is not None:
            said = f"weight_include={include!r}" if include else ""
            said = said or f"weight_group_size={weight_group_size}"
            raise ValueError(f"{said} with dense weights: accepted with weight_bits=8 or 4")
        return
    targets = _targets(model, patterns, include)
    if not targets:
        return
    check_not_wrapped(model, converting=True)
    size = weight_group_size or GROUP_SIZES[bits]
    made: dict[int, nn.Parameter] = {}
    for layer in targets:
        weight = layer.weight
        assert isinstance(weight, nn.Parameter)
        if id(weight) not in made:
            quantised = KINDS[bits].quantize(weight, size)
            made[id(weight)] = nn.Parameter(quantised, weight.requires_grad)
        layer.weight = made[id(weight)]
        attach(layer)
    whole = sum(param.numel() for param in model.parameters())
    part = sum(p.numel() for p in model.parameters() if isinstance(p, QuantizedWeight))
    tell(f"{part:,} of {whole:,} weights are stored in {bits} bits, in groups of {size}")


def _check_present(model: nn.Module, bits: int | None, *, given: bool) -> None:
    """Raises `ValueError` if a weight is in another width than asked for, or not quantised anymore.

    Wrappers that cut weights into shards (FSDP2) cut a dense copy.
    """
    for name, module in model.named_modules():
        if is_attached(module) and not isinstance(module.weight, QuantizedWeight):
            raise ValueError(
                f"{name}.weight was quantised, and is a {type(module.weight).__name__} now: "
                "accepted are dense weights (weight_bits=None) for fully_shard and other wrappers "
                "that shard weights"
            )
    for name, param in model.named_parameters():
        if given and isinstance(param, QuantizedWeight) and bits != param.BITS:
            raise ValueError(
                f"weight_bits={bits} for a model whose {name} is in {param.BITS} bits already: "
                f"accepted are weight_bits={param.BITS}, or merge(model) before, which makes it "
                "dense"
            )


def _targets(
    model: nn.Module, patterns: Patterns, include: Sequence[str]
) -> list[nn.Linear | nn.Embedding]:
    """Layers to quantise, without those that are; all owners of a tied weight, or none."""
    others: dict[str, list[nn.Linear | nn.Embedding]] = {part: [] for part in include}
    selects = selector(model, patterns)
    for name, module in model.named_modules():
        if isinstance(module, nn.Embedding) and "embeddings" in others:
            _check_embedding(name, module)
            others["embeddings"].append(module)
        elif (
            isinstance(module, nn.Linear)
            and "head" in others
            and not selects(f"{name}.weight", module.weight, module)
        ):
            others["head"].append(module)
    for part, found in others.items():
        if not found:
            what = "nn.Embedding" if part == "embeddings" else "nn.Linear that no pattern matches"
            raise ValueError(
                f"weight_include={tuple(include)!r}: {type(model).__name__} has no {what}; "
                f"accepted are parts that it has, without {part!r}"
            )
    targets = [
        layer
        for layer in (*projected_layers(model, patterns), *chain(*others.values()))
        if whole_shape(layer.weight).numel() and not isinstance(layer.weight, QuantizedWeight)
    ]
    _check_tied(model, targets, include)
    return targets


def _check_tied(model: nn.Module, targets: Sequence[nn.Module], include: Sequence[str]) -> None:
    """Raises `ValueError` if a weight is also that of a module which stays dense."""
    chosen = {id(layer.weight): layer for layer in targets}
    names = {module: name for name, module in model.named_modules()}
    for module, called in names.items():
        for own, param in module.named_parameters(recurse=False):
            if id(param) in chosen and (module not in targets or own != "weight"):
                raise ValueError(
                    f"weight_include={tuple(include)!r}: {names[chosen[id(param)]]}.weight is also "
                    f"{called}.{own}, which is not included: accepted are both (weight_include="
                    f"{INCLUDE!r}), or untied weights"
                )


def _check_embedding(name: str, module: nn.Embedding) -> None:
    if module.max_norm is not None or module.sparse:
        said = "sparse=True" if module.sparse else f"max_norm={module.max_norm}"
        raise ValueError(
            f"weight_include: {name} has {said}; accepted are embeddings without max_norm and "
            "sparse"
        )


def merge(model: nn.Module) -> nn.Module:
    """Makes a converted model dense again, in place; a dense one is unchanged.

    Factored layers become `nn.Linear` with their effective weight, quantised weights become dense;
    tied ones stay tied. Parameters of both are replaced, so an optimizer made before no longer
    trains them.

    Returns:
        The model.
    """
    merge_factored(model)
    made: dict[int, nn.Parameter] = {}
    for module in model.modules():
        weight = getattr(module, "weight", None)
        if isinstance(weight, QuantizedWeight):
            if id(weight) not in made:
                dense = nn.Parameter(weight.dequantize(), weight.requires_grad)
                dense.grad = weight.grad
                made[id(weight)] = dense
            module.weight = made[id(weight)]
            detach(module)
    return model
