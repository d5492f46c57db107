"""The optimizer that every method is: groups, state, and the order in which the seams act."""

from __future__ import annotations

import contextlib
import warnings
from abc import abstractmethod
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Set
from typing import Any, ClassVar, overload

import torch
from torch.optim.optimizer import ParamsT
from torch.utils.hooks import RemovableHandle

from . import checks
from .composition import Composition
from .gradients import check_gradients
from .managed import ManagedOptimizer
from .options import (
    COMMON_DEFAULTS,
    PROJECTION_DEFAULTS,
    Group,
    ProjectionOptions,
    check_common,
    check_lr,
    make_plain,
)
from .parameters import check_names, check_param, name_alike, names
from .plan import Snapshot
from .refresh import RefreshHook
from .step import Usable, step_plain, step_projected
from .strategies import (
    check_strategy_options,
    drop_left_over,
    strategy_option_owners,
    strategy_options,
)


class LowRankOptimizer(ManagedOptimizer):
    """Base of all methods: a `torch.optim.Optimizer` whose groups may be projected.

    A subclass says with `compose` what a group's options mean. State is made at construction and in
    `add_param_group` and holds tensors and integers only.
    """

    #: Whether a group with `rank` is projected; baselines ignore the key.
    projects: ClassVar[bool] = True
    #: Whether step counts may stay on the device.
    supports_capturable: ClassVar[bool] = False
    #: A method's own choice among the keywords of `ProjectionKeywords`.
    projection_defaults: ClassVar[Mapping[str, Any]] = {}
    #: Other names of group keys, as the method's official code calls them.
    aliases: ClassVar[Mapping[str, str]] = {}

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
        defaults, options = {**defaults}, {**(options or {})}
        for given in (defaults, options):
            make_plain(given)
        accepted: dict[str, Any] = {**COMMON_DEFAULTS}
        if self.projects:
            accepted |= {**PROJECTION_DEFAULTS, **self.projection_defaults}
        for name in options:
            if name not in self.keywords():
                raise checks.unknown_name("keyword", name, [*self.keywords(), *defaults])
        accepted |= options
        if self.projects:
            check_strategy_options(options, strategy_options({"rank": 1, **accepted}))
        self._refresh_hooks: dict[int, RefreshHook] = OrderedDict()
        super().__init__(params, {**defaults, **accepted})
        if self.projects and not any(ProjectionOptions.of(group) for group in self.param_groups):
            warnings.warn(
                f"{type(self).__name__}: no parameter group has a rank, so nothing is projected; "
                "param_groups(model) makes groups that are",
                stacklevel=3,
            )

    @classmethod
    def keywords(cls) -> set[str]:
        """Names of the keywords that every constructor of this class takes as `**options`."""
        if not cls.projects:
            return set(COMMON_DEFAULTS)
        return {
            *COMMON_DEFAULTS,
            *PROJECTION_DEFAULTS,
            *cls.projection_defaults,
            *strategy_option_owners(),
        }

    @classmethod
    def group_keys(cls) -> set[str]:
        """Names of the group keys about projection; baselines ignore `ProjectionOptions`'."""
        if not cls.projects:
            return set(ProjectionOptions.names())
        return {*ProjectionOptions.names(), *strategy_option_owners(), *cls.aliases}

    @abstractmethod
    def compose(self, group: Group) -> Composition:
        """What a group's options mean: pure, cheap, and raising `ValueError` for bad values."""

    # Groups and state

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Adds a group and makes its parameters' state; on an error nothing is added.

        A group without names beside such with names gets some ("group2.0"), and the other way
        round.

        Raises:
            ValueError: as in the constructor.
        """
        before, named = len(self.param_groups), []
        if isinstance(param_group, dict):
            make_plain(param_group, self._known())
            self._rename_aliases(param_group)
            given = param_group.keys() - {"params"}
            named = name_alike(param_group, self.param_groups)
        try:
            super().add_param_group(param_group)
            self._make_group(self.param_groups[-1], given)
        except Exception:
            for group in self.param_groups[before:]:
                for param in group["params"]:
                    self.state.pop(param, None)
            del self.param_groups[before:]
            for group in named:
                del group["param_names"]
            raise

    def _make_group(self, group: Group, given: Set[str]) -> None:
        for name in self.ungrouped:
            group.pop(name, None)
        check_names(group)
        composition = self._checked(group, given)
        for param, called in zip(group["params"], names(group), strict=True):
            check_param(param, called, composition)
        for param in group["params"]:
            if param.numel():
                self.state[param] = self.make_state(param, composition, group)
        self._record(group, composition)

    def _rename_aliases(self, group: Group) -> None:
        for alias, name in self.aliases.items():
            if alias not in group:
                continue
            if name in group:
                raise ValueError(
                    f"{alias}={group[alias]!r} with {name}={group[name]!r}: these are two names of "
                    "one thing, accepted is one of them"
                )
            group[name] = group.pop(alias)

    def _known(self) -> set[str]:
        """Names of options that a group may have."""
        return self.defaults.keys() | (self.group_keys() if self.projects else set())

    def _checked(self, group: Group, given: Set[str]) -> Composition:
        """Checks a group, completes it, and says what it means; `given` was not by default."""
        known = self._known()
        for name in given - known - {"param_names", "initial_lr"}:
            guess = checks.nearest(name, known, cutoff=0.85)
            if guess is not None and guess not in given:
                raise checks.unknown_name("group key", name, known)
        check_common(group)
        if group["capturable"] and not self.supports_capturable:
            raise ValueError(f"capturable=True: {type(self).__name__} accepts False")
        if group["lr"] is not None:
            check_lr(group["lr"])
        checks.number("weight_decay", group["weight_decay"], low=0.0)
        options = ProjectionOptions.of(group) if self.projects else None
        if options is not None:
            own = strategy_options(group)
            # What is as it would be without being given is in copies of groups.
            chosen = {
                name: group[name]
                for name in given
                if name not in self.defaults or not checks.same(group[name], self.defaults[name])
            }
            check_strategy_options(chosen, own)
            for name in ProjectionOptions.names():
                group.setdefault(name, getattr(options, name))
            for name, value in own.items():
                group.setdefault(name, value)
        composition = self.compose(group)
        if group["lr"] is None and not getattr(composition.rule, "relative_step", False):
            raise ValueError("lr=None: accepted is a number of at least 0 or a tensor with one")
        return composition

    def _complete(self, group: Group, before: Snapshot | None) -> Composition:
        """Checks and completes a group that was changed since a snapshot."""
        spellings = {*self.aliases, *self.ungrouped}
        if self.projects:
            spellings |= (
                self.group_keys()
                - self.defaults.keys()
                - {
                    *ProjectionOptions.names(),
                    *strategy_option_owners(),
                }
            )
        for name in group.keys() & spellings:
            raise ValueError(
                f"{name}={group[name]!r} in a group after construction: accepted is "
                f"{self.aliases.get(name, 'what it stands for among ' + str(sorted(group)))!r}"
            )
        known = self._known()
        make_plain(group, known)
        for name in group.keys() - known - (before.options.keys() if before else set()):
            if before is not None and checks.nearest(name, known, cutoff=0.85) is not None:
                raise checks.unknown_name("group key", name, known)
        if before is not None and self.projects and ProjectionOptions.of(group) is not None:
            drop_left_over(group, before.options, self.defaults)
        return self._checked(group, group.keys() - {"params"})

    def _meaning(self, saved_group: Group) -> Composition:
        given = saved_group.keys() - {"params"}
        group = {**self.defaults, **saved_group}
        make_plain(group, self._known())
        return self._checked(group, given)

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Restores a pickle or copy, without hooks."""
        super().__setstate__(state)
        self.__dict__.setdefault("_refresh_hooks", OrderedDict())

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
            ValueError: an option, a parameter, its state or gradient is not accepted; nothing is
                changed then.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        check_gradients(self.param_groups)
        plans = self._prepare()
        count = sum(len(plan.params) for plan in plans if plan.core.projection is not None)
        hooks, index, plain = tuple(self._refresh_hooks.values()), 0, 0
        with no_autocast():
            for plan in plans:
                usable = self._usable(plan.group)
                if plan.core.projection is None:
                    step_plain(plan, plain, usable)
                    plain += len(plan.params)
                else:
                    step_projected(plan, index, count, hooks, self._formers, usable)
                    index += len(plan.params)
        return loss

    def _usable(self, group: Group) -> Usable:
        if group["skip_nonfinite"] and not group["capturable"]:
            return self._skipped.usable
        return lambda tensors, params, called: range(len(tensors))


@contextlib.contextmanager
def no_autocast() -> Iterator[None]:
    """Decompositions and updates keep their own precisions inside a user's autocast region."""
    with contextlib.ExitStack() as stack:
        for device in ("cpu", "cuda"):
            if torch.is_autocast_enabled(device):
                stack.enter_context(torch.autocast(device, enabled=False))
        yield
