"""Whether the processes that train one model have equal options and learning rates.

Unequal ones raise nothing by themselves: weights drift apart, or processes wait for each other for
ever once only some of them are due for a refresh. So each step with parameters that are spread over
processes (`fully_shard`, ZeRO) compares a checksum, 8 bytes in the reduction by which the processes
decide that gradients are finite, before anything is changed. Copies (DDP, the replicas of HSDP)
have no reduction in a step: they compare in the first step and in every 64th, and so do sharded
ones where no gradient is checked.
"""

from __future__ import annotations

import gc
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any
from zlib import crc32

import torch
from torch import Tensor, distributed, nn
from torch.nn.parallel import DistributedDataParallel

from .options import NO_OPTIONS, Group
from .parameters import label, names, whole_shape
from .sharding import is_dtensor

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

    from .plan import Plan

#: Bytes that a process adds to the reduction of a step.
STAMP_BYTES = 8
#: Steps between comparisons that need a reduction of their own.
PERIOD = 64
#: Options of these types are compared: the text of others may hold an address.
_PLAIN = (bool, int, float, str, tuple, list, type(None))


class EqualOptions:
    """The comparisons of one optimizer."""

    def __init__(self) -> None:
        """Nothing was compared yet."""
        self._steps = 0
        self._copies: list[ProcessGroup] | None = None
        self._known: dict[int, tuple[Plan, int]] = {}

    def count_step(self) -> bool:
        """Called once a step; whether a comparison of its own is due in it."""
        self._steps += 1
        return self._steps % PERIOD == 1

    def number(self, plans: Sequence[Plan]) -> int:
        """A checksum of all groups' options, rates and shapes, below 2^31."""
        total = 0
        for plan in plans:
            known, fixed = self._known.get(id(plan), (None, 0))
            if known is not plan:
                fixed = crc32(repr((sorted(_options(plan.group)), _params(plan.group))).encode())
                self._known = {id(p): self._known[id(p)] for p in plans if id(p) in self._known}
                self._known[id(plan)] = plan, fixed
            total = crc32(repr(rate_of(plan.group)).encode(), total ^ fixed)
        return total & 0x7FFFFFFF

    def copies(self, plans: Sequence[Plan]) -> list[ProcessGroup]:
        """Groups of processes that hold copies of the parameters, found in the first step.

        Those of `DistributedDataParallel` modules of which the optimizer has all parameters (where
        it has some, processes may update others each), and of the dimensions of a DTensor's mesh
        that it isn't spread over.
        """
        if self._copies is None:
            known = [
                param
                for plan in plans
                for param, shard in zip(plan.params, plan.shards, strict=True)
                if is_dtensor(param) or shard.plain
            ]
            self._copies = _copies(known)
        return self._copies

    def compare(self, number: int, groups: Sequence[Group], copies: ProcessGroup) -> None:
        """Compares a checksum among copies; all of them call this.

        Raises:
            ValueError: on all of them, if any two differ.
        """
        device = next(
            (param.device for group in groups for param in group["params"]), torch.device("cpu")
        )
        table = torch.tensor([number, -number], dtype=torch.int32, device=device)
        distributed.all_reduce(table, distributed.ReduceOp.MIN, group=copies)
        low, high = table.tolist()
        if low != -high:
            raise unequal(groups, copies)


def unequal(groups: Sequence[Group], processes: ProcessGroup | None) -> ValueError:
    """The error for processes whose options differ; all of them must call this."""
    found = difference(groups, processes)
    return ValueError(
        f"{found or 'options or parameters'} differ between processes that train one model: "
        "accepted are equal options and learning rates on all of them"
    )


def difference(groups: Sequence[Group], processes: ProcessGroup | None) -> str | None:
    """The first option in which processes differ, with its values; all of them must call this.

    Args:
        groups: the optimizer's.
        processes: whose options are compared; None is all of them.

    Returns:
        For example "lr of group 0 (attn.q.weight, ...): 0.01 on process 0 and 0.02 on process 1".
    """
    own = [{**dict(_options(group)), "lr": rate_of(group), **_params(group)} for group in groups]
    everyone: list[Any] = [None] * distributed.get_world_size(processes)
    distributed.all_gather_object(everyone, own, group=processes)
    first = everyone[0]
    for rank, other in enumerate(everyone):
        if len(other) != len(first):
            return f"numbers of groups: {len(first)} on process 0 and {len(other)} on {rank}"
        for position, (here, there) in enumerate(zip(first, other, strict=True)):
            for key in sorted(here.keys() | there.keys()):
                left, right = here.get(key, "none"), there.get(key, "none")
                if left != right:
                    return (
                        f"{key} of group {position} ({_called(groups[position])}): {left} on "
                        f"process 0 and {right} on process {rank}"
                    )
    return None


def _called(group: Group) -> str:
    params = group["params"]
    if not params:
        return "empty"
    return label(names(group)[0], params[0]) + (", ..." if len(params) > 1 else "")


def _options(group: Group) -> list[tuple[str, str]]:
    return [
        (key, repr(value))
        for key, value in group.items()
        if key not in NO_OPTIONS and isinstance(value, _PLAIN)
    ]


def _params(group: Group) -> dict[str, str]:
    shapes = [tuple(whole_shape(param)) for param in group["params"]]
    return {
        "number of parameters": str(len(shapes)),
        "shapes of parameters (a checksum)": f"{crc32(repr(shapes).encode()):08x}",
    }


def rate_of(group: Group) -> str:
    """A group's learning rate as text."""
    lr = group["lr"]
    return repr(lr if lr is None else float(lr))


def _copies(params: Sequence[Tensor]) -> list[ProcessGroup]:
    if not (distributed.is_available() and distributed.is_initialized()):
        return []
    if distributed.get_world_size() == 1:
        return []
    found: dict[ProcessGroup, None] = {}
    for param in params:
        if is_dtensor(param):
            mesh, placements = param.device_mesh, param.placements  # type: ignore[attr-defined]
            for dim, placement in enumerate(placements):
                if placement.is_replicate() and mesh.size(dim) > 1:
                    found[mesh.get_group(dim)] = None
    plain = [param for param in params if not is_dtensor(param)]
    held = {id(param) for param in plain}
    for parallel in _wrappers(plain):
        trained = [param for param in parallel.module.parameters() if param.requires_grad]
        several = parallel.process_group.size() > 1 and not parallel._join_config.enable
        if several and all(id(param) in held for param in trained):
            found[parallel.process_group] = None
    return list(found)


def in_copies(params: Iterable[Tensor]) -> bool:
    """Whether parameters are in a module that `DistributedDataParallel` has wrapped."""
    if not (distributed.is_available() and distributed.is_initialized()):
        return False
    return bool(_wrappers(params))


def _wrappers(params: Iterable[Tensor]) -> list[DistributedDataParallel]:
    """The DDP modules with any of these parameters; they may be younger than the optimizer."""
    wanted = {id(param) for param in params}
    alive = distributed.distributed_c10d._world.pg_map
    return [
        held
        for kind in (_with_subclasses(DistributedDataParallel) if wanted else ())
        for held in gc.get_referrers(kind)  # objects refer to their class
        if type(held) is kind
        and isinstance(held, DistributedDataParallel)
        and getattr(held, "process_group", None) in alive
        and any(id(param) in wanted for param in held.module.parameters())
    ]


def _with_subclasses(kind: type[nn.Module]) -> Iterator[type[nn.Module]]:
    yield kind
    for own in kind.__subclasses__():
        yield from _with_subclasses(own)
