"""A network's weights as a dense model has them, made one at a time where they are written."""

from __future__ import annotations

import copy
from functools import partial

import torch
from torch import Tensor, nn

from lowrank.optimizers.layers import FactoredLinear
from lowrank.optimizers.layers.convert import factored_layers
from lowrank.optimizers.weights.state import dense_sources, layer_of

from .sharding import whole
from .stored import Stored


def dense_weights(network: nn.Module) -> dict[str, Stored]:
    """What `dense_state_dict` gives, in the same order, without making any of it."""
    return {
        name: _effective(source) if isinstance(source, FactoredLinear) else Stored.of(source)
        for name, source in dense_sources(network).items()
    }


def own_tensors(network: nn.Module) -> dict[str, Stored]:
    """What a state dict of replaced layers has beside the dense weights, divided as it is."""
    layers = dict(factored_layers(network))
    return {
        name: Stored.of(tensor)
        for name, tensor in network.state_dict(keep_vars=True).items()
        if (prefix := layer_of(name, layers)) is not None and name != f"{prefix}.bias"
    }


def _effective(layer: FactoredLinear) -> Stored:
    """The weight of a layer that may be sharded."""
    shape = torch.Size((layer.out_features, layer.in_features))
    return Stored(shape, layer.dtype, partial(_multiplied, layer))


def _multiplied(layer: FactoredLinear) -> Tensor:
    """With whole parameters; the layer's other tensors are shared."""
    twin = copy.copy(layer)
    vars(twin)["_parameters"] = {
        name: None if param is None else nn.Parameter(whole(param).detach(), requires_grad=False)
        for name, param in layer._parameters.items()
    }
    return twin.effective_weight().to(layer.dtype)
