"""FSDP2: a `LanguageModel` of which each process holds a part, from the first weights on."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, Shard
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from .config import ModelConfig
from .distributed import World
from .missing import require
from .models import LanguageModel, first_values, prepared, unfilled_network


def build_sharded(
    config: ModelConfig, sequence_length: int, seed: int, world: World
) -> LanguageModel:
    """A model with its first weights, sharded over all processes; each must call it.

    The weights are those of `build_model` with the same seed. No process ever holds more than
    one whole parameter besides its own parts.

    Args:
        config: shape, dtype and activation checkpointing.
        sequence_length: longest input in tokens.
        seed: seeds torch's generator, and so the random numbers after it.
        world: the processes.
    """
    network, first = unfilled_network(config, sequence_length, seed, world.device)
    model = prepared(network, config)
    shard(model, init_device_mesh(world.device.type, (world.size,)))
    _allocate(model, world.device)
    with torch.no_grad():
        for _, parameter, value in first_values(network, first, config):
            local(parameter).copy_(value[local_part(parameter)])
    return model


def shard(model: LanguageModel, mesh: DeviceMesh) -> None:
    """Applies `fully_shard` to each decoder layer, then to the model with all that is left.

    The root is the `LanguageModel`, whose forward pass reads the output head's weight itself.
    """
    placement = shard_placement(model, mesh.size())
    for layer in model.network.model.layers:
        fully_shard(layer, mesh=mesh, shard_placement_fn=placement)
    fully_shard(model, mesh=mesh, shard_placement_fn=placement)


def shard_placement(model: nn.Module, size: int) -> Callable[[nn.Parameter], Shard | None]:
    """Which dimension of a parameter FSDP2 divides: the longer one of a linear layer's weight.

    A low-rank optimizer projects a matrix's shorter dimension. Divided along the longer one, a
    process's part needs no other part's entries for its projection, and refreshes exchange a
    Gram matrix of the shorter side. FSDP2 divides other dimensions than the first only evenly,
    so a wide weight whose columns don't divide stays divided by rows, its default (None).

    Args:
        model: whose linear layers are meant.
        size: number of processes.
    """
    weights = {id(item.weight) for item in model.modules() if isinstance(item, nn.Linear)}

    def placement(parameter: nn.Parameter) -> Shard | None:
        if id(parameter) not in weights:
            return None
        rows, columns = parameter.shape
        return Shard(1) if rows < columns and columns % size == 0 else None

    return placement


def _allocate(model: nn.Module, device: torch.device) -> None:
    """Gives parameters on the meta device memory; the buffers, which hold values, keep them."""
    kept = [(name, buffer.clone()) for name, buffer in model.named_buffers()]
    model.to_empty(device=device)
    made = dict(model.named_buffers())
    for name, buffer in kept:
        made[name].copy_(buffer)


def local(tensor: Tensor) -> Tensor:
    """This process's part of a tensor, sharing its memory; a plain tensor is its own part."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def whole(tensor: Tensor) -> Tensor:
    """All of a tensor, on every process; each must call it for a sharded one.

    Of a parameter that ZeRO's stage 3 has cut: the parameter itself, not one detached from it.
    """
    if hasattr(tensor, "ds_id"):
        with require("deepspeed", "deepspeed").zero.GatheredParameters([tensor]):
            return tensor.detach().clone()
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def whole_shape(tensor: Tensor) -> torch.Size:
    """The shape of all of a tensor; stage 3 of ZeRO leaves a parameter none of its own."""
    return torch.Size(getattr(tensor, "ds_shape", tensor.shape))


def is_sharded(model: nn.Module) -> bool:
    """Whether a model's parameters are divided among processes by FSDP2."""
    return any(isinstance(parameter, DTensor) for parameter in model.parameters())


def local_part(tensor: Tensor) -> tuple[slice, ...]:
    """Where this process's part lies in the whole tensor; all of it for a plain tensor."""
    if not isinstance(tensor, DTensor):
        return tuple(slice(0, length) for length in tensor.shape)
    shape, offset = compute_local_shape_and_global_offset(
        tensor.shape, tensor.device_mesh, tensor.placements
    )
    return tuple(slice(start, start + length) for start, length in zip(offset, shape, strict=True))


def reshard(module: Any) -> None:
    """Frees the whole parameters that an FSDP2 root keeps after a pass without a backward one."""
    if isinstance(module, FSDPModule):
        module.reshard()
