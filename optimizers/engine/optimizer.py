"""The base class of all methods: groups, state, and the order of operations in a step."""

from __future__ import annotations

import contextlib
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence, Set
from typing import TYPE_CHECKING, Any, TypeVar, cast, overload

import torch
from torch import Tensor
from torch._compile import _disable_dynamo
from torch.utils.hooks import RemovableHandle

from ..rules.adam import may_fuse
from . import checks
from .composition import Composition
from .decision import decide
from .declared import DeclaredOptimizer
from .devices import capturing
from .equal_options import EqualOptions
from .gradients import Checks, check_gradients, may_read
from .managed import ManagedOptimizer
from .options import (
    OF_SOME_METHOD,
    Group,
    ProjectionOptions,
    check_capturable,
    check_common,
    check_lr,
    decide_by_device,
    make_plain,
)
from .parameters import check_names, check_param, name_alike, names
from .plain import step_plain
from .plan import EVERYTHING, Given, Plan, Snapshot, numbered
from .refresh import RefreshHook
from .replaced import InUse, Watch
from .shared_refresh import SharedRefreshes
from .step import step_projected
from .strategies import (
    check_strategy_options,
    drop_left_over,
    projection_of,
    strategy_options,
)
from .warn import warn_user

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


_Method = TypeVar("_Method", bound=Callable[..., Any])


def out_of_dynamo(method: _Method) -> _Method:
    """Decorator: `torch.compile` breaks its graph at a method and runs it as it is.

    A step reads counts and schedules on the host, so that tracing it would give a graph for each of
    its steps, if any. What it compiles itself (`compile=True`) is not affected.
    """
    return cast(_Method, _disable_dynamo(method))


class LowRankOptimizer(DeclaredOptimizer, ManagedOptimizer):
    """Base of all methods: a `torch.optim.Optimizer` whose groups may be projected.

    A subclass declares its parts (`DeclaredOptimizer`), or overrides `compose`. State is made at
    construction and in `add_param_group` and holds tensors and integers only.
    """

    def compose(self, group: Group) -> Composition:
        """The composition of a group's options; raises `ValueError` for bad values."""
        projection = projection_of(group) if self.projects else None
        own = projection is not None or self.is_marked(group)
        return Composition(self.rule.make(group, projected=own), projection)

    def _make_attributes(self) -> None:
        self._refresh_hooks: dict[int, RefreshHook] = OrderedDict()
        self._shared: SharedRefreshes | None = None
        self._origin: Watch | None = None
        self._in_use = InUse()
        self._equal = EqualOptions()
        self._sound: dict[int, bool] = {}

    def _warn_of_fused(self) -> None:
        asked = [plan for plan in self._plans.values() if plan.group["fused"]]
        rules = [plan.core.rule for plan in asked if plan.params]
        if rules and not any(may_fuse(rule) for rule in rules):
            names = ", ".join(sorted({type(rule).__name__ for rule in rules}))
            warn_user(
                f"{type(self).__name__}: fused=True has no effect on {names}: it asks for torch's "
                "fused kernel, which is plain Adam's, without capturable and compile; kernels of "
                "this package are used wherever they apply"
            )

    #: Whether any basis was refitted in this step.
    _refitted: bool = False

    # Groups and state

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Adds a group and makes its parameters' state; on an error nothing is added.

        If only some groups have parameter names, the others get generated ones ("group2.0").

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

    def _known(self) -> set[str]:
        """Names of options that a group may have."""
        own = self.group_keys() if self.projects else {*self.hidden_keys}
        return self.defaults.keys() | own | {"plain_rule"}

    def _checked(self, group: Group, given: Set[str]) -> Composition:
        """Checks and completes a group and returns its composition; `given` are the options set."""
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
            decide_by_device(group)
            own = strategy_options(group)
            # Copies of groups hold all options: one that equals the default doesn't count as given.
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
        spellings = {*self.aliases, *self.ungrouped, *self.foreign_keys}
        for name in group.keys() & spellings:
            own = self.aliases.get(name)
            options = sorted(group.keys() - spellings - {"params", "param_names"})
            accepted = f"accepted is {own!r}" if own else f"accepted are {', '.join(options)}"
            raise ValueError(f"{name}={group[name]!r} in a group after construction: {accepted}")
        known = self._known()
        make_plain(group, known)
        for name in group.keys() - known - (before.options.keys() if before else set()):
            if before is None:
                continue
            if checks.nearest(name, known, cutoff=0.85) is not None:
                raise checks.unknown_name("group key", name, known)
            if name in OF_SOME_METHOD:
                raise ValueError(
                    f"{name}={group[name]!r} in a group after construction has no effect: accepted "
                    f"are {', '.join(sorted(known - {'params', 'param_names'}))}"
                )
        if before is not None and self.projects and ProjectionOptions.of(group) is not None:
            drop_left_over(group, before.options, self.defaults)
        return self._checked(group, group.keys() - {"params"})

    def _meaning(self, saved_group: Group) -> Composition:
        given = saved_group.keys() - {"params"}
        group = {**self.defaults, **saved_group}
        make_plain(group, self._known())
        return self._checked(group, given)

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Restores a pickle or copy, without hooks and shared refreshes, updating in `step`."""
        super().__setstate__(state)
        self.__dict__.setdefault("_refresh_hooks", OrderedDict())
        self.__dict__.setdefault("_shared", None)
        self.__dict__.setdefault("_origin", None)
        self.__dict__.setdefault("_in_use", InUse())
        self._equal, self._sound = EqualOptions(), {}

    def register_refresh_hook(self, hook: RefreshHook) -> RemovableHandle:
        """Calls `hook(event)` after each refresh of a matrix; measuring costs one projection.

        Hooks are not part of the state: a pickle or copy has none.
        """
        handle = RemovableHandle(self._refresh_hooks)
        self._refresh_hooks[handle.id] = hook
        return handle

    def share_refreshes(self, process_group: ProcessGroup | None = None) -> None:
        """Lets processes that train copies of one model (DDP) refit a part of the bases each.

        A refresh then takes 1 / world of the time, and bases are equal on all processes to the bit.
        Only for copies: never where processes train different models, or one model on different
        gradients between synchronisations (local SGD, federated training), which is why only
        `register_low_rank_hook` turns this on by itself. Each process of the group must call this,
        take the same steps, load the same states, and change options alike; steps whose gradients
        differ in what is `None` or not finite are fine. Random bases are drawn by each process and
        need no sending.

        It is not part of the state: a pickle or copy shares nothing.

        Args:
            process_group: whose processes share; None is all of them. It must have a backend for
                the parameters' device.

        Raises:
            RuntimeError: `torch.distributed` is not initialised.
            ValueError: with `update_in_backward`, which is not for copies of a model.
        """
        if self._in_backward is not None:
            raise ValueError(
                "share_refreshes() with update_in_backward, before DDP averages the gradients: "
                "accepted is one of the two (fully_shard goes with update_in_backward)"
            )
        self._shared = SharedRefreshes(process_group)

    # The step

    @overload
    def step(self, closure: None = None) -> None: ...

    @overload
    def step(self, closure: Callable[[], float]) -> float: ...

    @out_of_dynamo
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
        self._take_step()
        if self._in_backward is not None:
            self._in_backward.finish()
        return loss

    def _take_step(self) -> None:
        """Updates all parameters that have a gradient, or what is left of it."""
        if capturing():
            check_capturable(self.param_groups)
        check_gradients(self.param_groups)
        self._check_model()
        if self._in_backward is not None and not self._in_backward.before_step():
            return
        with self._shown(stepping=True):
            plans = self._prepare()
            try:
                with no_autocast():
                    if not capturing():
                        given = [self._given(plan) for plan in plans]
                        self._sound = decide(plans, given, self.param_groups, self._equal)
                    self._advance(plans)
            finally:
                self._sound = {}
                for plan in plans:
                    plan.release()

    def _given(self, plan: Plan) -> Given:
        """What of a group takes a step."""
        return EVERYTHING if self._in_backward is None else self._in_backward.left_of(plan)

    def _check_model(self) -> None:
        """Raises `ValueError` if the model has other parameters than the optimizer."""
        if self._origin is not None:
            self._origin.check(self.param_groups)
        else:
            self._in_use.check(self.param_groups, self.state)

    def _advance(self, plans: Sequence[Plan]) -> None:
        """Takes the step of all groups in turn."""
        firsts, count = numbered(plans)
        self._refitted = False
        if self._shared is not None:
            self._shared.count_step()
        for plan, first in zip(plans, firsts, strict=True):
            self._advance_group(plan, first, count, self._given(plan))
        self._skipped.after_step(waited=self._refitted)

    def _advance_group(self, plan: Plan, first: int, count: int, given: Given) -> None:
        """Takes the step of some parameters of a group; arguments as of `step_projected`."""
        checks = self._checks(plan.group)
        if plan.core.projection is None:
            step_plain(plan, checks, given)
            return
        hooks, pending = tuple(self._refresh_hooks.values()), self._pending_moments
        refits = step_projected(plan, first, count, hooks, pending, checks, self._shared, given)
        self._refitted = self._refitted or refits

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Clears all gradients, and with `update_in_backward` the sums of an unfinished step.

        Raises:
            RuntimeError: weights were updated in a backward pass that no `step()` followed.
        """
        if self._in_backward is not None:
            self._in_backward.clear()
        super().zero_grad(set_to_none)

    def warn_of_length(self, steps: int) -> None:
        """Warns of what can't happen in a run of so many steps; trainers call it."""

    # Updates in the backward pass, see `in_backward`

    def _check_before_updates(self) -> None:
        """Raises what `step` would for want of layers, before updates in a backward pass."""

    def _kept_for_step(self) -> dict[int, str]:
        """By parameter id: why its gradient is kept until `step`."""
        return {}

    def _not_saved(self) -> str | None:
        """What of an unfinished step a `state_dict` can't have, if anything."""
        return None

    def _had_gradient(self, param: Tensor) -> bool:
        """Whether a parameter has or had a gradient in this step."""
        known = self._in_backward
        return param.grad is not None or (known is not None and known.updated(param))

    def _checks(self, group: Group) -> Checks:
        return Checks(group["skip_nonfinite"], may_read(group), self._skipped, self._sound)


@contextlib.contextmanager
def no_autocast() -> Iterator[None]:
    """Decompositions and updates keep their own precisions inside a user's autocast region."""
    with contextlib.ExitStack() as stack:
        for device in ("cpu", "cuda"):
            if torch.is_autocast_enabled(device):
                stack.enter_context(torch.autocast(device, enabled=False))
        yield
