"""Updates in the backward pass: what becomes of each parameter's gradient there."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Set
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor, nn

from lowrank.optimizers import InBackward as Handle
from lowrank.optimizers import update_in_backward
from lowrank.optimizers.engine.in_backward.state import Pending
from lowrank.optimizers.engine.in_backward.sums import projected_gradient
from lowrank.optimizers.engine.low_rank_gradients import examine
from lowrank.optimizers.engine.parameters import unique_names
from lowrank.optimizers.layers.base import FactoredLinear

from .deeper import Step
from .fakes import Fake, gradient_size
from .ledger import Ledger
from .update import empty_gradients

#: More events of a layer than a run has steps.
_ALL_EVENTS = 1 << 40


@dataclass(frozen=True)
class Sum:
    """A parameter's sum of projected gradients.

    Attributes:
        kept: bytes between the backward passes of a step.
        projecting: bytes that a projection adds while the gradient is there.
        update: bytes that the update by the sum adds.
    """

    kept: int
    projecting: int
    update: int


@dataclass(frozen=True)
class Used:
    """What the update of a parameter adds in the last backward pass of a step, in bytes.

    Attributes:
        due: in a step with refits.
        usual: in one without, by the whole gradient.
        total: the sum that is kept between the passes of such a step; None for the gradient itself.
    """

    due: int
    usual: int
    total: Sum | None


@dataclass(frozen=True)
class InBackward:
    """What becomes of gradients in the backward passes of a step; parameters by their `id`.

    Attributes:
        scratch: bytes that the update of a parameter adds; these parameters' gradients are used and
            freed in the last pass, the others' are left to the step.
        sums: of what is kept as a sum between passes; all other gradients are kept whole.
        fits: bytes that a parameter's refit adds in the first pass, after which there is a sum.
        accumulation: backward passes of a step.
        leaves_more: whether layers keep more than gradients between passes.
    """

    scratch: Mapping[int, int] = field(default_factory=dict)
    sums: Mapping[int, Sum] = field(default_factory=dict)
    fits: Mapping[int, int] = field(default_factory=dict)
    accumulation: int = 1
    leaves_more: bool = False

    @property
    def begins(self) -> bool:
        """Whether the first pass is run; with more than two it is no higher than the one after."""
        return self.accumulation < 3 or self.leaves_more or bool(self.fits)

    @property
    def passes(self) -> int:
        """How many are run: the first one, one between, and the last, as far as they are needed."""
        return min(self.accumulation, 3 if self.begins else 2)


@dataclass(frozen=True)
class Kinds:
    """Steps that differ in what becomes of gradients.

    Attributes:
        due: those with refits, as the first one is; None if all gradients are left to the step.
        usual: those without, where they keep other things between passes; else None.
    """

    due: InBackward | None
    usual: InBackward | None = None

    def all(self) -> list[InBackward | None]:
        """Those with refits first."""
        return [self.due] if self.usual is None else [self.due, self.usual]


def trained(fake: Fake) -> list[tuple[str, nn.Parameter]]:
    """The optimizer's parameters with the names that it has for them."""
    groups = fake.optimizer.param_groups
    params = [param for group in groups for param in group["params"]]
    return list(zip(unique_names(groups), params, strict=True))


def kind_of(fake: Fake, param: nn.Parameter) -> tuple[object, ...]:
    """What parameters have in common whose updates take the same memory."""
    numbers = (
        number
        for number, group in enumerate(fake.optimizer.param_groups)
        if any(param is own for own in group["params"])
    )
    return next(numbers), tuple(param.shape)


def left_to_step(fake: Fake, *, due: bool = True) -> Set[str]:
    """Parameters whose gradients a backward pass leaves, with or without events of layers."""
    ledger = Ledger()  # answers what is read back
    states = fake.optimizer.state.values()
    events = [(entries, entries["events"]) for entries in states if "events" in entries]
    for entries in states:
        ledger.know(entries["step"], 0.0)
    for entries, _ in events if not due else ():
        entries["events"] = _ALL_EVENTS
    try:
        with ledger, update_in_backward(fake.optimizer) as handle:  # raises if it can't
            return frozenset(handle.whole())
    finally:
        for entries, former in events:
            entries["events"] = former


def kinds(
    fake: Fake, left: Set[str], used: Mapping[object, Used], accumulation: int, refit: str
) -> Kinds:
    """The steps of a model.

    Args:
        fake: the model.
        left: parameters whose gradients are left to the step.
        used: by `kind_of`, of all others.
        accumulation: backward passes of a step.
        refit: what bases are fitted to, as of `update_in_backward`.
    """
    own = {
        id(param): used[kind_of(fake, param)] for name, param in trained(fake) if name not in left
    }
    made = partial(InBackward, accumulation=accumulation, leaves_more=leaves_more(fake))
    due = {key: one.due for key, one in own.items()}
    usual = {key: one.usual for key, one in own.items()}
    sums = {key: one.total for key, one in own.items() if one.total is not None}
    if refit == "first" and sums:
        fits = {key: due[key] for key in sums}
        return Kinds(made(due | {key: usual[key] for key in sums}, sums, fits))
    return Kinds(made(due), made(usual, sums) if sums else None)


def leaves_more(fake: Fake) -> bool:
    """Whether layers hand more to the optimizer than gradients."""
    return any(isinstance(m, FactoredLinear) and m.LEAVES_MORE for m in fake.model.modules())


def bytes_of(fake: Fake, names: Set[str], depth: int) -> int:
    """Bytes of gradients in a model of few blocks, taken on to so many."""
    blocks, inside, others = fake.blocks.items, 0, 0
    own = {id(param) for block in blocks for param in block.parameters()}
    for name, param in trained(fake):
        if name in names and id(param) in own:
            inside += gradient_size(param)
        elif name in names:
            others += gradient_size(param)
    return inside * depth // len(blocks) + others


def summed(
    fake: Fake,
    param: nn.Parameter,
    granularity: int,
    simulated: Callable[[Callable[[], None]], list[Step]],
) -> Sum | None:
    """A parameter's sum in a step without a refit; None if its gradient is kept whole there, too.

    Args:
        fake: the model, which has taken no steps.
        param: its parameter.
        granularity: bytes to which the allocator rounds up.
        simulated: takes the first step and one without a refit, each after what it is given was
            called.
    """
    if not isinstance(examine(fake.optimizer)[id(param)], int):
        return None
    with update_in_backward(fake.optimizer, accumulation=2) as handle:
        micro_batches = _MicroBatches(fake, param, handle, granularity)
        steps = simulated(micro_batches)
    if not micro_batches.kept or len(steps) < 2:
        return None
    return Sum(micro_batches.kept, micro_batches.projecting, steps[1].peak)


class _MicroBatches:
    """Leaves a gradient before the first step, and a sum of its projections before others."""

    def __init__(self, fake: Fake, param: nn.Parameter, handle: Handle, granularity: int) -> None:
        self._fake, self._param, self._handle = fake, param, handle
        self._granularity, self._first = granularity, True
        self.kept = self.projecting = 0

    def __call__(self) -> None:
        empty_gradients(self._fake.model, [self._param], replace=False)
        if self._first:
            self._first = False
            return
        total = self._projected()
        if total is not None:
            self._param.grad = None
            projected: dict[Tensor, Tensor] = {self._param: total}
            self._handle.restore(Pending(passes=2, projected=projected))

    def _projected(self) -> Tensor | None:
        ledger = Ledger(self._granularity)
        ledger.hold(self._held(), "held")
        before = ledger.now.total
        with torch.no_grad(), ledger:
            total = projected_gradient(self._fake.optimizer, self._param)
            self.projecting = ledger.peak.total - before
            self.kept = ledger.now.total - before
        return total

    def _held(self) -> Iterator[Tensor]:
        yield from self._fake.model.parameters()
        if self._param.grad is not None:
            yield self._param.grad
        for entries in self._fake.optimizer.state.values():
            yield from (value for value in entries.values() if isinstance(value, Tensor))
