"""The optimizer that every method is: groups, state, and the order in which the seams act."""

from __future__ import annotations

import contextlib
import warnings
from abc import abstractmethod
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, ClassVar, overload

import torch
from torch import Tensor
from torch.optim.optimizer import Optimizer, ParamsT
from torch.utils.hooks import RemovableHandle

from . import checks
from . import state_dict as policy
from .batching import refresh_batches, update_batches
from .composition import Composition, Projection
from .gradients import check_param, descent_gradient, finite, label, names
from .options import (
    COMMON_DEFAULTS,
    PROJECTION_DEFAULTS,
    Group,
    ProjectionOptions,
    check_common,
    check_lr,
)
from .projectors import RowRange, Slot
from .refreshing import RefreshHook, refresh


class LowRankOptimizer(Optimizer):
    """Base of all methods: a `torch.optim.Optimizer` whose groups may be projected.

    A subclass says with `compose` what a group's options mean. State is made at construction and in
    `add_param_group` and holds tensors and integers only.
    """

    #: Whether a group with `rank` is projected; baselines ignore the key.
    projects: ClassVar[bool] = True
    #: Whether step counts may stay on the device.
    supports_capturable: ClassVar[bool] = False

    def __init__(
        self, params: ParamsT, defaults: dict[str, Any], options: Mapping[str, Any] | None = None
    ) -> None:
        """Checks the groups and makes their state.

        Args:
            params: parameters, named parameters or groups, as for `torch.optim`.
            defaults: the method's own options.
            options: common (and projection) keywords of the constructor.

        Raises:
            ValueError: an option is unknown or out of range, or a parameter can't be optimized.
        """
        accepted: dict[str, Any] = {**COMMON_DEFAULTS}
        if self.projects:
            accepted |= PROJECTION_DEFAULTS
        for name in options or {}:
            if name not in accepted:
                raise checks.unknown_name("keyword", name, [*accepted, *defaults])
        self._refresh_hooks: dict[int, RefreshHook] = OrderedDict()
        super().__init__(params, {**defaults, **accepted, **(options or {})})
        if self.projects and not any(group.get("rank") for group in self.param_groups):
            warnings.warn(
                f"{type(self).__name__}: no parameter group has a rank, so nothing is projected; "
                "param_groups(model) makes groups that are",
                stacklevel=3,
            )

    @abstractmethod
    def compose(self, group: Group) -> Composition:
        """What a group's options mean: pure, cheap, and raising `ValueError` for bad values."""

    # Groups and state

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Adds a group and makes its parameters' state; on an error nothing is added.

        Raises:
            ValueError: as in the constructor.
        """
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        try:
            composition = self._checked(group)
            for param, name in zip(group["params"], names(group), strict=True):
                check_param(param, name, composition)
            for param in group["params"]:
                if param.numel():
                    self.state[param] = composition.init_state(
                        param, capturable=group["capturable"]
                    )
        except Exception:
            self.param_groups.pop()
            for param in group["params"]:
                self.state.pop(param, None)
            raise

    def _checked(self, group: Group) -> Composition:
        known = {*self.defaults, *(ProjectionOptions.names() if self.projects else ())}
        for name in group.keys() - known - {"params", "param_names", "initial_lr"}:
            guess = checks.nearest(name, known, cutoff=0.85)
            if guess is not None and guess not in group.keys() - self.defaults.keys():
                raise checks.unknown_name("group key", name, known)
        check_common(group)
        if group["capturable"] and not self.supports_capturable:
            raise ValueError(f"capturable=True: {type(self).__name__} accepts False")
        if group["lr"] is not None:
            check_lr(group["lr"])
        checks.number("weight_decay", group["weight_decay"], low=0.0)
        options = ProjectionOptions.of(group) if self.projects else None
        if options is not None:
            for name in ProjectionOptions.names():
                group.setdefault(name, getattr(options, name))
        return self.compose(group)

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Restores a pickle or copy, and fills in options that an older version lacked."""
        super().__setstate__(state)
        self.__dict__.setdefault("_refresh_hooks", OrderedDict())
        for group in self.param_groups:
            for name, value in self.defaults.items():
                group.setdefault(name, value)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Loads what `state_dict()` gave; every tensor keeps the dtype it was saved with.

        Raises:
            ValueError: the state doesn't fit these parameters; nothing is changed then.
        """
        found: dict[str, Any] = {}

        def inspect(_: Optimizer, loaded: dict[str, Any]) -> None:
            policy.check(self.param_groups, loaded, self._template)
            found.update(loaded)

        def restore(_: Optimizer) -> None:
            policy.restore_dtypes(self.param_groups, self.state, found)

        before = self.register_load_state_dict_pre_hook(inspect)
        after = self.register_load_state_dict_post_hook(restore, prepend=True)
        try:
            super().load_state_dict(state_dict)
        finally:
            before.remove()
            after.remove()

    def _template(self, param: Tensor, saved_group: Group) -> dict[str, Any]:
        group = {**self.defaults, **saved_group}
        return self.compose(group).init_state(param, capturable=False)

    def register_refresh_hook(self, hook: RefreshHook) -> RemovableHandle:
        """Calls `hook(event)` after each refresh of a matrix; measuring costs one projection.

        Hooks are not part of the state: a pickle or copy has none.
        """
        handle = RemovableHandle(self._refresh_hooks)
        self._refresh_hooks[handle.id] = hook
        return handle

    # The step

    @overload
    def step(self, closure: None = None) -> None: ...

    @overload
    def step(self, closure: Callable[[], float]) -> float: ...

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """Takes one step.

        Args:
            closure: evaluates the model with gradients and returns the loss.

        Raises:
            ValueError: a gradient is sparse.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        compositions = [self.compose(group) for group in self.param_groups]
        pairs = list(zip(self.param_groups, compositions, strict=True))
        count = sum(len(group["params"]) for group, made in pairs if made.projection)
        index = 0
        with _no_autocast():
            for group, composition in pairs:
                if composition.projection is None:
                    self._step_plain(group, composition)
                else:
                    slots = self._slots(group, composition.projection, index)
                    if not _capturing():
                        self._refresh_due(slots, composition.projection, count)
                    self._step_projected(group, composition, composition.projection, slots)
                    index += len(group["params"])
        return loss

    def _step_plain(self, group: Group, composition: Composition) -> None:
        params, grads, called = [], [], []
        for param, name in zip(group["params"], names(group), strict=True):
            grad = descent_gradient(param, name, group)
            if grad is not None:
                params.append(param)
                grads.append(grad)
                called.append(name)
        kept = self._finite(grads, group, lambda i: label(called[i], params[i]))
        for batch in update_batches([params[i] for i in kept], self.state, group):
            picked = [kept[i] for i in batch]
            states = [self.state[params[i]] for i in picked]
            for state in states:
                state["step"].add_(1)
            composition.rule.apply([grads[i] for i in picked], states, [params[i] for i in picked])

    def _slots(self, group: Group, projection: Projection, first: int) -> list[Slot]:
        slots = []
        for offset, (param, name) in enumerate(zip(group["params"], names(group), strict=True)):
            grad = descent_gradient(param, name, group)
            if grad is not None:
                state = self.state[param]
                slot = Slot(
                    param=param,
                    grad=grad,
                    state=state,
                    geometry=projection.geometry(param.shape),
                    rows=RowRange.whole(param.shape[0]),
                    index=first + offset,
                    taken=0 if _capturing() else int(state["step"]),
                    name=name,
                )
                slots.append(slot)
        return slots

    def _refresh_due(self, slots: Sequence[Slot], projection: Projection, count: int) -> None:
        due = [
            slot
            for slot in slots
            if projection.schedule.due(slot.state, slot.taken, slot.index, count)
        ]
        for batch in refresh_batches(due):
            refresh(batch, projection, tuple(self._refresh_hooks.values()))

    def _step_projected(
        self, group: Group, composition: Composition, projection: Projection, slots: list[Slot]
    ) -> None:
        projector, scale = projection.projector, projection.options.scale
        for indices in update_batches([slot.param for slot in slots], self.state, group):
            batch = [slots[i] for i in indices]
            lows = [projector.project(slot) for slot in batch]
            # A non-finite gradient always shows in its projection, which is smaller to read.
            called = [label(slot.name, slot.param) for slot in batch]
            kept = self._finite(lows, group, called.__getitem__)
            batch, lows = [batch[i] for i in kept], [lows[i] for i in kept]
            if not batch:
                continue
            for slot in batch:
                slot.state["step"].add_(1)
            updates = composition.rule.update(
                lows, [slot.state for slot in batch], [slot.param for slot in batch]
            )
            for slot, low, update in zip(batch, lows, updates, strict=True):
                keep = update.keep
                if isinstance(keep, Tensor):
                    slot.param.mul_(keep)
                    keep = 1.0
                projector.write_back(slot, update.delta, alpha=scale * update.alpha, keep=keep)
                projector.track(slot, low)

    def _finite(
        self, tensors: Sequence[Tensor], group: Group, called: Callable[[int], str]
    ) -> list[int]:
        """Positions of the tensors to go on with; warns once about the first that is left out."""
        if not group["skip_nonfinite"] or group["capturable"]:
            return list(range(len(tensors)))

        def complain(position: int) -> None:
            if not self.__dict__.get("_warned_nonfinite"):
                self._warned_nonfinite = True
                warnings.warn(
                    f"non-finite gradient of {called(position)}: this step leaves it as it is "
                    "(said once; skip_nonfinite=False turns the check off)",
                    stacklevel=5,
                )

        return [i for i, good in enumerate(finite(tensors, complain)) if good]


def _capturing() -> bool:
    return torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()


@contextlib.contextmanager
def _no_autocast() -> Iterator[None]:
    """Decompositions and updates keep their own precisions inside a user's autocast region."""
    with contextlib.ExitStack() as stack:
        for device in ("cpu", "cuda"):
            if torch.is_autocast_enabled(device):
                stack.enter_context(torch.autocast(device, enabled=False))
        yield
