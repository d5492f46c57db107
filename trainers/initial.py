"""First weights from a checkpoint, which `model.initial` names."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .files import WEIGHTS
from .initial_config import warn_of_config
from .tensor_files import difference, opened

#: As safetensors names them. Numbers of 8 bits mean nothing without their scales.
_DTYPES = ("F64", "F32", "F16", "BF16")
_HEAD, _EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"
#: Entries that are looked at together, so that checking takes little memory.
_CHUNK = 1 << 22


def initial_weights(folder: Path) -> Path:
    """The file with the dense weights of the checkpoint that `model.initial` names.

    Raises:
        ValueError: the folder has none.
    """
    path = folder / WEIGHTS
    if not path.is_file():
        raise ValueError(
            f"model.initial={str(folder)!r}: there is no model.safetensors{_other_files(folder)}"
        )
    return path


def _other_files(folder: Path) -> str:
    """What is there instead of a checkpoint's one file, and what is accepted."""
    shards = f"{WEIGHTS}.index.json"
    found = [shards] if (folder / shards).is_file() else []
    found += sorted(path.name for path in folder.glob("pytorch_model*.bin"))
    if not found:
        return "; accepted is the folder of a checkpoint"
    what = "a model in shards" if found[0] == shards else "a file of pickled tensors"
    return (
        f", and {found[0]}, {what}, is not read; accepted is one file of all weights, as"
        ' transformers writes it with save_pretrained(FOLDER, max_shard_size="100GB")'
    )


def initial_values(network: nn.Module, folder: Path) -> Iterator[tuple[str, nn.Parameter, Tensor]]:
    """The values that a checkpoint has for all parameters, one at a time.

    Warns of a checkpoint whose configuration gives its weights another meaning.

    Args:
        network: of the checkpoint's names and shapes; its parameters may be quantised or sharded.
        folder: of the checkpoint.

    Yields:
        Name, parameter and whole values on the CPU, in the file's dtype.

    Raises:
        ValueError: the folder has no `model.safetensors`, it is none, or its weights are of other
            names, shapes or no accepted dtypes, before anything is given; or a value is not finite,
            before the parameter that it belongs to is given.
    """
    path = initial_weights(folder)
    parameters = dict(network.named_parameters())
    try:
        with opened(path) as files:
            _check_names(files, {name: own.shape for name, own in parameters.items()}, folder)
            _check_dtypes(files, folder)
            warn_of_config(network, folder)
            for name, parameter in parameters.items():
                value = files[name].get_tensor(name)
                _check_finite(name, value, parameter.dtype, folder)
                yield name, parameter, value
    except Exception as error:
        if type(error).__name__ != "SafetensorError":
            raise
        raise ValueError(f"model.initial={str(path)!r} can't be read: {error}") from None


def _check_names(
    files: Mapping[str, Any], wanted: Mapping[str, Sequence[int]], folder: Path
) -> None:
    """Refuses a file whose tensors have other names or shapes than a network's."""
    stored = {name: file.get_slice(name).get_shape() for name, file in files.items()}
    wrong = difference(stored, wanted)
    if not wrong:
        return
    body = {name: shape for name, shape in wanted.items() if name != _HEAD}
    if _HEAD in wanted and not difference(stored, body):
        raise ValueError(
            f"model.initial={str(folder)!r} has no {_HEAD}: its embeddings are tied, and here they"
            f" are not; accepted is a file with the values of {_EMBEDDING} as {_HEAD}, too"
        )
    raise ValueError(f"model.initial={str(folder)!r} is of another shape: {wrong}")


def _check_dtypes(files: Mapping[str, Any], folder: Path) -> None:
    """Refuses tensors that would be cast to weights of another meaning."""
    for name, file in files.items():
        dtype = file.get_slice(name).get_dtype()
        if dtype not in _DTYPES:
            raise ValueError(
                f"model.initial={str(folder)!r} has {name} in {dtype}: accepted is"
                f" {', '.join(_DTYPES[:-1])} or {_DTYPES[-1]}"
            )


def _check_finite(name: str, value: Tensor, dtype: torch.dtype, folder: Path) -> None:
    """Refuses a tensor with values that are not finite in the network's dtype."""
    pieces = torch.split(value.flatten(), _CHUNK)
    wrong = sum(len(piece) - int(torch.isfinite(piece.to(dtype)).sum()) for piece in pieces)
    if wrong:
        raise ValueError(
            f"model.initial={str(folder)!r} has {name} with {wrong:,} of {value.numel():,} values"
            f" that are not finite in {str(dtype).removeprefix('torch.')}: accepted is finite ones"
        )
