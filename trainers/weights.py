"""A model's stored tensors, and a fingerprint of them."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from lowrank.optimizers.layers import FactoredLinear

from .sharding import whole, whole_shape

_CHUNK = 1 << 22


def stored_tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Parameters and the buffers that a checkpoint holds (frozen weights), each once, by name."""
    yield from model.named_parameters()
    saved = model.state_dict().keys()
    yield from ((name, buffer) for name, buffer in model.named_buffers() if name in saved)
    # What stays on the CPU beside the buffers (SwitchLoRA's offloaded candidates).
    for prefix, module in model.named_modules():
        if isinstance(module, FactoredLinear):
            for name in module.host_tensors():
                yield f"{prefix}.{name}", getattr(module, name)


def weights_sha256(model: nn.Module) -> str:
    """SHA-256 over all stored tensors sorted by name: name, dtype, shape and bytes of each.

    Equal fingerprints mean weights that are equal to the bit. Of a sharded model every process
    must call it.
    """
    digest = hashlib.sha256()
    for name, tensor in sorted(stored_tensors(model), key=lambda item: item[0]):
        header = f"{name}\n{tensor.dtype}\n{tuple(whole_shape(tensor))}\n"
        digest.update(header.encode())
        flat = whole(tensor).detach().contiguous().flatten()
        # In chunks, so that a model on a GPU needs no full copy in host memory.
        for piece in torch.split(flat, _CHUNK):
            digest.update(piece.cpu().view(torch.uint8).numpy().data)
    return digest.hexdigest()
