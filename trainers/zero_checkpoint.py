"""Checkpoints that DeepSpeed's ZeRO had divided, for other numbers of processes and strategies.

Each process reads all processes' files through memory maps, a parameter at a time, and takes its
part. The float32 weights are in them; where the former run had none, those of the model's own files
are taken.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lowrank.optimizers.engine.zero import PARTITION
from lowrank.optimizers.engine.zero_state import whole_state, whole_weights

from .checkpoint import DamagedCheckpointError
from .tensor_files import opened
from .zero_engine import KEYS, partition_name, read_partition

#: Gives the whole weight of a parameter, by its number and itself.
Weight = Callable[[int, Tensor], Tensor]


def says_its_parts(folder: Path, processes: int) -> bool:
    """Whether a checkpoint of so many processes can be divided anew; earlier versions' can't."""
    content = read_partition(folder / partition_name(0, processes), mapped=True)
    return any(PARTITION in content.get(key, {}) for key, _ in KEYS.values())


def read_divided(folder: Path, processes: int, optimizer: Any) -> tuple[dict[str, Any], Weight]:
    """The whole state of a checkpoint of so many processes, and the float32 weights.

    Args:
        folder: the checkpoint.
        processes: which wrote it.
        optimizer: the one to go on with.

    Raises:
        DamagedCheckpointError: a file is missing, or isn't what it should be.
    """
    states, flats = [], []
    for rank in range(processes):
        path = folder / partition_name(rank, processes)
        content = read_partition(path, mapped=True)
        keys = next((keys for keys in KEYS.values() if set(content) == set(keys)), None)
        if keys is None:
            raise DamagedCheckpointError(
                f"checkpoint {folder} is damaged: {path.name} holds {sorted(content)}"
            )
        states.append(content[keys[0]])
        flats.append(content[keys[1]])
    weight = whole_weights(states, flats)
    return whole_state(optimizer, states), lambda number, _: weight(number)


@contextmanager
def stored_weights(module: torch.nn.Module, *files: Path) -> Iterator[Weight]:
    """The weights of a model's own files.

    Args:
        module: the model.
        files: those of them that there are; later ones count.
    """
    names: Mapping[int, str] = {id(param): name for name, param in module.named_parameters()}
    with opened(*(path for path in files if path.is_file())) as found:

        def weight(_: int, param: Tensor) -> Tensor:
            stored: Tensor = found[names[id(param)]].get_tensor(names[id(param)])
            return stored

        yield weight
