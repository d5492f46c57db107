"""Which processes train copies of an optimizer's parameters, by what is alive in this process.

`DistributedDataParallel` modules, the dimensions of a DTensor's mesh that it isn't spread over, and
DeepSpeed's engines that divide nothing (ZeRO stage 0).
"""

from __future__ import annotations

import gc
import sys
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from torch import Tensor, distributed, nn
from torch.nn.parallel import DistributedDataParallel

from .options import Group
from .sharding import is_dtensor

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


class ModelPart(NamedTuple):
    """Parameters of a module in copies of which an optimizer doesn't have all.

    Attributes:
        group: the processes that have the module's copies.
        all_names: of the module's trained parameters.
        names: of those that the optimizer has.
    """

    group: ProcessGroup
    all_names: tuple[str, ...]
    names: tuple[str, ...]


class Copies(NamedTuple):
    """Where an optimizer's parameters have copies.

    Attributes:
        groups: of processes whose optimizers all take the same steps.
        parts: other processes may have other parts of the module's parameters
            (`ZeroRedundancyOptimizer`), or none.
    """

    groups: list[ProcessGroup]
    parts: list[ModelPart]


def find_copies(params: Sequence[Tensor], groups: Sequence[Group]) -> Copies:
    """Where these parameters have copies.

    Args:
        params: DTensors, and parameters that are whole here.
        groups: the optimizer's own list of groups, by which an engine of DeepSpeed is known.
    """
    made = Copies([], [])
    if not _several():
        return made
    found: dict[ProcessGroup, None] = dict.fromkeys(engine_groups(groups))
    for param in params:
        if is_dtensor(param):
            mesh, placements = param.device_mesh, param.placements  # type: ignore[attr-defined]
            for dim, placement in enumerate(placements):
                if placement.is_replicate() and mesh.size(dim) > 1:
                    found[mesh.get_group(dim)] = None
    plain = [param for param in params if not is_dtensor(param)]
    held = {id(param) for param in plain}
    for parallel in _wrappers(plain):
        trained = {n: p for n, p in parallel.module.named_parameters() if p.requires_grad}
        own = tuple(name for name, param in trained.items() if id(param) in held)
        if parallel.process_group.size() == 1 or parallel._join_config.enable:
            continue
        if len(own) == len(trained):
            found[parallel.process_group] = None
        elif own:
            made.parts.append(ModelPart(parallel.process_group, tuple(trained), own))
    made.groups.extend(found)
    return made


def in_copies(params: Iterable[Tensor]) -> bool:
    """Whether parameters are in a module that `DistributedDataParallel` has wrapped."""
    if not (distributed.is_available() and distributed.is_initialized()):
        return False
    return bool(_wrappers(params))


def _several() -> bool:
    available = distributed.is_available() and distributed.is_initialized()
    return available and distributed.get_world_size() > 1


def engine_groups(groups: Sequence[Group]) -> list[ProcessGroup]:
    """The processes of DeepSpeed's engine, if one without ZeRO takes this optimizer's steps."""
    loaded = sys.modules.get("deepspeed.runtime.engine")
    if loaded is None:
        return []
    return [
        engine.seq_data_parallel_group
        for engine in _alive(loaded.DeepSpeedEngine)
        if getattr(getattr(engine, "basic_optimizer", None), "param_groups", None) is groups
        and not engine.zero_optimization()
        and engine.seq_data_parallel_group.size() > 1
    ]


def _wrappers(params: Iterable[Tensor]) -> list[DistributedDataParallel]:
    """The DDP modules with any of these parameters; they may be younger than the optimizer."""
    wanted = {id(param) for param in params}
    alive = distributed.distributed_c10d._world.pg_map
    return [
        held
        for held in (_alive(DistributedDataParallel) if wanted else ())
        if getattr(held, "process_group", None) in alive
        and any(id(param) in wanted for param in held.module.parameters())
    ]


def _alive(kind: type[nn.Module]) -> Iterator[Any]:
    """Objects of a class or one that is derived from it."""
    kinds = set(_with_subclasses(kind))
    # Objects refer to their class; one look through all objects takes a twentieth of a second.
    yield from (held for held in gc.get_referrers(*kinds) if type(held) in kinds)


def _with_subclasses(kind: type[nn.Module]) -> Iterator[type[nn.Module]]:
    yield kind
    for own in kind.__subclasses__():
        yield from _with_subclasses(own)
