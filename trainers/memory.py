"""How many bytes training takes, by what they are for."""

from __future__ import annotations

import resource
import sys
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import nn

from lowrank.optimizers import state_bytes_by_category

from .weights import stored_tensors


def weight_bytes(model: nn.Module) -> int:
    """Bytes of what a checkpoint holds of a model, every shared tensor once."""
    return sum(tensor.nbytes for _, tensor in stored_tensors(model))


def gradient_bytes(model: nn.Module) -> int:
    """Bytes of the gradients that exist now."""
    return sum(item.grad.nbytes for item in model.parameters() if item.grad is not None)


def process_bytes(device: torch.device) -> int:
    """Bytes in use now: allocated on the CUDA device, else resident in this process."""
    if device.type == "cuda":
        return int(torch.cuda.memory_allocated(device))
    try:
        pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1])
    except (OSError, ValueError, IndexError):
        return peak_bytes(device)
    return pages * resource.getpagesize()


def peak_bytes(device: torch.device) -> int:
    """The most bytes in use so far: allocated on the CUDA device, else resident in this process."""
    if device.type == "cuda":
        return int(torch.cuda.max_memory_allocated(device))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def snapshot(
    model: nn.Module, optimizer: torch.optim.Optimizer, device: torch.device
) -> Mapping[str, int]:
    """Bytes by category, as a ``train`` record holds them under ``memory``.

    Call it while the gradients exist.
    """
    state = state_bytes_by_category(optimizer)
    return {
        "weights": weight_bytes(model),
        "gradients": gradient_bytes(model),
        "moments": state["moments"],
        "basis": state["basis"],
        "other_state": state["other"],
        "process": process_bytes(device),
        "peak": peak_bytes(device),
    }
