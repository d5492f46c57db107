"""The optimizer that every method is: groups, state, and the order in which the seams act."""

from __future__ import annotations

import contextlib
import warnings
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence, Set
from functools import partial
from typing import Any, overload

import torch
from torch import Tensor
from torch.optim.optimizer import Optimizer
from torch.utils.hooks import RemovableHandle

from ..weights import apply_rule
from . import checks
from . import state_dict as policy
from .batching import update_batches
from .composition import Composition
from .declared import DeclaredOptimizer
from .gradients import check_param, descent_gradient, finite, label, names
from .options import Group, ProjectionOptions, check_common, check_lr
from .refresh import RefreshHook
from .step import capturing, projected_params, refresh_due, step_projected
from .strategies import check_strategy_options, projection_of, strategy_options


class LowRankOptimizer(DeclaredOptimizer):
    """Base of all methods: a `torch.optim.Optimizer` whose groups may be projected.

    A subclass declares its parts (`DeclaredOptimizer`), or says with `compose` what a group's
    options mean. State is made at construction and in `add_param_group` and holds tensors and
    integers only.
    """

    def compose(self, group: Group) -> Composition:
        """What a group's options mean: pure, cheap, and raising `ValueError` for bad values."""
        projection = projection_of(group) if self.projects else None
        return Composition(self.rule.make(group, projected=projection is not None), projection)

    def _prepare(self) -> None:
        self._refresh_hooks: dict[int, RefreshHook] = OrderedDict()

    # Groups and state

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Adds a group and makes its parameters' state; on an error nothing is added.

        Raises:
            ValueError: as in the constructor.
        """
        if isinstance(param_group, dict):
            self._rename_aliases(param_group)
            given = param_group.keys() - {"params"}
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        try:
            composition = self._checked(group, given)
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

    def _checked(self, group: Group, given: Set[str]) -> Composition:
        """Checks a group, completes it, and says what it means; `given` was not by default."""
        known = self.defaults.keys() | (self.group_keys() if self.projects else set())
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
            check_strategy_options({name: group[name] for name in given}, own)
            for name in ProjectionOptions.names():
                group.setdefault(name, getattr(options, name))
            for name, value in own.items():
                group.setdefault(name, value)
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
        pairs = [(group, self.compose(group)) for group in self.param_groups]
        count = sum(len(group["params"]) for group, made in pairs if made.projection)
        index = plain = 0
        with no_autocast():
            for group, composition in pairs:
                if composition.projection is None:
                    self._step_plain(group, composition, plain)
                    plain += len(group["params"])
                    continue
                params = projected_params(group, composition, self.state, index)
                if not capturing():
                    refresh_due(params, composition, count, tuple(self._refresh_hooks.values()))
                finite = partial(self._finite, group=group)
                step_projected(group, composition, params, finite)
                index += len(group["params"])
        return loss

    def _step_plain(self, group: Group, composition: Composition, first: int) -> None:
        params, grads, called, indices = [], [], [], []
        for index, (param, name) in enumerate(
            zip(group["params"], names(group), strict=True), start=first
        ):
            grad = descent_gradient(param, name, group)
            if grad is not None:
                params.append(param)
                grads.append(grad)
                called.append(name)
                indices.append(index)
        kept = self._finite(grads, lambda i: label(called[i], params[i]), group)
        for batch in update_batches([params[i] for i in kept], self.state, group):
            picked = [kept[i] for i in batch]
            states = [self.state[params[i]] for i in picked]
            torch._foreach_add_([state["step"] for state in states], 1)
            apply_rule(
                composition.rule,
                [grads[i] for i in picked],
                states,
                [params[i] for i in picked],
                group.get("seed", 0),
                [indices[i] for i in picked],
                stochastic=group.get("stochastic_rounding", False),
            )

    def _finite(
        self, tensors: Sequence[Tensor], called: Callable[[int], str], group: Group
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


@contextlib.contextmanager
def no_autocast() -> Iterator[None]:
    """Decompositions and updates keep their own precisions inside a user's autocast region."""
    with contextlib.ExitStack() as stack:
        for device in ("cpu", "cuda"):
            if torch.is_autocast_enabled(device):
                stack.enter_context(torch.autocast(device, enabled=False))
        yield
