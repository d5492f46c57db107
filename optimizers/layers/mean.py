"""The mean over processes of a full weight's gradient, where a method needs it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor, distributed

from ..engine.row_block import RowBlock
from .link import Link
from .quantized_low_rank import QuantizedLowRankLinear

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup
    from torch.distributed.device_mesh import DeviceMesh


def mean_gradients(own: Sequence[Tensor | None], links: Sequence[Link]) -> list[Tensor | None]:
    """The mean gradients over processes, so that all compute the same basis.

    Those are all processes, under FSDP2 those of the parameter's mesh, under ZeRO those that it has
    cut the parameter for. They first exchange which gradients they have, so that all reduce the
    same ones.

    Args:
        own: this process's gradients, m x n; overwritten.
        links: their layers, the same on each process.

    Returns:
        For each layer the mean, or None if no process has a gradient.
    """
    if not own or not distributed.is_available() or not distributed.is_initialized():
        return list(own)
    spread: dict[tuple[ProcessGroup | None, ...], list[int]] = {}
    for position, link in enumerate(links):
        spread.setdefault(_groups(link.factors()[0]), []).append(position)
    means = list(own)
    for groups, positions in spread.items():
        size = math.prod(distributed.get_world_size(group) for group in groups)
        if size == 1:
            continue
        there = torch.tensor([own[i] is not None for i in positions], dtype=torch.int32)
        there = there.to(links[positions[0]].factors()[0].device)
        _sum_over(groups, there)
        for i, count in zip(positions, there.tolist(), strict=True):
            gradient, layer = own[i], links[i].layer
            if count and gradient is None:
                assert isinstance(layer, QuantizedLowRankLinear)
                shape = layer.out_features, layer.in_features
                gradient = torch.zeros(shape, dtype=layer.base.dtype, device=there.device)
            if gradient is not None:
                _sum_over(groups, gradient)
                means[i] = gradient.div_(size)
    return means


def _groups(factor: Tensor) -> tuple[ProcessGroup | None, ...]:
    """The process groups that a factor's gradient is summed over; None is all processes."""
    if isinstance(factor, RowBlock):
        return () if factor.rows.processes.alone else (factor.rows.processes.group,)
    mesh: DeviceMesh | None = getattr(factor, "device_mesh", None)
    return (None,) if mesh is None else tuple(mesh.get_all_groups())


def _sum_over(groups: Sequence[ProcessGroup | None], tensor: Tensor) -> None:
    """In place: the sum over all processes of a mesh, one dimension after the other."""
    for group in groups:
        distributed.all_reduce(tensor, group=group)
