"""DeepSpeed's ZeRO: the engine that divides gradients and optimizer states among processes.

Stage 1 divides the optimizer's states and its float32 copy of the weights, stage 2 the gradients,
too, and stage 3 the weights. The optimizer is the run's own; the engine reduces, clips, and decides
whether a gradient is finite (tried with DeepSpeed 0.19.8). In a checkpoint each process has a file
with its partition, read as ``torch.load(..., weights_only=True)`` reads it. `zero_checkpoint` makes
other partitions of them.
"""

from __future__ import annotations

import contextlib
import logging
import math
import os
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lowrank.optimizers.engine.zero_state import part_state, part_weights

from .checkpoint import DamagedCheckpointError
from .config import RunConfig
from .distributed import World
from .files import WriteError, writing
from .missing import require
from .models import LanguageModel, parameter_count

#: DeepSpeed's default: the most entries that are reduced at once.
_BUCKET = 500_000_000


#: By stage: names of the optimizer's state and of the weights in DeepSpeed's own state.
KEYS = {
    1: ("base_optimizer_state", "single_partition_of_fp32_groups"),
    2: ("base_optimizer_state", "single_partition_of_fp32_groups"),
    3: ("optimizer_state_dict", "fp32_flat_groups"),
}


class ZeroEngine:
    """Backward passes, steps and partitions of one process.

    Attributes:
        module: DeepSpeed's engine, which training calls.
        stage: of ZeRO, 1 to 3.
        gradient_bytes: of the gradients that this process held before the latest step.
    """

    def __init__(
        self,
        config: RunConfig,
        model: LanguageModel,
        optimizer: Any,
        world: World,
    ) -> None:
        """Divides the model and the optimizer; every process must call it.

        Raises:
            MissingExtraError: DeepSpeed is not installed.
            ValueError: DeepSpeed doesn't compute on the run's device.
        """
        deepspeed = import_deepspeed(world.device)
        self._optimizer = optimizer
        self.stage = config.distributed.zero_stage
        self.gradient_bytes = 0
        settings = engine_config(config, world.size, parameter_count(model))
        buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
        self.module: Any = deepspeed.initialize(model=model, optimizer=optimizer, config=settings)[
            0
        ]
        for name, buffer in model.named_buffers():
            # Rotary frequencies in bfloat16 would blur the positions.
            buffer.data = buffers[name]
        if self.stage == 3:
            # The loss reads the head's weight without calling the head.
            deepspeed.zero.register_external_parameter(model, model.network.lm_head.weight)

    def begin(self, last: bool) -> None:
        """To be called before a micro-batch's forward pass; `last` says if it ends the step."""
        self.module.set_gradient_accumulation_boundary(last)

    def backward(self, loss: Tensor) -> None:
        """Adds a micro-batch's gradient; the mean over the processes is taken of the sum."""
        self.module.backward(loss, scale_wrt_gas=False)

    def step(self, *, take: bool) -> float:
        """Clips the gradient and takes the optimizer's step, and drops the gradient.

        Where the gradient isn't finite on some process, the engine takes no step on any.

        Args:
            take: False to drop the gradient alone.

        Returns:
            The global norm of the gradient before clipping; infinite if it isn't finite.
        """
        self.gradient_bytes = _storage_bytes(self._gradients())
        with contextlib.nullcontext() if take else _idle(self._optimizer):
            self.module.step()
        if not self.module.was_step_applied():
            return math.inf
        return float(self.module.get_global_grad_norm())

    def weight_bytes(self) -> int:
        """Bytes of this process's weights, and of the float32 copies that the engine steps."""
        own = [getattr(param, "ds_tensor", param) for param in self.module.module.parameters()]
        gathered = [param for param in self.module.module.parameters() if param.numel()]
        return _storage_bytes([*own, *gathered, *self._flats()])

    def save(self, folder: Path, world: World) -> None:
        """Writes this process's partition into a checkpoint's folder; every process must call it.

        Raises:
            WriteError: a process can't write, or doesn't see the folder that rank 0 has made.
        """
        path = folder / partition_name(world.rank, world.size)
        failed: WriteError | None = None
        state = self.module.optimizer.state_dict()
        content = {key: state[key] for key in self._keys()}
        try:
            with writing(path), path.open("wb") as stream:
                torch.save(content, stream)
        except WriteError as error:
            failed = error
        told = world.gather(None if failed is None else (failed.errno, failed.strerror))
        for rank, problem in enumerate(told):
            if problem is not None:
                number, text = problem
                name = partition_name(rank, world.size)
                raise WriteError(number, f"{text} on rank {rank}", str(folder / name))

    def read(self, folder: Path, world: World) -> dict[str, Any]:
        """This process's partition of a checkpoint.

        Raises:
            DamagedCheckpointError: it isn't there, or holds something else.
        """
        path = folder / partition_name(world.rank, world.size)
        content = read_partition(path)
        if set(content) != set(self._keys()):
            raise DamagedCheckpointError(
                f"checkpoint {folder} is damaged: {path.name} isn't of ZeRO stage {self.stage}"
            )
        return content

    def divide(
        self, optimizer: dict[str, Any], weight: Callable[[int, Tensor], Tensor]
    ) -> dict[str, Any]:
        """This process's partition of a whole state; every process must call it.

        Args:
            optimizer: a whole `state_dict` of the optimizer.
            weight: gives the whole weight of a parameter, by its number and itself.
        """
        own = part_state(self._optimizer, optimizer)
        partitions = self._optimizer._partitions
        params = partitions.params
        flats = part_weights(partitions, self._flats(), lambda n: weight(n, params[n]))
        return dict(zip(self._keys(), (own, flats), strict=True))

    def load(self, content: dict[str, Any], world: World) -> None:
        """Goes on from a partition that `read` or `divide` gave; every process must call it.

        In stages 1 and 2 the model's weights are loaded before.
        """
        inner = self.module.optimizer
        if self.stage == 3:
            inner.checkpoint_event_prologue()
        state = {**inner.state_dict(), **content}
        inner.load_state_dict([state] * world.size, load_from_fp32_weights=True)
        if self.stage == 3:
            inner.checkpoint_event_epilogue()

    def _keys(self) -> tuple[str, str]:
        """Names of the optimizer's state and of the weights in DeepSpeed's own state."""
        return KEYS[self.stage]

    def _flats(self) -> list[Tensor]:
        inner = self.module.optimizer
        found: list[Tensor] = (
            inner.fp32_partitioned_groups_flat
            if self.stage == 3
            else inner.single_partition_of_fp32_groups
        )
        return found

    def _gradients(self) -> Iterator[Tensor]:
        for param in self.module.module.parameters():
            if param.grad is not None:
                yield param.grad
        for group in self.module.optimizer.averaged_gradients.values():
            yield from (tensor for tensor in group or () if tensor is not None)


def import_deepspeed(device: torch.device) -> Any:
    """DeepSpeed, quiet but for errors.

    Raises:
        MissingExtraError: it is not installed.
        ValueError: it doesn't compute on the device.
    """
    os.environ.setdefault("DS_ACCELERATOR", device.type)
    deepspeed = require("deepspeed", "deepspeed")
    # It writes to standard output, for each process, and calls what torch has renamed.
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", message=".*torch.distributed.* is deprecated")
    found = str(deepspeed.accelerator.get_accelerator().device_name())
    if found.split(":")[0] != device.type:
        raise ValueError(
            f"train.device is {device.type!r}, but DeepSpeed computes on {found!r} here; accepted:"
            f" {found}, or DS_ACCELERATOR={device.type} in the environment"
        )
    return deepspeed


def engine_config(config: RunConfig, size: int, entries: int) -> dict[str, Any]:
    """DeepSpeed's configuration of a run.

    Args:
        config: the run's settings.
        size: number of processes.
        entries: of all parameters.
    """
    train, shards = config.train, config.distributed.data_shards or size
    rows = train.batch_size * train.accumulation * shards // size
    micro = min(train.batch_size, rows)
    accumulation = -(-rows // micro)
    return {
        "train_batch_size": micro * accumulation * size,
        "train_micro_batch_size_per_gpu": micro,
        "gradient_accumulation_steps": accumulation,
        "gradient_clipping": train.clip,
        "bf16": {"enabled": config.model.dtype == "bfloat16"},
        "zero_optimization": {
            "stage": config.distributed.zero_stage,
            "reduce_bucket_size": min(_BUCKET, entries),
        },
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
    }


def partition_name(rank: int, size: int) -> str:
    """The name of a process's file in a checkpoint."""
    return f"zero-{rank:05d}-of-{size:05d}.pt"


def read_partition(path: Path, *, mapped: bool = False) -> dict[str, Any]:
    """A process's file; with `mapped` what is used of it is read when it is used.

    Raises:
        DamagedCheckpointError: it isn't there.
    """
    if not path.is_file():
        raise DamagedCheckpointError(f"checkpoint {path.parent} is damaged: {path.name} is missing")
    found: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)
    return found


@contextlib.contextmanager
def _idle(optimizer: torch.optim.Optimizer) -> Iterator[None]:
    """Has an optimizer's `step` do nothing.

    The engine alone knows where its gradients are, and drops them after a step.
    """
    own = vars(optimizer)
    before = own.get("step")
    own["step"] = lambda *arguments, **keywords: None
    try:
        yield
    finally:
        if before is None:
            del own["step"]
        else:
            own["step"] = before


def _storage_bytes(tensors: Any) -> int:
    """Bytes of the tensors' storages, each once and in full."""
    storages = {tensor.untyped_storage()._cdata: tensor.untyped_storage() for tensor in tensors}
    return sum(storage.nbytes() for storage in storages.values())
