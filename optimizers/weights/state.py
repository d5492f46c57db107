"""Quantised weights in a module's state dict: plain tensors, which any file format can store.

The hooks are module-level functions, so that layers with hooks can be copied and pickled.
"""

from __future__ import annotations

from collections.abc import Mapping
from itertools import takewhile
from typing import Any

import torch
from torch import Tensor, nn

from ..layers.base import FactoredLinear
from ..layers.convert import factored_layers
from .quantized import QuantizedWeight

#: Names of what a weight in either width is saved as; see `formats`.
PARTS = ("codes", "scales", "zeros")
#: Key of the group size, an int64 0-d tensor; state dicts of version 0.1 have none.
GROUP_SIZE = "group_size"


def attach(module: nn.Module) -> None:
    """Adds hooks that save the layer's weight as plain tensors and load it back.

    They are `weight.codes`, `.scales`, (in eight bits) `.zeros`, and `.group_size`.
    """
    detach(module)
    module.register_state_dict_post_hook(split_weight)  # type: ignore[no-untyped-call]
    module.register_load_state_dict_pre_hook(join_weight)  # type: ignore[no-untyped-call]


def is_attached(module: nn.Module) -> bool:
    """Whether a module has the hooks."""
    return any(saved is split_weight for saved in module._state_dict_hooks.values())


def detach(module: nn.Module) -> None:
    """Removes the hooks."""
    for key, saved in list(module._state_dict_hooks.items()):
        if saved is split_weight:
            del module._state_dict_hooks[key]
    for key, loaded in list(module._load_state_dict_pre_hooks.items()):
        if getattr(loaded, "hook", None) is join_weight:
            del module._load_state_dict_pre_hooks[key]


def split_weight(
    module: nn.Module, state_dict: dict[str, Any], prefix: str, local_metadata: object
) -> None:
    """In a new state dict: replaces the weight by its parts, except with `keep_vars=True`."""
    name = f"{prefix}weight"
    weight = state_dict.get(name)
    if not isinstance(weight, QuantizedWeight) or weight is module.weight:
        return
    # Keeps the order of entries; few follow, since this module was saved last.
    following = list(takewhile(lambda key: key != name, reversed(state_dict)))
    del state_dict[name]
    for part, tensor in zip(weight.storage_format().PARTS, weight.parts(), strict=True):
        state_dict[f"{name}.{part}"] = tensor
    state_dict[f"{name}.{GROUP_SIZE}"] = torch.tensor(weight.group_size, device="cpu")
    for key in reversed(following):
        state_dict[key] = state_dict.pop(key)


def join_weight(
    module: nn.Module,
    state_dict: dict[str, Any],
    prefix: str,
    local_metadata: Mapping[str, Any],
    strict: bool,
    missing_keys: list[str],
    unexpected_keys: list[str],
    error_msgs: list[str],
) -> None:
    """In a state dict to be loaded: joins the parts to a weight; a dense weight is unchanged.

    Parts in another width or group size than the weight's are an error, even if the shapes agree. A
    dense weight is rounded to the nearest codes.
    """
    own = module.weight
    if not isinstance(own, QuantizedWeight):
        return
    name = f"{prefix}weight"
    size = int(state_dict.pop(f"{name}.{GROUP_SIZE}", own.group_size))
    saved = {part: f"{name}.{part}" for part in PARTS if f"{name}.{part}" in state_dict}
    bits = 8 if "zeros" in saved else 4
    if {"codes", "scales"} <= saved.keys():
        parts = [state_dict.pop(key) for key in saved.values()]
        state_dict[name] = own.detach()
        if bits != own.BITS:
            error_msgs.append(
                f"{name} is saved in {bits} bits, and the layer has {own.BITS}: accepted is a "
                f"model converted with weight_bits={bits}"
            )
        elif size != own.group_size:
            error_msgs.append(
                f"{name} is saved in groups of {size}, and the layer has groups of "
                f"{own.group_size}: accepted is a model converted with weight_group_size={size}"
            )
        else:
            try:
                state_dict[name] = own.of_parts(parts, own.shape, own.group_size)
            except ValueError as error:
                error_msgs.append(f"{name}: {error} (the layer has groups of {own.group_size})")
        return
    dense = state_dict.get(name)
    if isinstance(dense, Tensor) and not isinstance(dense, QuantizedWeight):
        if dense.shape == own.shape and not own.is_meta:
            state_dict[name] = _nearest(own, dense)
        elif local_metadata.get("assign_to_params_buffers", False):
            state_dict[name] = own.quantize(dense, own.group_size)


def _nearest(own: QuantizedWeight, dense: Tensor) -> QuantizedWeight:
    """A copy of a weight, with other values: the nearest, and the same codes for equal ones."""
    made = own.like([part.clone() for part in own.parts()])
    made.assign(dense, nearest=True)
    return made


def dense_state_dict(module: nn.Module) -> dict[str, Tensor]:
    """A module's state dict on the CPU, as of the equivalent dense model.

    Quantised weights are dense under their own names, and a factored layer has its effective
    `weight`. A dense model and other tools can load it: for a Hugging Face model
    `model.save_pretrained(folder, state_dict=dense_state_dict(model))`.
    """
    dense: dict[str, Tensor] = {}
    for name, source in dense_sources(module).items():
        if isinstance(source, FactoredLinear):
            dense[name] = source.effective_weight().to("cpu", source.dtype)
            continue
        here = source.detach().to("cpu")
        dense[name] = here.dequantize() if isinstance(here, QuantizedWeight) else here
    return dense


def dense_sources(module: nn.Module) -> dict[str, Tensor | FactoredLinear]:
    """What each entry of `dense_state_dict` is made of: the module's tensor, or a factored layer.

    Nothing is copied or computed.
    """
    layers = dict(factored_layers(module))
    found: dict[str, Tensor | FactoredLinear] = {}
    for name, tensor in module.state_dict(keep_vars=True).items():
        prefix = layer_of(name, layers)
        if prefix is None or name == f"{prefix}.bias":
            found[name] = tensor
        else:
            found[f"{prefix}.weight"] = layers[prefix]
    return found


def layer_of(name: str, layers: Mapping[str, object]) -> str | None:
    """The name of the one of `layers` that contains a tensor, also in a submodule."""
    while "." in name:
        name = name.rpartition(".")[0]
        if name in layers:
            return name
    return None
