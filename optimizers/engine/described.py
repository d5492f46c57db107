"""The options of an optimizer's groups as text, and in what two processes' texts differ."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from zlib import crc32

import torch

from ..weights import QuantizedWeight
from .options import NO_OPTIONS, Group
from .parameters import label, names, whole_shape

#: Options of these types are compared: the text of others may hold an address.
_PLAIN = (bool, int, float, str, tuple, list, type(None))
#: For each group its options and learning rate, and what its parameters are.
Description = Sequence[Mapping[str, str]]


def described(groups: Sequence[Group]) -> list[dict[str, str]]:
    """What processes that train one model have in common."""
    return [
        {**dict(options_of(group)), "lr": rate_of(group), **params_of(group)} for group in groups
    ]


def options_of(group: Group) -> list[tuple[str, str]]:
    """A group's options that can be compared, without the learning rate."""
    return [
        (key, repr(value))
        for key, value in group.items()
        if key not in NO_OPTIONS and isinstance(value, _PLAIN)
    ]


def params_of(group: Group) -> dict[str, str]:
    """How many parameters a group has, and a checksum of their shapes."""
    shapes = [tuple(whole_shape(param)) for param in group["params"]]
    found = {
        "number of parameters": str(len(shapes)),
        "shapes of parameters (a checksum)": f"{crc32(repr(shapes).encode()):08x}",
    }
    quantised = [param for param in group["params"] if isinstance(param, QuantizedWeight)]
    if quantised:
        found["quantised weights (a checksum)"] = f"{crc32(repr(_sums(quantised)).encode()):08x}"
    return found


def _sums(weights: Sequence[QuantizedWeight]) -> list[int]:
    """Sums over the bytes of weights, and over every second one, computed where they are.

    `DistributedDataParallel` copies the first process's dense values into the others' codes, with
    other roundings, so that weights that were not equal before are not equal then.
    """
    parts = [part.contiguous().view(torch.uint8) for each in weights for part in each.parts()]
    sums = [own.flatten()[:: 1 + half].sum(dtype=torch.int64) for own in parts for half in (0, 1)]
    return [int(number) for number in torch.stack(sums).tolist()]


def rate_of(group: Group) -> str:
    """A group's learning rate as text."""
    lr = group["lr"]
    return repr(lr if lr is None else float(lr))


def first_difference(
    here: tuple[int, Description], there: tuple[int, Description], groups: Sequence[Group]
) -> str | None:
    """The first option in which two processes differ, with its values.

    Args:
        here: a process's number and description.
        there: another's.
        groups: this process's, for names.

    Returns:
        For example "lr of group 0 (attn.q.weight, ...): 0.01 on process 0 and 0.02 on process 1".
    """
    (rank, own), (other_rank, other) = here, there
    if len(own) != len(other):
        return (
            f"numbers of groups: {len(own)} on process {rank} and {len(other)} on process "
            f"{other_rank}"
        )
    for position, (left, right) in enumerate(zip(own, other, strict=True)):
        for key in sorted(left.keys() | right.keys()):
            values = left.get(key, "none"), right.get(key, "none")
            if values[0] != values[1]:
                return (
                    f"{key} of group {position} ({_called(groups[position])}): {values[0]} on "
                    f"process {rank} and {values[1]} on process {other_rank}"
                )
    return None


def _called(group: Group) -> str:
    params = group["params"]
    if not params:
        return "empty"
    return label(names(group)[0], params[0]) + (", ..." if len(params) > 1 else "")
