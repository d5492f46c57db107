"""Memory of a training run by category, in bytes."""

from __future__ import annotations

import resource
import sys
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from lowrank.optimizers import state_bytes_by_category

from .sharding import local, whole_shape
from .weights import stored_tensors
from .zero_engine import ZeroEngine

#: What torch says of a host that is out of memory, in an error without a type of its own.
_NO_MEMORY = ("DefaultCPUAllocator", "Storage size calculation overflowed", "can't allocate memory")


def weight_bytes(model: nn.Module) -> int:
    """Bytes of a model's tensors in a checkpoint, every shared tensor once."""
    return sum(_whole_bytes(tensor) for _, tensor in stored_tensors(model))


def _whole_bytes(tensor: Tensor) -> int:
    """Bytes of all of a tensor; a quantised one, which is never divided, knows its own."""
    if local(tensor) is tensor and whole_shape(tensor) == tensor.shape:
        return tensor.nbytes
    return whole_shape(tensor).numel() * tensor.element_size()


def held_bytes(model: nn.Module) -> int:
    """Bytes of this process's parameters and of all buffers, every shared tensor once."""
    tensors = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
    return sum(local(tensor).nbytes for tensor in tensors.values())


def gradient_bytes(model: nn.Module) -> int:
    """Bytes of the existing gradients; of sharded ones, of this process's parts."""
    grads = (item.grad for item in model.parameters())
    return sum(local(grad).nbytes for grad in grads if grad is not None)


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


def sizes(
    model: nn.Module, optimizer: torch.optim.Optimizer, engine: ZeroEngine | None = None
) -> dict[str, int]:
    """Bytes of weights, gradients and optimizer state, as a ``train`` record names them.

    Call it while the gradients exist; of an engine, which drops them, it tells those before the
    latest step, and as weights also the engine's float32 copies. It visits every tensor, which
    takes as long as a small step: `MemoryMeter` calls it rarely.
    """
    state = state_bytes_by_category(optimizer)
    if engine is None:
        weights = sum(local(tensor).nbytes for _, tensor in stored_tensors(model))
        gradients = gradient_bytes(model)
    else:
        weights, gradients = engine.weight_bytes(), engine.gradient_bytes
    return {
        "weights": weights,
        "gradients": gradients,
        "moments": state["moments"],
        "basis": state["basis"],
        "other_state": state["other"],
    }


class MemoryMeter:
    """Bytes by category after each step, as a ``train`` record holds them under ``memory``.

    Sizes change when state is made or removed and when layers are changed, so they are measured
    when the number of the optimizer's state entries changes, after events, and at intervals.

    Args:
        model: the model.
        optimizer: its optimizer.
        device: the device.
        engine: which holds gradients and weights under DeepSpeed.
    """

    #: Steps after which sizes are measured again in any case.
    EVERY = 100

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        device: torch.device,
        engine: ZeroEngine | None = None,
    ) -> None:
        self._model = model
        self._optimizer = optimizer
        self._device = device
        self._engine = engine
        self._sizes: dict[str, int] = {}
        self._entries = -1
        self._age = 0

    def read(self, changed: bool, gradients: int | None = None) -> Mapping[str, int]:
        """The bytes of now; call it while the gradients exist.

        Args:
            changed: whether the step just done told of an event.
            gradients: their bytes, where they exist no more.
        """
        entries = sum(map(len, self._optimizer.state.values()))
        self._age += 1
        if changed or entries != self._entries or self._age >= self.EVERY:
            self._sizes = sizes(self._model, self._optimizer, self._engine)
            self._entries, self._age = entries, 0
        return {
            **self._sizes,
            **({} if gradients is None else {"gradients": gradients}),
            "process": process_bytes(self._device),
            "peak": peak_bytes(self._device),
        }


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory couldn't be allocated, on a device or the host."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    said = str(error)
    return isinstance(error, RuntimeError) and any(words in said for words in _NO_MEMORY)
