"""Which parameters are updated together: few kernel launches, bounded scratch memory."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Hashable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ..projectors import ProjectedParam
from .devices import on_gpu
from .options import Group
from .processes import Processes
from .scratch import DEVICE_SCRATCH_BYTES, SCRATCH_BYTES, bounded_batches, device_scratch


def read_steps(states: Sequence[Mapping[str, Any]]) -> list[int]:
    """The step count of each state; one synchronisation per device."""
    counts = [state["step"] for state in states]
    found = [0] * len(counts)
    by_device: dict[torch.device, list[int]] = defaultdict(list)
    for position, count in enumerate(counts):
        by_device[count.device].append(position)
    for positions in by_device.values():
        steps = torch.stack([counts[i] for i in positions]).tolist()
        for position, steps_done in zip(positions, steps, strict=True):
            found[position] = int(steps_done)
    return found


def update_batches(
    params: Sequence[Tensor],
    states: Sequence[Mapping[str, Any]],
    steps_done: Sequence[int],
    sizes: Sequence[int],
    group: Group,
    spread: Sequence[Processes],
    shapes: Sequence[Hashable] = (),
) -> Iterator[list[int]]:
    """Positions of parameters to update together: same device, dtype and step count.

    On a CPU one matrix at a time keeps its scratch in the cache; on GPUs lists save launches, and
    matrices of one shape are worked on as one tensor. What other processes have parts of comes
    first, in the same batches on all processes, and shares collectives on CPUs as well.

    Args:
        params: the parameters.
        states: their states.
        steps_done: the step count of each.
        sizes: bytes of each one's scratch, which is bounded.
        group: their options.
        spread: the processes that have the other parts of each.
        shapes: what batches of projected matrices on a GPU have in common besides.
    """
    single = group["foreach"] is False
    kinds: dict[tuple[int, Hashable], list[int]] = defaultdict(list)
    # With bias corrections that restart at a refresh, staggered matrices have different ones.
    renewed = group.get("moments") == "reset" or group.get("factors")
    pairs = list(zip(params, states, strict=True))
    for i in sorted(range(len(pairs)), key=lambda i: spread[i].alone):
        param, state = pairs[i]
        cached = spread[i].alone and not on_gpu(param) and param.dim() > 1
        cached = cached and group["foreach"] is None
        alone = i if single or cached else -1
        step = 0 if group["capturable"] else steps_done[i]
        since = state.get("refreshed_at") if renewed else None
        gpu = on_gpu(param)
        shape = shapes[i] if shapes and gpu else None
        bound = SCRATCH_BYTES
        if shapes and gpu:
            # Processes that share matrices may have different cards.
            bound = device_scratch(param.device) if spread[i].alone else DEVICE_SCRATCH_BYTES
        key = (param.device, param.dtype, step, since, alone, spread[i].alone, shape)
        kinds[(bound, key)].append(i)
    for (bound, _), indices in kinds.items():
        for batch in bounded_batches([sizes[i] for i in indices], bound):
            yield [indices[position] for position in batch]


def refresh_batches(params: Sequence[ProjectedParam]) -> Iterator[list[ProjectedParam]]:
    """Batches of matrices of one geometry, whose Gram matrices fit in `SCRATCH_BYTES`."""
    kinds: dict[Hashable, list[ProjectedParam]] = defaultdict(list)
    for param in params:
        whole = param.rows.processes.alone
        kinds[(param.geometry, param.weight.dtype, param.weight.device, whole)].append(param)
    for batch in kinds.values():
        short = min(batch[0].geometry.shape)
        sizes = [4 * short * short] * len(batch)
        for positions in bounded_batches(sizes, SCRATCH_BYTES, refits=True):
            yield [batch[i] for i in positions]
