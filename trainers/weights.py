"""A fingerprint of a model's weights."""

from __future__ import annotations

import hashlib

import torch
from torch import nn

_CHUNK = 1 << 22


def weights_sha256(model: nn.Module) -> str:
    """SHA-256 over all parameters sorted by name: name, dtype, shape and bytes of each.

    Equal fingerprints mean weights that are equal to the bit.
    """
    digest = hashlib.sha256()
    for name, parameter in sorted(model.named_parameters()):
        header = f"{name}\n{parameter.dtype}\n{tuple(parameter.shape)}\n"
        digest.update(header.encode())
        flat = parameter.detach().contiguous().flatten()
        # In pieces, so that a model on a GPU needs no second copy in the computer's memory.
        for piece in torch.split(flat, _CHUNK):
            digest.update(piece.cpu().view(torch.uint8).numpy().data)
    return digest.hexdigest()
