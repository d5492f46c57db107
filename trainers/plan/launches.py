"""What a step asks of a GPU: kernel launches, and numbers that the host reads back.

A step of same-shaped matrices runs on fake tensors of a GPU, with all kernels taken to be there, so
that every branch is the one that a GPU takes, and no GPU is needed. The rule of counting:

- Views, metadata and uninitialised memory are free, and so is what runs on the host.
- A product of two single matrices is a *product*; any other operation on a tensor of a gradient's
  size, or a piece of one, is a *pass*. Both are work on single matrices, which torch can't
  collect without copying the gradients into one tensor. Full-rank Muon, whose moments are of that
  size, has several matrices in one tensor: its products and passes are such of all of them.
- Everything else is an *operation*: of single numbers, of projected gradients, of lists.
- A list operation counts the launches that torch makes of it (`list_launches`), or, where its
  tensors don't suit that, one for each tensor. Ours count those of `cuda/device`.
- Of a list operation that torch cuts since one launch takes 21 million entries at most, launches
  that have as many are counted apart, as *filled*: they take as long as reading and writing 21
  million entries does, ten times as long as launching them.
- A *read* waits for the GPU: a number read back, an allocation whose size depends on data, or a
  copy to the host. A *send* is a copy from
  the host, which a captured graph would repeat.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from lowrank.optimizers import LowRankOptimizer, build
from lowrank.optimizers.engine.devices import assuming_memory

from .driverless import driverless
from .fakes import faking
from .ledger import Ledger
from .work import Work, work_of

_aten = torch.ops.aten
_READ = _aten._local_scalar_dense.default
_PRODUCTS = {"mm", "addmm", "addmm_"}
#: Products where the matrices are of a weight's size, else operations.
_BATCHED = {"bmm", "baddbmm", "baddbmm_"}
#: Operations that launch nothing.
FREE = {"empty", "empty_like", "empty_strided", "new_empty", "detach", "_unsafe_view", "alias"}
FREE |= {"detach_", "set_", "resize_", "_reshape_alias", "lift_fresh"}
#: Their results' sizes are read back.
_SIZED_BY_DATA = {"nonzero", "masked_select", "_unique2", "unique_dim"}
#: torch's multi_tensor_apply: tensors of one launch by the number of lists, blocks of one launch,
#: entries of a block.
_LIST_TENSORS = {1: 110, 2: 64, 3: 48, 4: 36, 5: 30}
_LIST_BLOCKS, _BLOCK_ENTRIES = 320, 1 << 16
#: Tensors of one launch of our kernels (cuda/device/lists.h).
_MANY = 472
_OWN_LISTS = {"adam", "adam_8bit", "adam_weights", "gaussian_list", "limit_growth"}
_OWN_LISTS |= {"dequantize_groups_list", "dequantize_int4_list", "write_back_list", "step_seeds"}
#: Tensors that one launch concatenates.
_CONCATENATED = 128


def list_launches(sizes: Sequence[int], lists: int) -> tuple[int, int]:
    """Launches of a list operation of torch: as many tensors and blocks of entries as one takes.

    Args:
        sizes: entries of each tensor.
        lists: number of lists.

    Returns:
        How many there are, and how many of them have as many blocks as one takes.
    """
    most, launches, tensors, blocks = _LIST_TENSORS[min(lists, 5)], 0, 0, 0
    filled = 0
    for size in filter(None, sizes):
        tensors += 1
        for left in range(-(-size // _BLOCK_ENTRIES), 0, -1):
            blocks += 1
            if blocks == _LIST_BLOCKS or (left == 1 and tensors == most):
                launches += 1
                filled += blocks == _LIST_BLOCKS
                blocks, tensors = 0, int(left > 1)
    return launches + (blocks > 0), filled


@dataclass
class Launches:
    """What the counted operations ask of a GPU.

    Attributes:
        reads: times that the host waits for a number.
        sends: copies from the host.
        operations: launches that are neither products nor passes, nor filled.
        filled: launches of list operations that have as many entries as one takes.
        products: matrix products with a gradient or into a weight.
        passes: other operations on tensors of a gradient's size.
        by_name: launches of each operation.
        pieces: into how many a pass or product cuts a matrix, at most.
        scratch: bytes that the step takes at its highest moment.
        work: what each operation moves and computes, and how often there is one like it.
    """

    reads: int = 0
    sends: int = 0
    operations: int = 0
    filled: int = 0
    products: int = 0
    passes: int = 0
    by_name: Counter[str] = field(default_factory=Counter)
    pieces: int = 0
    scratch: int = 0
    work: dict[Work, float] = field(default_factory=dict)

    @property
    def launches(self) -> int:
        """All of them."""
        return self.operations + self.filled + self.products + self.passes


class LaunchCounter(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts what operations on fake tensors of a GPU would launch; see the module.

    Args:
        shape: of the matrices: tensors of this shape are gradients, weights or copies of them.
        rank: tensors with one side of that shape and another above this are pieces of them.
    """

    def __init__(self, shape: tuple[int, int], rank: int) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.found = Launches()
        self._shape, self._rank = shape, rank
        self._read_of: object = None
        self._places: defaultdict[tuple[str, int], set[Any]] = defaultdict(set)

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Runs an operation and counts it."""
        out = func(*args, **(kwargs or {}))
        given = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        made = [leaf for leaf in tree_leaves(out) if isinstance(leaf, Tensor)]
        self._count(func, args, kwargs or {}, given, made)
        return out

    def _count(
        self,
        func: Any,
        args: Any,
        kwargs: dict[str, Any],
        given: list[Tensor],
        made: list[Tensor],
    ) -> None:
        if func.namespace == "prim":
            return
        if func is _READ and given[0].is_cuda:
            storage = given[0].untyped_storage()._cdata
            if storage != self._read_of:  # a table's numbers come one by one of a fake tensor
                self.read("tolist or item")
            self._read_of = storage
            return
        found, name = self.found, func._schema.name.rpartition("::")[2]
        on_device = [tensor.is_cuda for tensor in (*given, *made)]
        if not any(on_device) or name in FREE or func.is_view:
            return
        self._read_of = None
        label = name if func.namespace == "aten" else f"{func.namespace}::{name}"
        masked = name.startswith("index") and any(t.dtype == torch.bool for t in given[1:])
        if masked or name in _SIZED_BY_DATA or (_copies(name) and not _lands(given, made)):
            self.read(label)
            return
        if _copies(name) and not all(t.is_cuda for t in given if t.dim()):
            found.sends += 1
        launches, filled = _launches(func, name, args, given)
        found.by_name[label] += launches
        work = work_of(func, label, args, kwargs, made, launches)
        found.work[work] = found.work.get(work, 0.0) + 1
        dense = self._is_dense(given, made)
        if name not in _PRODUCTS and not dense:
            # One that has as many entries takes the place of an operation that isn't cut.
            apart = min(filled, launches - 1)
            found.operations += launches - apart
            found.filled += apart
            return
        for tensor in given:
            whole = tensor._base
            if whole is not None and whole.dim() == 2 and self._large(whole):
                at = self._places[label, tensor.untyped_storage()._cdata]
                at.add(tensor.storage_offset())
                found.pieces = max(found.pieces, len(at))
        if name in _PRODUCTS or name in _BATCHED:
            found.products += launches
        else:
            found.passes += launches

    def read(self, label: str) -> None:
        """Counts a number that is read back."""
        self.found.reads += 1
        self.found.by_name[f"read by {label}"] += 1

    def _is_dense(self, given: list[Tensor], made: list[Tensor]) -> bool:
        """Whether an operation is on a matrix of a weight's size, or on a piece of one."""
        return any(map(self._whole, (*given, *made)))

    def _whole(self, tensor: Tensor) -> bool:
        whole = tensor if tensor._base is None else tensor._base
        return self._large(tensor) or self._large(whole)

    def _large(self, tensor: Tensor) -> bool:
        if tensor.dim() not in (2, 3):
            return False
        rows, columns = tensor.shape[-2:]
        return (rows in self._shape and columns > self._rank) or (
            columns in self._shape and rows > self._rank
        )


def _lands(given: list[Tensor], made: list[Tensor]) -> bool:
    """Whether a copy's result is on a GPU; a list copy returns nothing."""
    return (made or given)[0].is_cuda


def _copies(name: str) -> bool:
    return name in ("_to_copy", "copy_", "_foreach_copy_")


def _launches(func: Any, name: str, args: Any, given: list[Tensor]) -> tuple[int, int]:
    """How many launches an operation is, and how many of them are filled."""
    if func.namespace == "lowrank":
        return (-(-len(args[0]) // _MANY) if name in _OWN_LISTS else 1), 0
    lists = [argument for argument in args if _is_list(argument)]
    if name.startswith(("_foreach", "_fused")):
        return _list_operation(name, lists)
    if name in ("cat", "stack"):
        return -(-len(given) // _CONCATENATED), 0
    return 1, 0


def _is_list(value: Any) -> bool:
    return isinstance(value, list | tuple) and bool(value) and isinstance(value[0], Tensor)


def _list_operation(name: str, lists: list[Any]) -> tuple[int, int]:
    rows = list(zip(*lists, strict=False))
    suitable = all(
        tensor.shape == row[0].shape
        and tensor.stride() == row[0].stride()
        and tensor.device == row[0].device
        for row in rows
        for tensor in row
    )
    if not suitable:
        return len(rows), 0
    outputs = 0 if name.endswith("_") or name == "_foreach_norm" else 1
    sizes = [tensor.numel() for tensor in lists[0] if tensor.is_cuda]
    launches, filled = list_launches(sizes, len(lists) + outputs)
    return launches + (name == "_foreach_norm"), filled


def count_step(
    method: str,
    shape: tuple[int, int],
    matrices: int,
    dtype: torch.dtype = torch.bfloat16,
    *,
    refreshing: bool = False,
    memory: int | None = None,
    device_rate: bool = False,
    **options: Any,
) -> Launches:
    """What a step asks of a GPU for matrices of one shape with finite gradients.

    Args:
        method: a name that `build` accepts.
        shape: of the matrices.
        matrices: how many.
        dtype: of weights and gradients.
        refreshing: all bases are refitted in it; between refreshes none is.
        memory: bytes of the GPU, by which scratch is bounded; None for one of 16 GiB or less.
        device_rate: the learning rate is a tensor on the GPU.
        options: of `build`.
    """
    m, n = shape
    with faking(FakeTensorMode()), assuming_memory(memory or 0), Ledger() as ledger:
        model = nn.ModuleDict(
            {f"mlp_{i}": nn.Linear(n, m, bias=False, device="meta") for i in range(matrices)}
        )
        for layer in model.values():
            layer.weight = nn.Parameter(torch.empty(m, n, dtype=dtype, device="cuda"))
        with driverless(torch.device("cuda")):
            if device_rate:
                options["lr"] = torch.empty((), device="cuda")
            optimizer = build(method, model, **options)
            settle(optimizer, ledger)
            for param in model.parameters():
                param.grad = torch.empty(m, n, dtype=dtype, device="cuda")
            optimizer.step()  # makes what all later steps use
            settle(optimizer, ledger, refreshing=refreshing)
            ledger.restart()
            held = ledger.now.total
            with LaunchCounter(shape, options.get("rank", 0)) as counter:
                optimizer.step()
            counter.found.scratch = ledger.peak.total - held
    found: Launches = counter.found
    return found


def settle(optimizer: LowRankOptimizer, ledger: Ledger, *, refreshing: bool = False) -> None:
    """Sets step counts: as after a first step, which fitted all bases, or as before a refresh."""
    for group in optimizer.param_groups:
        steps = float(group.get("update_proj_gap", 1)) if refreshing else 1.0
        for param in group["params"]:
            state = optimizer.state[param]
            ledger.know(state["step"], steps)
            if "refreshed_at" in state:
                state["refreshed_at"] = 0
