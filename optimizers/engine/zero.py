"""DeepSpeed's ZeRO, stages 1 to 3: flat partitions as blocks of rows.

After `deepspeed.initialize(model=model, optimizer=build(name, model))` the optimizer's groups hold
flat tensors instead of the model's parameters. The optimizer keeps the parameters that it was made
with, and these say where they are (tried with DeepSpeed 0.19.8): in stages 1 and 2 `_hp_mapping`
holds the piece as a view of the group's flat partition, in stage 3 `_z3_optimizer.grad_position`
gives sub-group, offset and length. So there is no line to add.

DeepSpeed calls `step` once for each group (stages 1 and 2) or sub-group (stage 3), with the others
hidden or empty. While a step, or saving or loading, goes on, `Partitions.shown` has the groups hold
`RowBlock`s of all parameters; those whose partition has a gradient take the step. The state belongs
to these blocks and is this process's part alone, as everything in a ZeRO checkpoint.

Blocks are rows of the engine's own weights (fp32 where the model is bf16), from which it writes the
model's after the step.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, distributed

from .options import Group
from .parameters import is_cut, label, whole_shape
from .processes import Processes
from .row_block import Fragment, Layout, RowBlock, return_rows, take_rows
from .state import untouched

if TYPE_CHECKING:
    from .managed import ManagedOptimizer
    from .plan import Plan


@dataclass(frozen=True)
class Place:
    """Where this process's piece of a parameter is.

    Attributes:
        flat: the flat partition of the parameter's group or sub-group.
        offset: of the piece in it.
        start: first entry held, of the flattened parameter.
        entries: number of entries held, 0 for none.
        partition: the number of the group or sub-group.
    """

    flat: Tensor
    offset: int
    start: int
    entries: int
    partition: int = 0

    def of(self, flat: Tensor) -> Tensor:
        """The piece in the partition, or in its gradient."""
        return flat.detach()[self.offset : self.offset + self.entries]


def partitioned(param: Tensor) -> bool:
    """Whether DeepSpeed has cut a parameter."""
    return hasattr(param, "_hp_mapping") or hasattr(param, "_z3_optimizer")


def _check_cut(param: Any, name: str | None) -> None:
    """Raises `ValueError` for a parameter that DeepSpeed left out, as it does frozen ones."""
    found = hasattr(param, "_hp_mapping")
    if hasattr(param, "_z3_optimizer"):
        engine = param._z3_optimizer
        found = engine.get_param_id(param) in engine.grad_position
    if not found:
        raise ValueError(
            f"{label(name, param)} is in the optimizer, but in no partition of DeepSpeed's ZeRO, "
            "which leaves out what doesn't require a gradient: accepted is requires_grad=False "
            "before the optimizer is built, or True until after deepspeed.initialize"
        )


def place_of(param: Any, flat: Tensor | None, group: int) -> tuple[Place, Any]:
    """Where a parameter's piece is, and the process group that holds the others.

    Args:
        param: the parameter.
        flat: what its group holds now; not used in stage 3.
        group: the group's number.

    Raises:
        ValueError: the piece is not in `flat`.
    """
    if hasattr(param, "_z3_optimizer"):
        engine = param._z3_optimizer
        sub_group, offset, size = engine.grad_position[engine.get_param_id(param)]
        start = min(distributed.get_rank(param.ds_process_group) * size, param.ds_numel)
        entries = min(start + size, param.ds_numel) - start
        flat = engine.fp32_partitioned_groups_flat[sub_group]
        assert flat is not None
        return Place(flat, offset, start, entries, sub_group), param.ds_process_group
    mapping = param._hp_mapping
    if flat is None:
        raise ValueError(f"{label(None, param)} is in no flat partition of DeepSpeed's ZeRO")
    if mapping is None:
        return Place(flat, 0, 0, 0, group), param._dp_group
    address, here = mapping.lp_fragment_address, mapping.hp_fragment_address
    place = Place(flat, here.start, address.start, address.numel, group)
    return place, param._dp_group


def layouts(
    places: Sequence[Place], shapes: Sequence[tuple[int, ...]], processes: Processes
) -> list[Layout]:
    """How each parameter is cut, from what each process has of it; one collective."""
    own = [[place.start, place.start + place.entries] for place in places]
    table = torch.tensor(own, dtype=torch.int64, device=places[0].flat.device)
    whole = processes.gather_rows(table[None], processes.world).tolist()
    return [
        Layout(shape, tuple((cuts[i][0], cuts[i][1]) for cuts in whole))
        for i, shape in enumerate(shapes)
    ]


class Partitions:
    """The groups of an optimizer, as flat partitions and as row blocks.

    Attributes:
        groups: copies of the groups that hold row blocks.
        params: the parameters, group by group.
        places: where the piece of each is.
        blocks: the block of each parameter.
        processes: those that hold the pieces.
        stepping: numbers of the partitions that take the present step.
    """

    def __init__(
        self,
        groups: Sequence[Group],
        params: Sequence[Sequence[Tensor]],
        names: Sequence[Sequence[str | None]],
    ) -> None:
        """Finds each parameter's piece.

        Args:
            groups: the optimizer's own groups, with flat tensors.
            params: the parameters that each group was made with.
            names: their names.

        Raises:
            ValueError: a partition is on another device than its parameters (offload), or a
                parameter is in none.
        """
        self._own: list[Group] = list(groups)
        self.stepping: frozenset[int] = frozenset()
        self._checked: set[int] = set()
        self.params = [param for own in params for param in own]
        for own, called in zip(params, names, strict=True):
            for param, name in zip(own, called, strict=True):
                _check_cut(param, name)
        flats = [
            (next(iter(group["params"]), None), number)
            for number, (group, own) in enumerate(zip(groups, params, strict=True))
            for _ in own
        ]
        found = [place_of(param, *flat) for param, flat in zip(self.params, flats, strict=True)]
        self.places = [place for place, _ in found]
        self.processes = Processes.of(found[0][1])
        for param, place in zip(self.params, self.places, strict=True):
            if param.device != place.flat.device:
                raise ValueError(
                    f"{label(None, param)} on {param.device} has its partition on "
                    f"{place.flat.device}: accepted is ZeRO without offload_optimizer"
                )
        shapes = [whole_shape(param) for param in self.params]
        cuts = layouts(self.places, shapes, self.processes)
        self._fragments = [
            Fragment(
                cut,
                RowBlock(cut.shape, place.flat.detach()[:0], cut.rows(self.processes)),
                place.of(place.flat),
            )
            for place, cut in zip(self.places, cuts, strict=True)
        ]
        own_blocks = [fragment.block for fragment in self._fragments]
        self.blocks: dict[Tensor, RowBlock] = dict(zip(self.params, own_blocks, strict=True))
        self._numbers = {id(block): i for i, block in enumerate(own_blocks)}
        self._united: list[list[int]] = []
        blocks = iter(own_blocks)
        self.groups: list[Group] = []
        for group, own, called in zip(groups, params, names, strict=True):
            copied = {**group, "params": [next(blocks) for _ in own]}
            if any(name is not None for name in called):
                copied["param_names"] = list(called)
            self.groups.append(copied)

    def unite(self, members: Sequence[Sequence[Tensor]]) -> list[bool]:
        """Fills some blocks together: where one has a gradient all get their weights.

        Args:
            members: blocks that belong to one layer, for each layer.

        Returns:
            For each layer whether they are in several partitions, which step in turn.
        """
        united = [[self._numbers[id(block)] for block in own] for own in members]
        apart = [len({id(self.places[i].flat) for i in own}) > 1 for own in united]
        self._united = [own for own, several in zip(united, apart, strict=True) if several]
        return apart

    @contextmanager
    def shown(self, optimizer: Any, *, stepping: bool = False) -> Iterator[None]:
        """Exchanges an optimizer's groups for those with row blocks.

        Args:
            optimizer: whose `param_groups` are exchanged.
            stepping: fill the blocks of partitions with a gradient, and write them back after.
        """
        hidden = optimizer.param_groups
        for own, copied in zip(self._own, self.groups, strict=True):
            _copy_options(own, copied)
        optimizer.param_groups = self.groups
        stepped = self._fill(hidden) if stepping else []
        try:
            take_rows(stepped, self.processes)
            yield
            # Not after an error, which may be this process's alone: the others don't call it then.
            return_rows(stepped, self.processes)
            self._copy_to_model([f for f in stepped if f.gradient is None])
        finally:
            # Loading makes new groups.
            self.groups = optimizer.param_groups
            for own, copied in zip(self._own, self.groups, strict=True):
                _copy_options(copied, own)
            optimizer.param_groups = hidden

    def _fill(self, hidden: Sequence[Group]) -> list[Fragment]:
        """The fragments of partitions that have a gradient, with their entries."""
        known = {id(flat): flat.grad for group in hidden for flat in group["params"]}
        gradients = [known.get(id(place.flat)) for place in self.places]
        wanted = {i for i, gradient in enumerate(gradients) if gradient is not None}
        self.stepping = frozenset(self.places[i].partition for i in wanted)
        for members in self._united:
            if wanted.intersection(members):
                wanted.update(members)
        filled = []
        for i in sorted(wanted):
            param, place, fragment = self.params[i], self.places[i], self._fragments[i]
            gradient = gradients[i]
            fragment.weight = place.of(place.flat)
            fragment.gradient = None if gradient is None else place.of(gradient)
            if i not in self._checked and not hasattr(param, "ds_id"):
                _check(param, place, fragment.weight)
            self._checked.add(i)
            filled.append(fragment)
        return filled

    def entries(self, block: RowBlock) -> Tensor:
        """What this process has of a parameter's weight: its rows during a step, or its piece."""
        if block.grad is not None:
            return block.local
        place = self.places[self._numbers[id(block)]]
        return place.of(place.flat)

    def _copy_to_model(self, changed: Sequence[Fragment]) -> None:
        """Writes pieces to the model's weights, which the engine does only as it steps them."""
        found = {id(fragment): i for i, fragment in enumerate(self._fragments)}
        for fragment in changed:
            i = found[id(fragment)]
            param, place = self.params[i], self.places[i]
            own = getattr(param, "ds_tensor", None)
            start = place.start if own is None else 0
            whole = param.detach().view(-1) if own is None else own.detach()
            whole[start : start + place.entries].copy_(fragment.weight)


#: The key of a `state_dict` that says which part of the state it is.
PARTITION = "zero_partition"


def partition_of(partitions: Partitions) -> dict[str, Any]:
    """Which part this process has, in plain numbers.

    Returns:
        `world`, `rank`, and as `pieces` for each parameter [partition, offset in it, first entry of
        the flattened parameter, number of entries].
    """
    processes = partitions.processes
    pieces = [[p.partition, p.offset, p.start, p.entries] for p in partitions.places]
    return {"world": processes.world, "rank": processes.rank, "pieces": pieces}


def check_partition(partitions: Partitions | None, saved: Mapping[str, Any]) -> None:
    """Raises `ValueError` if a `state_dict` is another part than this process's."""
    found = saved.get(PARTITION)
    if found is None or (partitions is None and found["world"] == 1):
        return
    if partitions is not None and found == partition_of(partitions):
        return
    raise ValueError(
        f"the saved state is the part of rank {found['rank']} of {found['world']} that DeepSpeed's "
        "ZeRO had divided it among: accepted are as many processes at the same stage, or "
        "load_zero_checkpoint, which divides it anew"
    )


def show(optimizer: ManagedOptimizer, *, stepping: bool) -> AbstractContextManager[None]:
    """While parameters have been cut by ZeRO, shows blocks of them in an optimizer's groups.

    Args:
        optimizer: whose parameters may have been cut since the last call.
        stepping: see `Partitions.shown`.

    Raises:
        ValueError: the optimizer has taken a step before, or no engine holds what was cut.
    """
    if optimizer._partitions is None:
        _adopt(optimizer)
    partitions = optimizer._partitions
    if partitions is None:
        if stepping:
            _check_held(optimizer._plans.values())
        return nullcontext()
    if partitions.groups is optimizer.param_groups:
        return nullcontext()
    return partitions.shown(optimizer, stepping=stepping)


def _adopt(optimizer: ManagedOptimizer) -> None:
    """Finds the pieces of parameters that ZeRO has cut since construction, if it has."""
    plans = list(optimizer._plans.values())
    params = [param for plan in plans for param in plan.params]
    held = {id(param) for plan in plans for param in plan.group["params"]}
    if not any(partitioned(param) and id(param) not in held for param in params):
        return
    states = optimizer.state
    if not all(untouched(states[param]) for param in params if states.get(param)):
        raise ValueError(
            "the optimizer has taken a step before deepspeed.initialize: accepted is "
            "initialize first, then load_checkpoint"
        )
    for plan in plans:
        for param, name in zip(plan.params, plan.names, strict=True):
            if plan.core.by_expert(whole_shape(param)):
                raise ValueError(
                    f"{label(name, param)} holds experts and was cut by ZeRO: accepted is "
                    "fully_shard, DistributedDataParallel or ZeRO stage 0"
                )
    groups, names = [plan.group for plan in plans], [plan.names for plan in plans]
    partitions = Partitions(groups, [plan.params for plan in plans], names)
    for param in params:
        states.pop(param, None)
    optimizer._plans, optimizer._partitions = {}, partitions
    with partitions.shown(optimizer):
        for group, plan in zip(optimizer.param_groups, plans, strict=True):
            core = optimizer._complete(group, plan.snapshot)
            for block in group["params"]:
                if block.numel():
                    states[block] = optimizer.make_state(block, core, group)
            optimizer._record(group, core)
    optimizer._adopted()


def _check_held(plans: Iterable[Plan]) -> None:
    """Raises `ValueError` for a parameter of which no engine has cut a piece."""
    for plan in plans:
        for param, name in zip(plan.params, plan.names, strict=True):
            if is_cut(param):
                raise ValueError(
                    f"{label(name, param)} was cut by deepspeed.zero.Init and is in no engine: "
                    "accepted is deepspeed.initialize(model=..., optimizer=...), whose engine "
                    "takes the steps"
                )


def _copy_options(source: Group, target: Group) -> None:
    kept = ("params", "param_names")
    for key in [key for key in target if key not in kept and key not in source]:
        del target[key]
    target.update({key: value for key, value in source.items() if key not in kept})


def _check(param: Tensor, place: Place, entries: Tensor) -> None:
    """Raises `ValueError` if a parameter is not where its mapping says."""
    own = param.detach().flatten()[place.start : place.start + place.entries]
    if not torch.equal(own, entries.to(own.dtype)):
        raise ValueError(
            f"{label(None, param)} is not where DeepSpeed's mapping says: accepted is "
            "round_robin_gradients=false"
        )
