"""Networks whose layers a method has replaced, divided among processes by FSDP2 or DeepSpeed.

Their checkpoints are those of a run on one process: dense weights in ``model.safetensors``, which
`from_pretrained` reads, and the layers' own tensors beside them. Each layer is gathered, made dense
and dropped in turn.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor

from lowrank.optimizers import convert
from lowrank.optimizers.engine.method import TABLE
from lowrank.optimizers.layers.convert import factored_layers

from .config import RunConfig
from .distributed import World
from .missing import require
from .models import LanguageModel
from .sharding import local_part, shard
from .tensor_files import opened


def replaces_layers(config: RunConfig) -> bool:
    """Whether the run's method trains layers of its own in the place of linear ones."""
    name = config.optimizer.name
    return name in TABLE and TABLE[name].conversion.replaces_layers


def is_converted(network: nn.Module) -> bool:
    """Whether a network has such layers."""
    return any(True for _ in factored_layers(network))


def convert_and_shard(
    config: RunConfig, model: LanguageModel, options: dict[str, Any], world: World
) -> None:
    """In place: replaces a whole model's layers, then divides it by FSDP2; all processes call it.

    Factors and frozen weights are made from whole matrices, so that each process builds the whole
    model before.

    Args:
        config: the run's settings.
        model: the same on every process.
        options: of the optimizer.
        world: the processes.
    """
    convert(config.optimizer.name, model.network, **options)
    shard(model, init_device_mesh(world.device.type, (world.size,)))


def read_converted(network: nn.Module, weights: Path, layers: Path) -> None:
    """Loads both files of a checkpoint into a network that FSDP2 has divided.

    Raises:
        RuntimeError: names, shapes or settings aren't the network's.
    """
    wanted = network.state_dict()
    state: dict[str, Tensor] = {}
    with opened(weights, layers) as files:
        for name in files.keys() & wanted.keys():
            like, file = wanted[name], files[name]
            if not isinstance(like, DTensor):
                state[name] = file.get_tensor(name)
                continue
            part = file.get_slice(name)
            if list(part.get_shape()) != list(like.shape):
                raise RuntimeError(
                    f"{name} is {part.get_shape()} in the file and {list(like.shape)} in the"
                    " network"
                )
            state[name] = DTensor.from_local(
                part[local_part(like)].to(like.device),
                like.device_mesh,
                like.placements,
                run_check=False,
                shape=like.shape,
                stride=like.stride(),
            )
    network.load_state_dict(state)


@torch.no_grad()
def read_untrained(network: nn.Module, weights: Path, layers: Path) -> None:
    """Loads what DeepSpeed's stage 3 doesn't train; every process must call it.

    The engine itself reads what it trains.
    """
    with opened(weights, *([layers] if layers.is_file() else [])) as files:
        for name, tensor in network.state_dict(keep_vars=True).items():
            if tensor.requires_grad or name not in files or name.endswith("_extra_state"):
                continue
            value = files[name].get_tensor(name)
            if not hasattr(tensor, "ds_id"):
                tensor.copy_(value)
                continue
            gathered = require("deepspeed", "deepspeed").zero.GatheredParameters
            with gathered([tensor], modifier_rank=0):
                tensor.data.copy_(value)
