"""Checkpoint files of sharded models and optimizers, of which no process has the whole.

The weights go into the same ``model.safetensors`` as any run's, one parameter at a time: each is
gathered, and rank 0 writes it. Whoever reads it reads its own parts. The optimizer's sharded
tensors are written by all processes at once through `torch.distributed.checkpoint`
(``__N_0.distcp`` and ``.metadata``); in ``optimizer.pt`` marks stand in their places. So a
checkpoint can be read by any number of processes, sharded or not.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.checkpoint import state_dict_loader, state_dict_saver
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import FileSystemReader, FileSystemWriter
from torch.distributed.tensor import DTensor
from torch.distributed.tensor import empty as empty_sharded

from .distributed import World
from .files import WriteError
from .sharding import local, local_part
from .tensor_files import difference, opened

OPTIMIZER = "optimizer.pt"
_MARK = "sharded tensor"


def read_weights(network: nn.Module, path: Path) -> None:
    """Copies a safetensors file's tensors into a network, of sharded ones this process's parts.

    Raises:
        RuntimeError: names or shapes aren't the network's; nothing is changed.
    """
    tensors = network.state_dict()
    with opened(path) as files:
        slices = {name: file.get_slice(name) for name, file in files.items()}
        stored = {name: part.get_shape() for name, part in slices.items()}
        wrong = difference(stored, {name: tensor.shape for name, tensor in tensors.items()})
        if wrong:
            raise RuntimeError(wrong)
        for name, tensor in tensors.items():
            local(tensor).copy_(slices[name][local_part(tensor)])


def without_shards(state: Any) -> tuple[Any, dict[str, DTensor]]:
    """A state of nested dictionaries and lists with marks instead of sharded tensors, and those.

    The marks are plain values; `torch.load` reads them with ``weights_only=True``.
    """
    found: dict[str, DTensor] = {}

    def visit(item: Any, path: str) -> Any:
        if isinstance(item, DTensor):
            found[path] = item
            return {_MARK: path, "shape": list(item.shape), "dtype": str(item.dtype)}
        if isinstance(item, Mapping):
            return {key: visit(value, f"{path}.{key}") for key, value in item.items()}
        if isinstance(item, list | tuple):
            return type(item)(visit(value, f"{path}.{at}") for at, value in enumerate(item))
        return item

    return visit(state, "optimizer"), found


def write_shards(shards: Mapping[str, Tensor], folder: Path, world: World) -> None:
    """Writes sharded tensors into a checkpoint's folder; every process must call it.

    Raises:
        WriteError: a process can't write, or doesn't see the folder that rank 0 has made.
    """
    blind = [rank for rank, seen in enumerate(world.gather(folder.is_dir())) if not seen]
    if blind:
        raise WriteError(
            None,
            f"rank {blind[0]} doesn't see this folder of rank 0's; --output must be on a file"
            " system that all machines share",
            str(folder),
        )
    try:
        state_dict_saver.save(dict(shards), storage_writer=FileSystemWriter(folder))
    except CheckpointException as error:
        rank, (reason, _) = next(iter(error.failures.items()))
        system = reason if isinstance(reason, OSError) else None
        text = f"{(system and system.strerror) or reason} on rank {rank}"
        raise WriteError(system and system.errno, text, str(folder)) from error


def check_replicas(state: Any, world: World) -> None:
    """Checks that what is not sharded is equal on all processes, as rank 0 alone saves it.

    Raises:
        RuntimeError: a tensor differs; the message has its place in the state.
    """
    own = {
        name: float(tensor.detach().double().sum().nan_to_num())
        for name, tensor in _plain_tensors(state, "optimizer")
    }
    for other in world.gather(own):
        differing = [name for name in own | other if own.get(name) != other.get(name)]
        if differing:
            raise RuntimeError(
                f"{differing[0]} of the optimizer's state differs between processes and isn't"
                " sharded, so a checkpoint can't hold it"
            )


def _plain_tensors(item: Any, path: str) -> Iterator[tuple[str, Tensor]]:
    if isinstance(item, Tensor) and not isinstance(item, DTensor):
        yield path, item
    elif isinstance(item, Mapping):
        for key, value in item.items():
            yield from _plain_tensors(value, f"{path}.{key}")
    elif isinstance(item, list | tuple):
        for at, value in enumerate(item):
            yield from _plain_tensors(value, f"{path}.{at}")


def read_optimizer(
    folder: Path, optimizer: torch.optim.Optimizer, saved: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """A checkpoint's state of an optimizer, as this process's `load_state_dict` takes it.

    Tensors are sharded as the optimizer's own are now, or as its parameters of the same shape
    are, whether they were sharded when they were saved or not.

    Args:
        folder: the checkpoint.
        optimizer: the one to go on with.
        saved: the state, if it isn't in ``optimizer.pt``.

    Returns:
        The state. Every process must call it if tensors were saved sharded.
    """
    if saved is None:
        saved = torch.load(folder / OPTIMIZER, map_location="cpu", weights_only=True)
    now = optimizer.state_dict()["state"]
    params = [param for group in optimizer.param_groups for param in group["params"]]
    wanted: dict[str, Tensor] = {}

    def place(item: Any, like: Callable[[torch.Size], DTensor | None]) -> Any:
        marked = isinstance(item, Mapping) and _MARK in item
        if marked:
            shape = torch.Size(item["shape"])
            dtype = getattr(torch, item["dtype"].removeprefix("torch."))
            model = like(shape)
            made = (
                torch.empty(shape, dtype=dtype)
                if model is None
                else empty_sharded(
                    *shape,
                    dtype=dtype,
                    device_mesh=model.device_mesh,
                    placements=model.placements,
                )
            )
            wanted[item[_MARK]] = made
            return made
        if isinstance(item, Tensor) and (model := like(item.shape)) is not None:
            own = item[local_part(model)].clone().to(model.device)
            return DTensor.from_local(
                own,
                model.device_mesh,
                model.placements,
                run_check=False,
                shape=model.shape,
                stride=model.stride(),
            )
        if isinstance(item, Mapping):
            return {key: place(value, like) for key, value in item.items()}
        if isinstance(item, list | tuple):
            return type(item)(place(value, like) for value in item)
        return item

    placed: dict[Any, dict[str, Any]] = {}
    for number, entries in saved["state"].items():
        param = params[number] if isinstance(number, int) and number < len(params) else None
        placed[number] = {
            key: place(value, _model(now.get(number, {}).get(key), param))
            for key, value in entries.items()
        }
    if wanted:
        alone = not dist.is_initialized()
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="torch.distributed is disabled")
            state_dict_loader.load(wanted, storage_reader=FileSystemReader(folder), no_dist=alone)
    return {**saved, "state": placed}


def _model(now: Any, param: Tensor | None) -> Callable[[torch.Size], DTensor | None]:
    """Which sharded tensor one of a shape is to be laid out like; None for a plain one."""

    def like(shape: torch.Size) -> DTensor | None:
        # LISA's layers have empty moments, of plain tensors, while they rest.
        if isinstance(now, DTensor):
            return now if shape.numel() else None
        if isinstance(now, Tensor) and now.numel():
            return None
        if isinstance(param, DTensor) and param.shape == shape:
            return param
        return None

    return like
