"""What an optimizer's steps on a whole model ask of a GPU, from its own code on fake tensors."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from lowrank.optimizers import FactoredAdamW, LowRankOptimizer, build
from lowrank.optimizers.engine.devices import assuming_memory
from lowrank.optimizers.engine.scratch import BatchWatcher, Bounded, watching_batches

from .driverless import driverless
from .fakes import DEPTHS, faking
from .launches import LaunchCounter, Launches, settle
from .ledger import Ledger
from .network import find_blocks, place


@dataclass(frozen=True)
class Steps:
    """What steps ask of a GPU.

    Attributes:
        usual: of one between refreshes.
        refreshing: of one that refits all bases; None where all steps are the same.
        gap: steps from one refresh to the next; None as well.
    """

    usual: Launches
    refreshing: Launches | None
    gap: int | None


def count_steps(
    method: str,
    make: Callable[[], nn.Module],
    *,
    memory: int | None = None,
    options: Mapping[str, Any] | None = None,
    refreshing: bool = True,
) -> Steps:
    """Counts steps of a method on a model.

    Of more equal blocks than the larger of `DEPTHS` a step follows from those of both: either all
    batches of matrices grow with the depth, or there are more of them. Where neither is certain all
    blocks take part.

    Args:
        method: a name that `build` accepts.
        make: makes the model, of tensors on "meta".
        memory: bytes of the GPU, by which scratch is bounded; None for one of 16 GiB or less.
        options: of `build`.
        refreshing: count a step with a refresh, too.

    Raises:
        ValueError: as `build`, or the method replaces layers, which need real backward passes.
    """

    def count(depth: int | None) -> Steps:
        model = make()
        if depth is not None:
            blocks = find_blocks(model)
            assert blocks is not None
            blocks.parent._modules[blocks.name] = nn.ModuleList(blocks.items[:depth])
        return _steps(method, model, memory, options or {}, refreshing=refreshing)

    blocks = find_blocks(make())
    few, many = DEPTHS
    if blocks is None or not blocks.equal or len(blocks.items) <= many:
        return count(None)
    depth = len(blocks.items)
    seen = _Splits()
    with watching_batches(seen):
        larger = count(many)
    if not all(_certain(own, depth) for own in seen.found if refreshing or not own.refits):
        return count(None)
    smaller = count(few)
    return Steps(
        _grown(smaller.usual, larger.usual, depth),
        None
        if smaller.refreshing is None or larger.refreshing is None
        else _grown(smaller.refreshing, larger.refreshing, depth),
        larger.gap,
    )


class _Splits(BatchWatcher):
    """All that is split."""

    def __init__(self) -> None:
        self.found: list[Bounded] = []

    def begin(self, split: Bounded) -> None:
        """See `BatchWatcher.begin`."""
        self.found.append(split)

    def end(self) -> None:
        """See `BatchWatcher.end`."""
        return


def _certain(split: Bounded, depth: int) -> bool:
    """Whether growth says how what was split of the larger of `DEPTHS` is split at a depth."""
    largest = max(split.sizes)
    one = split.total <= largest or split.total * depth <= split.bound * DEPTHS[1]
    return one or split.total >= split.bound + largest


def _grown(few: Launches, many: Launches, depth: int) -> Launches:
    """A step of a deeper model than those of `DEPTHS`."""
    smaller, larger = DEPTHS
    times = (depth - larger) / (larger - smaller)

    def on(first: float, second: float) -> float:
        return second + times * (second - first)

    found = Launches()
    for name in ("reads", "sends", "operations", "filled", "products", "passes"):
        setattr(found, name, round(on(getattr(few, name), getattr(many, name))))
    for name in many.by_name | few.by_name:
        found.by_name[name] = round(on(few.by_name[name], many.by_name[name]))
    for work in many.work | few.work:
        # Batches that grow are other work: that of fewer matrices is taken away as often as that
        # of more is added, so that sums are those of the depth.
        found.work[work] = on(few.work.get(work, 0.0), many.work.get(work, 0.0))
    return found


def _steps(
    method: str,
    model: nn.Module,
    memory: int | None,
    options: Mapping[str, Any],
    *,
    refreshing: bool,
) -> Steps:
    """Those of a model on "meta", which becomes one of fakes of a GPU."""
    device = torch.device("cuda")
    with faking(FakeTensorMode()), assuming_memory(memory or 0), Ledger() as ledger:
        place(model, device)
        with driverless(device), torch.random.fork_rng(devices=[]):
            optimizer = build(method, model, **options)
            if isinstance(optimizer, FactoredAdamW):
                raise ValueError(
                    f"optimizer={method!r} replaces layers: modelled are times of methods that "
                    "don't, as such layers need real backward passes"
                )
            settle(optimizer, ledger)
            _differentiate(optimizer)
            optimizer.step()  # makes what all later steps use
            settle(optimizer, ledger)
            usual = _counted(optimizer)
            gaps = [group.get("update_proj_gap") for group in optimizer.param_groups]
            gap = max((own for own in gaps if isinstance(own, int)), default=None)
            if gap is None or not refreshing:
                return Steps(usual, None, None)
            settle(optimizer, ledger, refreshing=True)
            found = _counted(optimizer)
    return Steps(usual, found, gap) if found.work != usual.work else Steps(usual, None, None)


def _counted(optimizer: LowRankOptimizer) -> Launches:
    """What the next step asks of a GPU."""
    with LaunchCounter((0, 0), 0) as counter:  # no matrix is told apart
        optimizer.step()
    found: Launches = counter.found
    return found


def _differentiate(optimizer: LowRankOptimizer) -> None:
    """Gives all parameters gradients."""
    for group in optimizer.param_groups:
        for param in group["params"]:
            param.grad = torch.empty(param.shape, dtype=param.dtype, device=param.device)
