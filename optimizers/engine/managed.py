"""An optimizer that checks groups, parameters and state for consistency before each step."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any, ClassVar

from torch import Tensor
from torch.optim.optimizer import Optimizer, ParamsT

from ..projectors import MatrixKey
from . import state_dict as policy
from .adapt import PendingMoments
from .composition import Composition
from .devices import capturing
from .gradients import SkippedUpdates
from .in_backward.state import Pending, save_pending, take_pending
from .loaded import warn_of_nonfinite
from .options import Group, make_plain
from .plan import Plan, Snapshot
from .prepare import MadeBy, Maker, drop_unused, follow, revise
from .saved_method import METHOD, changed_options, check_method, warn_of_changes
from .seeds import seed_names
from .zero import PARTITION, Partitions, check_partition, partition_of, show

if TYPE_CHECKING:
    from .in_backward.handle import InBackward


class ManagedOptimizer(Optimizer):
    """Handles changed options, exchanged parameters, and saving and loading of state.

    A group's composition is computed once and cached until its options change. A subclass defines
    the composition and makes the state.
    """

    #: Whether groups that have a rank are projected.
    projects: ClassVar[bool]
    #: Options that can't be changed after construction.
    fixed_options: ClassVar[tuple[str, ...]] = ("capturable",)
    #: Group keys that the optimizer sets itself: they are state, which loading may change.
    set_keys: ClassVar[tuple[str, ...]] = ()
    #: Keywords of the constructor that are not group keys.
    ungrouped: ClassVar[tuple[str, ...]] = ()
    #: What `update_in_backward` has turned on.
    _in_backward: InBackward | None = None

    def __init__(self, params: ParamsT, defaults: dict[str, Any]) -> None:
        """As `torch.optim.Optimizer`."""
        self._forget()
        self._partitions: Partitions | None = None
        super().__init__(params, defaults)

    @abstractmethod
    def compose(self, group: Group) -> Composition:
        """The composition that a group's options describe."""

    @abstractmethod
    def _known(self) -> set[str]:
        """Names of options that a group may have."""

    @abstractmethod
    def _complete(self, group: Group, before: Snapshot | None) -> Composition:
        """Checks and completes a group that was changed since a snapshot."""

    @abstractmethod
    def _meaning(self, saved_group: Group) -> Composition:
        """Checks a saved group and returns its composition."""

    def make_state(self, param: Tensor, composition: Composition, group: Group) -> dict[str, Any]:
        """A new state for a parameter of a group."""
        return composition.init_state(param, capturable=group["capturable"])

    def _options_changed(self, group: Group, before: Group) -> None:
        """Called after changed options of a group were accepted in the middle of training."""

    def _forget(self) -> None:
        """Clears the cached plans and the counts of skipped updates."""
        self._plans: dict[int, Plan] = {}
        self._snapshots: dict[int, tuple[Group, Snapshot]] = {}
        self._pending_moments: dict[MatrixKey, PendingMoments] = {}
        self._skipped = SkippedUpdates()

    def _shown(self, *, stepping: bool = False) -> AbstractContextManager[None]:
        """While parameters have been cut by ZeRO, shows blocks of them in the groups."""
        return show(self, stepping=stepping)

    def _adopted(self) -> None:
        """Called when `_partitions` has been made."""

    def _record(self, group: Group, composition: Composition) -> None:
        drawn = seed_names(self.param_groups)[self._index_of(group)]
        self._plans[id(group)] = Plan(group, composition, self.state, Snapshot(group), drawn)

    def _index_of(self, group: Group) -> int:
        return next(i for i, own in enumerate(self.param_groups) if own is group)

    def _maker(self) -> Maker:
        return Maker(self._complete, self.make_state, self._options_changed, self.fixed_options)

    def _plan_of(self, group: Group) -> Plan | None:
        plan = self._plans.get(id(group))
        return plan if plan is not None and plan.group is group else None

    def _snapshot_of(self, group: Group) -> Snapshot | None:
        """The options that a group's state was made with, if known."""
        plan = self._plan_of(group)
        if plan is not None:
            return plan.snapshot
        found = self._snapshots.get(id(group))
        return found[1] if found is not None and found[0] is group else None

    def _made_by(self, snapshots: Sequence[Snapshot | None]) -> dict[int, MadeBy]:
        """By parameter id: what its state was made with, if known."""
        found = {
            id(param): MadeBy(plan.core, dtype)
            for plan in self._plans.values()
            for param, dtype in zip(plan.params, plan.dtypes, strict=True)
        }
        for group, snapshot in zip(self.param_groups, snapshots, strict=True):
            if snapshot is None or self._plan_of(group) is not None:
                continue
            core = None
            if not snapshot.holds(group):
                core = self.compose({**snapshot.options, "lr": group["lr"]})
            found |= {key: MadeBy(core, dtype) for key, dtype in snapshot.dtypes.items()}
        return found

    def _prepare(self) -> list[Plan]:
        """Plans of all groups, after checking options, parameters and state.

        Raises:
            ValueError: they are inconsistent; nothing is changed then.
        """
        plans = [self._plan_of(group) for group in self.param_groups]
        ready = [p for p in plans if p is not None and p.current() and p.settled(self.state)]
        if len(ready) == len(plans):
            if len(self._plans) > len(plans):  # a removed group's would keep its parameters alive
                self._plans = {id(plan.group): plan for plan in ready}
                self._skipped.keep_only([param for plan in ready for param in plan.params])
            for ready_plan in ready:
                ready_plan.read_rate()
            return ready
        if capturing():
            raise ValueError(
                "options, parameters or state were changed since the last step, while a CUDA graph "
                "is captured: accepted is a step before the capture"
            )
        snapshots = [self._snapshot_of(group) for group in self.param_groups]
        revised, pending = revise(
            self.param_groups,
            plans,
            self.state,
            self._made_by(snapshots),
            snapshots,
            self._maker(),
        )
        for revised_plan in revised:
            revised_plan.settled(self.state)
        self._plans = {id(plan.group): plan for plan in revised}
        self._skipped.keep_only([param for plan in revised for param in plan.params])
        self._snapshots = {}
        self._pending_moments |= pending
        return revised

    # Saving and loading

    def __getstate__(self) -> dict[str, Any]:
        """The state of a pickle or copy, without hooks; counts of skipped updates restart.

        Raises:
            ValueError: with `update_in_backward`, in the middle of a step.
        """
        if self._in_backward is not None:
            self._in_backward.check_idle("a pickle or copy of the optimizer")
        groups = [self._marked(group) or group for group in self.param_groups]
        return {**super().__getstate__(), "param_groups": groups}

    def _marked(self, group: Group, packed: Group | None = None) -> Group | None:
        """A copy that records the options of the state, or None if they have not changed since."""
        snapshot = self._snapshot_of(group)
        changed = policy.previous_options(group, snapshot) if snapshot is not None else {}
        return {**(packed or group), policy.STATE_OPTIONS: changed} if changed else None

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Restores a pickle or copy, and adds options that an older version lacked."""
        super().__setstate__(state)
        self.__dict__.setdefault("_partitions", None)
        skipped = self.__dict__.get("_skipped")
        self._forget()
        self._skipped = skipped or self._skipped
        for group in self.param_groups:
            for name, value in self.defaults.items():
                if name not in self.ungrouped:
                    group.setdefault(name, value)
            group.pop(METHOD, None)
            made_under = Snapshot(policy.options_of_state(group))
            group.pop(policy.STATE_OPTIONS, None)
            self._snapshots[id(group)] = (group, made_under)

    def state_dict(self) -> dict[str, Any]:
        """As `torch.optim.Optimizer.state_dict`; plain numbers and tensors, for `weights_only`.

        With `update_in_backward`, in the middle of an accumulation, the gradients so far are in it.

        Raises:
            ValueError: a parameter that is in no group has a trained state; or weights were updated
                in a backward pass that no `step()` has followed yet.
        """
        with self._shown():
            return self._shown_state_dict()

    def _shown_state_dict(self) -> dict[str, Any]:
        for group in self.param_groups:
            make_plain(group, self._known())
        for param in drop_unused(self.param_groups, self.state):
            raise ValueError(
                f"optimizer.state has an entry of a parameter of shape {tuple(param.shape)} that "
                "is in no group: accepted is optimizer.state.pop(parameter) first"
            )
        plans = [self._plan_of(group) for group in self.param_groups]
        follow(self.param_groups, plans, self.state, self._maker())

        def mark(_: Optimizer, saved: dict[str, Any]) -> None:
            groups = saved["param_groups"]
            pairs = zip(self.param_groups, groups, strict=True)
            marked = [self._marked(group, packed) or packed for group, packed in pairs]
            groups[:] = [{**group, METHOD: type(self).__name__} for group in marked]
            if self._partitions is not None:
                saved[PARTITION] = partition_of(self._partitions)
            save_pending(self._in_backward, self.param_groups, saved)

        hook = self.register_state_dict_post_hook(mark, prepend=True)
        try:
            return super().state_dict()
        finally:
            hook.remove()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Loads a `state_dict()`; every tensor keeps the dtype it was saved with.

        Options are as they were saved, with a warning where any that changes updates, but the
        learning rate, differs from what the optimizer was made with.

        Raises:
            ValueError: the state doesn't fit these parameters, or is another method's; nothing is
                changed then.
        """
        if not isinstance(state_dict, Mapping):
            raise ValueError(
                f"the saved state is a {type(state_dict).__name__}: accepted is what state_dict() "
                "gave"
            )
        found: dict[str, Any] = {}
        pending = Pending()
        changed: list[str] = []

        def inspect(_: Optimizer, loaded: dict[str, Any]) -> dict[str, Any]:
            nonlocal pending
            loaded, pending = take_pending(self._in_backward, self.param_groups, loaded)
            check_partition(self._partitions, loaded)
            saved_groups = policy.checked_groups(self.param_groups, loaded)
            check_method(type(self), self.param_groups, saved_groups, self.defaults)
            options = self._known() - {*self.set_keys}
            changed.extend(
                changed_options(self.param_groups, saved_groups, options, projects=self.projects)
            )
            loaded = policy.upgrade(self.param_groups, loaded, self._meaning)
            policy.check(self.param_groups, loaded, self._meaning)
            found.update(loaded)
            return loaded

        def restore(_: Optimizer) -> None:
            policy.restore_dtypes(self.param_groups, self.state, found)
            if self._in_backward is not None:
                self._in_backward.restore(pending)

        before = self.register_load_state_dict_pre_hook(inspect)
        after = self.register_load_state_dict_post_hook(restore, prepend=True)
        try:
            with self._shown():
                super().load_state_dict(state_dict)
                warn_of_nonfinite(type(self).__name__, self.param_groups, self.state)
        finally:
            before.remove()
            after.remove()
        warn_of_changes(type(self).__name__, changed)

    @property
    def skipped(self) -> int:
        """Number of parameter updates skipped because the gradient was not finite.

        Counted since construction or unpickling, by this process; not part of the state.
        """
        return self._skipped.total

    def skipped_by_name(self) -> dict[str, int]:
        """`skipped` by parameter, most first: {name or "group0.3": count}."""
        return self._skipped.by_name(self.param_groups)
