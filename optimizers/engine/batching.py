"""Which parameters are worked on together: few launches, bounded scratch."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Hashable, Iterator, Mapping, Sequence
from typing import Any

from torch import Tensor

from ..projectors import ProjectedParam
from .options import Group

#: Bound on the projected gradients and updates, and on the Gram matrices, that exist at once.
SCRATCH_BYTES = 256 << 20


def update_batches(
    params: Sequence[Tensor], state: Mapping[Tensor, dict[str, Any]], group: Group
) -> Iterator[list[int]]:
    """Positions of parameters to advance together: one device, dtype and step count.

    On a CPU one matrix at a time keeps its scratch in the cache; elsewhere lists save launches.
    """
    single = group["foreach"] is False
    kinds: dict[Hashable, list[int]] = defaultdict(list)
    for i, param in enumerate(params):
        cached = param.device.type == "cpu" and group["foreach"] is None and param.dim() > 1
        alone = i if single or cached else -1
        step = 0 if group["capturable"] else int(state[param]["step"])
        # Bias corrections that start anew at a refresh differ between staggered matrices.
        renewed = group.get("moments") == "reset" or group.get("factors")
        since = state[param].get("refreshed_at") if renewed else None
        kinds[(param.device, param.dtype, step, since, alone)].append(i)
    for indices in kinds.values():
        batch: list[int] = []
        used = 0
        for i in indices:
            size = params[i].numel() * max(4, params[i].element_size())
            if batch and used + size > SCRATCH_BYTES:
                yield batch
                batch, used = [], 0
            batch.append(i)
            used += size
        yield batch


def refresh_batches(params: Sequence[ProjectedParam]) -> Iterator[list[ProjectedParam]]:
    """Slots of one geometry together, as many as have bounded Gram matrices."""
    kinds: dict[Hashable, list[ProjectedParam]] = defaultdict(list)
    for param in params:
        kinds[(param.geometry, param.weight.dtype, param.weight.device)].append(param)
    for batch in kinds.values():
        short = min(batch[0].geometry.shape)
        together = max(1, SCRATCH_BYTES // (4 * short * short))
        for start in range(0, len(batch), together):
            yield batch[start : start + together]
