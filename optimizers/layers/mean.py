"""The mean over processes of a full weight's gradient, where a method needs it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor, distributed

from ..engine.sharding import local_part
from .optimizer import Link

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup
    from torch.distributed.device_mesh import DeviceMesh


def mean_gradients(own: Sequence[Tensor | None], links: Sequence[Link]) -> list[Tensor | None]:
    """The mean gradients over processes, so that all compute the same basis.

    Those are all processes, under FSDP2 those of the parameter's mesh. They first exchange which
    gradients they have, so that all reduce the same ones.

    Args:
        own: this process's gradients, m x n; overwritten.
        links: their layers, the same on each process.

    Returns:
        For each layer the mean, or None if no process has a gradient.
    """
    if not own or not distributed.is_available() or not distributed.is_initialized():
        return list(own)
    meshes: dict[DeviceMesh | None, list[int]] = {}
    for position, link in enumerate(links):
        meshes.setdefault(getattr(link.factors()[0], "device_mesh", None), []).append(position)
    means = list(own)
    for mesh, positions in meshes.items():
        groups = [None] if mesh is None else mesh.get_all_groups()
        size = math.prod(distributed.get_world_size(group) for group in groups)
        if size == 1:
            continue
        there = torch.tensor([own[i] is not None for i in positions], dtype=torch.int32)
        there = there.to(links[positions[0]].factors()[0].device)
        _sum_over(groups, there)
        for i, count in zip(positions, there.tolist(), strict=True):
            gradient, layer = own[i], links[i].layer
            if count and gradient is None:
                like = local_part(links[i].factors()[0])
                gradient = like.new_zeros(layer.out_features, layer.in_features)
            if gradient is not None:
                _sum_over(groups, gradient)
                means[i] = gradient.div_(size)
    return means


def _sum_over(groups: Sequence[ProcessGroup | None], tensor: Tensor) -> None:
    """In place: the sum over all processes of a mesh, one dimension after the other."""
    for group in groups:
        distributed.all_reduce(tensor, group=group)
