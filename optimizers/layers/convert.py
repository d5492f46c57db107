"""Conversion of a model's linear layers to factored layers and back."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterator, Mapping
from typing import Any

from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from ..coverage import warn_of_left_out
from ..engine import checks
from ..engine.copies import in_copies
from ..engine.parameters import is_cut
from ..engine.sharding import is_dtensor
from ..engine.zero import partitioned
from ..param_groups import projected_layers
from ..targets import Patterns
from .base import FACTOR, FactoredLinear
from .replicas import mark_frozen, unmark_frozen
from .seeds import layer_seed, named_layers
from .spread import check_whole


def factored_layers(model: nn.Module) -> Iterator[tuple[str, FactoredLinear]]:
    """Each factored layer once, with its name."""
    for name, module in model.named_modules():
        if isinstance(module, FactoredLinear):
            yield name, module


def to_factored(
    model: nn.Module,
    kind: type[FactoredLinear],
    *,
    patterns: Patterns = None,
    rank: int = 128,
    seed: int = 0,
    **options: Any,
) -> None:
    """In place: replaces each linear layer that matches by a layer of `kind`, unless it is one.

    Layers that can't be replaced stay dense, with one warning that names them: subclasses with a
    forward pass of their own, and `out_proj` of `nn.MultiheadAttention`, which reads the weight.
    `DistributedDataParallel` will not broadcast frozen tensors (`layers.replicas`).

    Args:
        model: the model, before an optimizer is made or it is wrapped.
        kind: the layer.
        patterns: as in `param_groups`.
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
        if not isinstance(layer, kind):  # fully_shard makes a subclass
            raise ValueError(
                f"{name} is a {type(layer).__name__}: accepted for {kind.__name__} are dense "
                "models (merge(model) makes one)"
            )
    if present:
        mark_frozen(model)  # `model` may be a parent of the converted model
        return
    targets = projected_layers(model, patterns)
    check_not_wrapped(model, converting=True)
    names = {module: name for name, module in named_layers(model)}
    reasons = _irreplaceable(model)
    kept = {names[layer]: reasons[layer] for layer in targets if layer in reasons}
    targets = [layer for layer in targets if layer not in reasons and layer.weight.numel()]
    if kept:
        said = "; ".join(f"{name} ({reason})" for name, reason in kept.items())
        if not targets:
            raise ValueError(
                f"no layer of {type(model).__name__} that patterns={patterns!r} selects can be "
                f"replaced: {said}; accepted are patterns that match others"
            )
        warnings.warn(f"layers that stay dense: {said}", stacklevel=4)
    warn_of_left_out(model, [f"{names[layer]}.weight" for layer in targets], "in layers replaced")
    made: dict[nn.Module, nn.Module] = {
        layer: kind.of(layer, layer_seed(seed, names[layer]), rank=rank, **options)
        for layer in targets
    }
    replace_modules(model, made)
    for _, factored in factored_layers(model):
        for factor in factored.FACTORS:
            vars(getattr(factored, factor))[FACTOR] = True
    mark_frozen(model)


def check_converted(model: nn.Module, given: Mapping[str, Any]) -> None:
    """Raises `ValueError` for options that layers which are factored already don't have.

    Args:
        model: a model, converted or not.
        given: options of a conversion, as the user gave them.
    """
    for name, layer in factored_layers(model):
        for option, value in given.items():
            own = getattr(layer, option, None)
            if option == "seed" or not isinstance(own, int | float | str):
                continue
            wanted = value
            if option == "rank" and isinstance(value, int):
                wanted = min(value, layer.in_features, layer.out_features)
            if own != wanted:
                raise ValueError(
                    f"{option}={value!r} for a model that is converted already, and {name} has "
                    f"{option}={own!r}: accepted is {option}={own!r} or none, or merge(model) "
                    "before, which makes it dense"
                )


def check_not_wrapped(model: nn.Module, *, converting: bool = False) -> None:
    """Raises `ValueError` for a model that a wrapper has already seen, which would not follow.

    `DistributedDataParallel` doesn't stand in the way of a module inside it unless it is converted:
    it would wait for gradients of the parameters that it has seen.
    """
    wrapper = None
    if any(isinstance(module, DistributedDataParallel) for module in model.modules()):
        wrapper = "DistributedDataParallel"
    elif any(is_dtensor(param) for param in model.parameters()):
        wrapper = "fully_shard (its parameters are DTensors)"
    elif any(hasattr(param, "ds_id") or partitioned(param) for param in model.parameters()):
        wrapper = "DeepSpeed's ZeRO (zero.Init or an engine)"
    elif converting and in_copies(model.parameters()):
        wrapper = "DistributedDataParallel"
    if wrapper is not None:
        raise ValueError(
            f"a model inside {wrapper} can't be converted: accepted is convert(name, model) before "
            "wrapping"
        )


def _irreplaceable(model: nn.Module) -> dict[nn.Module, str]:
    """Linear layers that can't be replaced, and the reasons."""
    reasons: dict[nn.Module, str] = {}
    for module in model.modules():
        if isinstance(module, nn.MultiheadAttention):
            reasons[module.out_proj] = "nn.MultiheadAttention computes with its weight"
        elif isinstance(module, nn.Linear) and type(module).forward is not nn.Linear.forward:
            reasons.setdefault(module, f"{type(module).__name__} has a forward pass of its own")
    return reasons


def merge_factored(model: nn.Module) -> None:
    """In place: replaces each factored layer by a plain linear one.

    Raises:
        ValueError: a layer is spread over processes; nothing is changed then.
    """
    for name, layer in factored_layers(model):
        check_whole(layer, name)
        if any(partitioned(param) for param in layer.parameters(recurse=False)):
            raise ValueError(
                f"{name} is in a DeepSpeed engine, which would go on with parameters that the "
                "model no longer has: accepted is merge(model) of another model that has loaded "
                "this one's state dict"
            )
    unmark_frozen(model)
    replace_modules(model, {layer: layer.to_linear() for _, layer in factored_layers(model)})


def replace_modules(model: nn.Module, made: dict[nn.Module, nn.Module]) -> None:
    """In place: replaces submodules, wherever they are registered."""
    for parent in list(model.modules()):
        for name, child in list(parent._modules.items()):
            if child is not None and child in made:
                setattr(parent, name, made[child])


def meta_copy(model: nn.Module) -> nn.Module:
    """A copy of a model on the meta device, without memory for tensors.

    Raises:
        ValueError: nothing of the model is here.
    """
    if any(is_cut(param) for param in model.parameters()):
        check_not_wrapped(model)
    memo: dict[int, Any] = {}
    host = [getattr(layer, n) for _, layer in factored_layers(model) for n in layer.host_tensors()]
    for tensor in (*model.parameters(), *model.buffers(), *host):
        empty: Tensor = tensor.detach().to("meta")
        if isinstance(tensor, nn.Parameter):
            empty = nn.Parameter(empty, tensor.requires_grad)
        memo[id(tensor)] = empty
    return copy.deepcopy(model, memo)
