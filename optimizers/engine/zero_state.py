"""States of parameters that ZeRO has cut, whole and in parts.

A process's `state_dict` has its part of each entry, and under `PARTITION` where its pieces of the
parameters lie in the engine's flat partitions. An entry is either equal on all processes, or its
parts follow each other in the processes' order along one dimension: rows, columns, or blocks that
share a scale. So the whole is known from the parts' shapes, and any number of processes can take
theirs of it, at any stage, as well as a process that has all. One parameter is whole at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, distributed

from .composition import Composition
from .parameters import unique_names, whole_shape
from .state import template
from .state_dict import checked_groups, options_of_state
from .zero import PARTITION, Partitions, partition_of

if TYPE_CHECKING:
    from .managed import ManagedOptimizer

#: A parameter's entries, or the shapes of its tensors, by name.
Entries = Mapping[str, Any]
Shapes = dict[str, tuple[int, ...]]


class States(Mapping[int, dict[str, Any]]):
    """The entries of each parameter of a `state_dict`, made when they are asked for."""

    def __init__(self, numbers: Sequence[int], make: Callable[[int], dict[str, Any]]) -> None:
        self._numbers, self._make = list(numbers), make

    def __getitem__(self, number: int) -> dict[str, Any]:
        """The entries of the parameter of this number."""
        if number not in self._numbers:
            raise KeyError(number)
        return self._make(number)

    def __iter__(self) -> Iterator[int]:
        """The parameters' numbers."""
        return iter(self._numbers)

    def __len__(self) -> int:
        """How many parameters have entries."""
        return len(self._numbers)


def whole_state(optimizer: ManagedOptimizer, parts: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The `state_dict` of one process, from those of all processes that ZeRO had divided it among.

    Args:
        optimizer: the one to go on with.
        parts: the states, by rank.

    Returns:
        The state; its tensors are made when they are asked for, see `States`.

    Raises:
        ValueError: they are not the states of one optimizer's processes, or of another one.
    """
    first = parts[0]
    for rank, part in enumerate(parts):
        found = part.get(PARTITION)
        if found is None:
            raise ValueError(
                f"the saved state of rank {rank} doesn't say which part it is, since an earlier "
                "version has written it: accepted is as many processes as have written it"
            )
        if (found["world"], found["rank"]) != (len(parts), rank):
            raise ValueError(
                f"the saved state in the place of rank {rank} of {len(parts)} is that of rank "
                f"{found['rank']} of {found['world']}: accepted are those of all, in order"
            )
        if part["state"].keys() != first["state"].keys():
            raise ValueError(f"the saved states of rank 0 and {rank} have other parameters")
    expected = _Expected(optimizer, first)

    def whole(number: int) -> dict[str, Any]:
        own = [part["state"][number] for part in parts]
        wanted = expected.template(number)
        for rank, entries in enumerate(own):
            if entries.keys() != wanted.keys():
                raise ValueError(
                    f"the saved state of {expected.names[number]} on rank {rank} has "
                    f"{sorted(entries)}; accepted are {sorted(wanted)}"
                )
        return {
            key: _united(f"{key} of {expected.names[number]}", [e[key] for e in own], wanted[key])
            for key in own[0]
        }

    plain = {key: value for key, value in first.items() if key != PARTITION}
    return {**plain, "state": States(list(first["state"]), whole)}


def part_state(optimizer: ManagedOptimizer, saved: Mapping[str, Any]) -> dict[str, Any]:
    """This process's part of a whole `state_dict`, for an optimizer whose parameters ZeRO has cut.

    Every process must call it.

    Raises:
        ValueError: the state is not this optimizer's.
    """
    with optimizer._shown():
        partitions = optimizer._partitions
    if partitions is None:
        raise ValueError("the optimizer's parameters were not cut by ZeRO")
    expected, numbers = _Expected(optimizer, saved), list(saved["state"])
    blocks = list(partitions.blocks.values())
    own = {
        number: _shapes(template(blocks[number], expected.compositions[number]))
        for number in numbers
    }
    by_rank: list[dict[int, Shapes]] = [own]
    processes = partitions.processes
    if processes.group is not None:
        gathered: list[Any] = [None] * processes.world
        distributed.all_gather_object(gathered, own, group=processes.group)
        by_rank = gathered
    made: dict[int, dict[str, Any]] = {}
    for number in numbers:
        wanted, shapes = expected.template(number), [shapes[number] for shapes in by_rank]
        made[number] = {
            key: _cut(
                f"{key} of {expected.names[number]}",
                value,
                wanted.get(key),
                [own_shapes.get(key) for own_shapes in shapes],
                processes.rank,
            )
            for key, value in saved["state"][number].items()
        }
    return {**saved, "state": made, PARTITION: partition_of(partitions)}


def whole_weights(
    parts: Sequence[Mapping[str, Any]], flats: Sequence[Sequence[Tensor]]
) -> Callable[[int], Tensor]:
    """A function that gives a parameter's whole weight, flattened, by the parameter's number.

    Args:
        parts: states as of `whole_state`.
        flats: of each process its flat partitions.
    """

    def weight(number: int) -> Tensor:
        pieces = []
        for part, own in zip(parts, flats, strict=True):
            partition, offset, start, entries = part[PARTITION]["pieces"][number]
            if entries:
                pieces.append((start, own[partition].detach()[offset : offset + entries]))
        pieces.sort(key=lambda piece: piece[0])
        return torch.cat([piece for _, piece in pieces])

    return weight


@torch.no_grad()
def part_weights(
    partitions: Partitions, flats: Sequence[Tensor], weight: Callable[[int], Tensor]
) -> list[Tensor]:
    """Copies of this process's flat partitions with other weights.

    Args:
        partitions: of the optimizer.
        flats: the engine's.
        weight: gives a parameter's whole weight, in any shape, by its number.

    Raises:
        ValueError: a weight has another number of entries than its parameter.
    """
    made = [flat.detach().clone() for flat in flats]
    for number, place in enumerate(partitions.places):
        whole, shape = weight(number).reshape(-1), whole_shape(partitions.params[number])
        if whole.numel() != shape.numel():
            raise ValueError(
                f"the saved weight of a parameter of shape {tuple(shape)} has {whole.numel()} "
                f"entries; accepted are {shape.numel()}"
            )
        own = whole[place.start : place.start + place.entries]
        made[place.partition][place.offset : place.offset + place.entries].copy_(own)
    return made


class _Expected:
    """What a saved state must be for an optimizer.

    Attributes:
        compositions: of each parameter by its number.
        names: of each parameter.
    """

    def __init__(self, optimizer: ManagedOptimizer, saved: Mapping[str, Any]) -> None:
        with optimizer._shown():
            groups = optimizer.param_groups
        self._whole = [
            torch.empty(tuple(whole_shape(param)), dtype=param.dtype, device="meta")
            for group in groups
            for param in group["params"]
        ]
        self.names = unique_names(groups)
        self.compositions: list[Composition] = []
        for group in checked_groups(groups, saved):
            composition = optimizer._meaning(options_of_state(group))
            self.compositions += [composition] * len(group["params"])

    def template(self, number: int) -> dict[str, Any]:
        """The whole state of a parameter, on the meta device."""
        return template(self._whole[number], self.compositions[number])


def _shapes(entries: Entries) -> Shapes:
    return {key: tuple(value.shape) for key, value in entries.items() if isinstance(value, Tensor)}


def _spread(shapes: Sequence[tuple[int, ...]], whole: tuple[int, ...]) -> int | None:
    """The dimension along which parts of these shapes are the whole, or -1 if each is all of it."""
    if all(shape == whole for shape in shapes):
        return -1
    if any(len(shape) != len(whole) for shape in shapes):
        return None
    for dim, size in enumerate(whole):
        rest = {(*shape[:dim], *shape[dim + 1 :]) for shape in shapes}
        if rest == {(*whole[:dim], *whole[dim + 1 :])} and sum(s[dim] for s in shapes) == size:
            return dim
    return None


def _united(called: str, values: Sequence[Any], wanted: Any) -> Any:
    """The whole of an entry, from its parts by rank."""
    first = values[0]
    if not isinstance(first, Tensor) or not isinstance(wanted, Tensor):
        if any(value != first for value in values):
            raise ValueError(f"{called} differs between the processes that have saved it")
        return first
    dim = _spread([tuple(value.shape) for value in values], tuple(wanted.shape))
    if dim is None:
        raise ValueError(
            f"{called} has parts of {[tuple(value.shape) for value in values]}; accepted are parts "
            f"of {tuple(wanted.shape)}"
        )
    if dim >= 0:
        return _fitting(torch.cat(list(values), dim), wanted)
    for other in values[1:]:
        if not torch.equal(_bits(other), _bits(first)):
            raise ValueError(f"{called} differs between the processes that have saved it")
    return _fitting(first, wanted)


def _bits(tensor: Tensor) -> Tensor:
    """The bytes of a tensor, of which NaN's equal each other."""
    return tensor.contiguous().reshape(-1).view(torch.uint8)


def _cut(
    called: str,
    value: Any,
    wanted: Any,
    shapes: Sequence[tuple[int, ...] | None],
    rank: int,
) -> Any:
    """A process's part of an entry; what isn't as expected is left, for `load_state_dict`."""
    if not isinstance(value, Tensor) or not isinstance(wanted, Tensor):
        return value
    known = [shape for shape in shapes if shape is not None]
    whole = tuple(wanted.shape)
    dim = _spread(known, whole) if len(known) == len(shapes) else None
    if tuple(value.shape) != whole or dim is None:
        raise ValueError(f"{called} has shape {tuple(value.shape)}; accepted is {whole}")
    value = _fitting(value, wanted)
    if dim < 0:
        return value
    start = sum(shape[dim] for shape in known[:rank])
    return value.narrow(dim, start, known[rank][dim]).clone()


def _fitting(value: Tensor, wanted: Tensor) -> Tensor:
    """In the precision that the optimizer has: the engine's fp32, or that of bf16 weights."""
    both = value.is_floating_point() and wanted.is_floating_point()
    return value.to(wanted.dtype) if both else value
