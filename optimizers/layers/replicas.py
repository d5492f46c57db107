"""Factored layers under `DistributedDataParallel` (DDP), and what FSDP2 leaves whole.

Factors are handled as other parameters. Each process updates frozen weights, bases and candidates
identically, so DDP is told to ignore them: by default it would broadcast all buffers before each
forward pass. The list of ignored names is relative to the wrapped module, so each
module that contains factored layers has its own; `convert(name, parent)` adds one to a parent
module that is created later.

The first forward pass inside DDP checks that the processes have equal frozen weights. Under FSDP2,
which shards parameters and leaves buffers alone, the optimizer's first step checks the buffers.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, distributed, nn
from torch.nn.parallel import DistributedDataParallel

from ..engine.sharding import is_dtensor
from .base import FactoredLinear

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup
    from torch.distributed.device_mesh import DeviceMesh

_MARK = "_ddp_params_and_buffers_to_ignore"
#: `torch.compile(model)` shows its model's list, with this prefix on names.
_COMPILED = "_orig_mod."
#: Number of entries of each tensor that are compared.
_SAMPLED = 16


def mark_frozen(model: nn.Module) -> None:
    """Makes DDP ignore the frozen tensors of `model` and of each of its modules.

    Layers are checked in their first forward pass inside DDP.
    """
    for module in model.modules():
        if isinstance(module, FactoredLinear):
            _remove_check(module)
            module.register_forward_pre_hook(check_replicas)
        names = _frozen_names(module)
        if names:
            present = getattr(module, _MARK, ())
            setattr(module, _MARK, [*present, *(name for name in names if name not in present)])


def unmark_frozen(model: nn.Module) -> None:
    """Undoes `mark_frozen`; call it before the layers are replaced."""
    for module in model.modules():
        if isinstance(module, FactoredLinear):
            _remove_check(module)
        names = set(_frozen_names(module))
        if names and _MARK in vars(module):
            rest = [name for name in getattr(module, _MARK) if name not in names]
            if rest:
                setattr(module, _MARK, rest)
            else:
                delattr(module, _MARK)


def _frozen_names(module: nn.Module) -> list[str]:
    names = [
        name
        for prefix, layer in module.named_modules()
        if isinstance(layer, FactoredLinear)
        for name in (
            *(name for name, _ in layer.named_buffers(prefix)),
            *(f"{prefix}.{name}" if prefix else name for name in _frozen_parameters(layer)),
        )
    ]
    return names + [_COMPILED + name for name in names]


def _frozen_parameters(layer: FactoredLinear) -> list[str]:
    return [name for name in layer.FROZEN if layer._parameters.get(name) is not None]


def _remove_check(layer: nn.Module) -> None:
    for key, hook in list(layer._forward_pre_hooks.items()):
        if hook is check_replicas:
            del layer._forward_pre_hooks[key]


def check_replicas(layer: nn.Module, inputs: tuple[Any, ...]) -> None:
    """Forward pre-hook: in the first pass inside DDP, compares all layers between processes.

    Modules inside `torch.compile` are not checked.

    Raises:
        RuntimeError: frozen weights differ between processes.
    """
    if torch.compiler.is_compiling():
        return
    parallel = getattr(DistributedDataParallel, "_active_ddp_module", None)
    if parallel is None:
        return
    layers = [
        (name, module)
        for name, module in parallel.module.named_modules()
        if isinstance(module, FactoredLinear)
    ]
    for _, each in layers:
        _remove_check(each)
    if parallel.process_group.size() == 1:
        return
    _warn_of_broadcasts(parallel, [each for _, each in layers])
    _compare(layers, parallel.process_group, "DDP doesn't broadcast them")


def check_buffers(
    layers: Sequence[tuple[str, FactoredLinear]], zero: ProcessGroup | None = None
) -> None:
    """Compares what FSDP2 or DeepSpeed leaves whole in layers between processes; each calls this.

    Args:
        layers: the layers and their names.
        zero: the processes of DeepSpeed's engine.

    Raises:
        RuntimeError: buffers or host tensors differ between processes.
    """
    if zero is not None and layers:
        _compare(layers, zero, "DeepSpeed doesn't broadcast buffers")
        return
    meshes: dict[DeviceMesh, list[tuple[str, FactoredLinear]]] = {}
    for name, layer in layers:
        mesh = getattr(getattr(layer, layer.FACTORS[0]), "device_mesh", None)
        if mesh is not None:
            meshes.setdefault(mesh, []).append((name, layer))
    for mesh, members in meshes.items():
        for group in mesh.get_all_groups():
            if group.size() > 1:
                _compare(members, group, "fully_shard doesn't broadcast them")


def _compare(layers: Sequence[tuple[str, FactoredLinear]], group: ProcessGroup, why: str) -> None:
    samples = [(name, sample) for name, each in layers for sample in _samples(each)]
    if not samples:
        return
    device = next(layers[0][1].parameters()).device
    found = torch.cat([sample for _, sample in samples]).to(device)
    # The maximum of both signs equals the local values on every process only if all are equal.
    both = torch.stack([found, -found])
    distributed.all_reduce(both, op=distributed.ReduceOp.MAX, group=group)
    unequal = (both[0] != -both[1]).cpu()
    first = 0
    for name, sample in samples:
        if bool(unequal[first : first + len(sample)].any()):
            raise RuntimeError(
                f"frozen weights of {name} differ between processes, and {why}: accepted are equal "
                "models before convert or build (torch.manual_seed with one seed, or one "
                "checkpoint, on each process)"
            )
        first += len(sample)


def _samples(layer: FactoredLinear) -> Iterator[Tensor]:
    """A few entries of each frozen tensor that is whole, in fp64 on the CPU."""
    others = (*_frozen_parameters(layer), *layer.host_tensors())
    frozen = [*layer.buffers(), *(getattr(layer, name) for name in others)]
    for tensor in (tensor for tensor in frozen if not is_dtensor(tensor)):
        flat = tensor.detach().flatten()
        if len(flat):
            stride = max(1, len(flat) // _SAMPLED)
            yield flat[::stride][:_SAMPLED].to("cpu", torch.float64).nan_to_num()


def _warn_of_broadcasts(parallel: DistributedDataParallel, layers: list[FactoredLinear]) -> None:
    if not parallel.broadcast_buffers:
        return
    reached = {id(buffer) for buffer in parallel.modules_buffers}
    broadcast = [b for layer in layers for b in layer.buffers() if id(b) in reached]
    if broadcast:
        size = sum(buffer.nbytes for buffer in broadcast)
        warnings.warn(
            f"DistributedDataParallel broadcasts {size} bytes of frozen weights before each "
            f"forward pass, because it wraps a {type(parallel.module).__name__} around the module "
            "that was converted: convert(name, module) with that module before it is wrapped keeps "
            "them out, and so does broadcast_buffers=False",
            stacklevel=2,
        )
