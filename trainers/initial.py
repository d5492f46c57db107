"""First weights from a checkpoint, which `model.initial` names."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path

from torch import Tensor, nn

from .files import WEIGHTS
from .missing import require


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
        with require("safetensors", "train").safe_open(path, framework="pt") as file:
            shapes = {name: file.get_slice(name).get_shape() for name in file.keys()}  # noqa: SIM118
            _check(shapes, parameters, folder)
            for name, parameter in parameters.items():
                yield name, parameter, file.get_tensor(name)
    except Exception as error:
        if type(error).__name__ != "SafetensorError":
            raise
        raise ValueError(f"model.initial={str(path)!r} can't be read: {error}") from None


def _check(
    shapes: Mapping[str, list[int]], parameters: Mapping[str, nn.Parameter], folder: Path
) -> None:
    said = f"model.initial={str(folder)!r} is of another shape"
    wrong = sorted(shapes.keys() ^ parameters.keys())
    if wrong:
        where = "file" if wrong[0] in shapes else "network"
        raise ValueError(f"{said}: {wrong[0]} is only in the {where}")
    for name, parameter in parameters.items():
        if list(shapes[name]) != list(parameter.shape):
            raise ValueError(
                f"{said}: {name} is {list(shapes[name])} in the file and {list(parameter.shape)}"
                " in the network"
            )
