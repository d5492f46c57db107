"""A network's weights as a dense model has them, made one at a time where they are written."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Self

import torch
from torch import Tensor, nn

from lowrank.optimizers import QuantizedWeight
from lowrank.optimizers.layers import FactoredLinear
from lowrank.optimizers.layers.convert import factored_layers
from lowrank.optimizers.weights.state import layer_of

from .sharding import whole, whole_shape


@dataclass(frozen=True)
class Stored:
    """A tensor that a file is to have.

    Attributes:
        shape: of the whole.
        dtype: of its entries.
        value: makes it, on any device; of a sharded network every process must call it.
    """

    shape: torch.Size
    dtype: torch.dtype
    value: Callable[[], Tensor]

    @classmethod
    def of(cls, tensor: Tensor) -> Self:
        """A network's own tensor, sharded, quantised or neither."""
        return cls(whole_shape(tensor), tensor.dtype, partial(_dense, tensor))

    @property
    def nbytes(self) -> int:
        """Of the whole."""
        return self.shape.numel() * self.dtype.itemsize


def dense_weights(network: nn.Module) -> dict[str, Stored]:
    """What `dense_state_dict` gives, in the same order, without making any of it."""
    layers = dict(factored_layers(network))
    found: dict[str, Stored] = {}
    for name, tensor in network.state_dict(keep_vars=True).items():
        prefix = layer_of(name, layers)
        if prefix is None or name == f"{prefix}.bias":
            found[name] = Stored.of(tensor)
        elif f"{prefix}.weight" not in found:
            layer = layers[prefix]
            shape = torch.Size((layer.out_features, layer.in_features))
            found[f"{prefix}.weight"] = Stored(shape, layer.dtype, partial(_effective, layer))
    return found


def own_tensors(network: nn.Module) -> dict[str, Stored]:
    """What a state dict of replaced layers has beside the dense weights, divided as it is."""
    layers = dict(factored_layers(network))
    return {
        name: Stored.of(tensor)
        for name, tensor in network.state_dict(keep_vars=True).items()
        if (prefix := layer_of(name, layers)) is not None and name != f"{prefix}.bias"
    }


def _dense(tensor: Tensor) -> Tensor:
    found = whole(tensor).detach()
    return found.dequantize() if isinstance(found, QuantizedWeight) else found


def _effective(layer: FactoredLinear) -> Tensor:
    """The weight of a layer that may be sharded; its other tensors are shared."""
    twin = copy.copy(layer)
    vars(twin)["_parameters"] = {
        name: None if param is None else nn.Parameter(whole(param).detach(), requires_grad=False)
        for name, param in layer._parameters.items()
    }
    return twin.effective_weight().to(layer.dtype)
