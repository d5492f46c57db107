"""First weights from a checkpoint, which `model.initial` names."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from torch import Tensor, nn

from .files import WEIGHTS
from .tensor_files import difference, opened


def initial_weights(folder: Path) -> Path:
    """The file with the dense weights of the checkpoint that `model.initial` names.

    Raises:
        ValueError: the folder has none.
    """
    path = folder / WEIGHTS
    if not path.is_file():
        raise ValueError(
            f"model.initial={str(folder)!r}: there is no model.safetensors; accepted is the folder"
            " of a checkpoint"
        )
    return path


def initial_values(network: nn.Module, folder: Path) -> Iterator[tuple[str, nn.Parameter, Tensor]]:
    """The values that a checkpoint has for all parameters, one at a time.

    Args:
        network: of the checkpoint's names and shapes; its parameters may be quantised or sharded.
        folder: of the checkpoint.

    Yields:
        Name, parameter and whole values on the CPU, in the file's dtype.

    Raises:
        ValueError: the folder has no `model.safetensors`, it is none, or its weights are of other
            names or shapes; before anything is given.
    """
    path = initial_weights(folder)
    parameters = dict(network.named_parameters())
    try:
        with opened(path) as files:
            stored = {name: file.get_slice(name).get_shape() for name, file in files.items()}
            wrong = difference(stored, {name: own.shape for name, own in parameters.items()})
            if wrong:
                raise ValueError(f"model.initial={str(folder)!r} is of another shape: {wrong}")
            for name, parameter in parameters.items():
                yield name, parameter, files[name].get_tensor(name)
    except Exception as error:
        if type(error).__name__ != "SafetensorError":
            raise
        raise ValueError(f"model.initial={str(path)!r} can't be read: {error}") from None
