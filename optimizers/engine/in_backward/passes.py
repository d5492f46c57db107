"""Updates in the backward pass: a gradient is used and freed as soon as it is there.

A hook on each parameter runs once its gradient of a backward pass is complete. In the last pass of
a step it takes the parameter's step at once; before, it keeps what a later update needs: the
gradient's projection, r x n numbers, where a method uses nothing else of it and no refit is due
(`low_rank_gradients`), and the gradient itself, in `.grad` as ever, where it does. `step()` takes
the steps of what is left, and runs all that belongs to the whole step.

Autograd calls the hook after all uses of the parameter in the pass, so that nothing reads a weight
after its update but another pass through the same graph, which autograd refuses then.
"""

from __future__ import annotations

import threading
import weakref
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Variable
from torch.utils.hooks import RemovableHandle

from ..gradients import check_dense
from ..low_rank_gradients import places_in, places_of
from ..optimizer import LowRankOptimizer, no_autocast
from ..parameters import unique_names
from ..plan import Given, Plan
from .norm import clip_factor, norm_of, scale_
from .refusals import nested, refuse_options, refuse_wrappers
from .sites import Site, sites_of
from .window import Window

#: Entries of the largest parameter whose gradient is kept to find out whether it is changed.
LARGEST_GUARD = 1 << 16
#: What bases that are due are fitted to: the step's gradient, or that of its first backward pass.
REFITS = ("whole", "first")
_GUARD = "it is the smallest, by which changes after the backward pass are found out"
_TOLD = "it is the smallest, by which a GradScaler finds out what is not finite"


class Passes:
    """The backward passes of an optimizer's steps.

    Args:
        optimizer: updates the parameters.
        accumulation: backward passes of a step.
        max_norm: bound on the gradient's norm, None for none.
        kind: which norm, one of `NORMS`.
        refit: what bases are fitted to, one of `REFITS`.
    """

    def __init__(
        self,
        optimizer: LowRankOptimizer,
        accumulation: int,
        max_norm: float | None,
        kind: str,
        refit: str,
    ) -> None:
        self._optimizer, self._refit = optimizer, refit
        self._accumulation, self._max_norm, self._kind = accumulation, max_norm, kind
        self._window = Window()
        self._plans: list[Plan] = []
        self._sites: dict[int, Site] = {}
        self._kept: dict[int, str] = {}
        self._hooks: dict[int, tuple[Tensor, RemovableHandle]] = {}
        self._norm: Tensor | None = None
        self._previous: Tensor | None = None
        self._lock = threading.RLock()
        self._examined = False
        #: Whether a `GradScaler` takes the steps, as far as is known.
        self._scaled = False

    def updated(self, param: Tensor) -> bool:
        """Whether a parameter's step has been taken already, in the backward pass."""
        return id(param) in self._window.updated

    # Registration

    def attach(self) -> None:
        """Registers the hooks of all parameters that are trained and have none."""
        this = weakref.ref(self)
        for group in self._optimizer.param_groups:
            for param in group["params"]:
                if param.requires_grad and id(param) not in self._hooks:
                    hook = param.register_post_accumulate_grad_hook(ParamHook(this))
                    self._hooks[id(param)] = (param, hook)

    # In a backward pass

    @torch.no_grad()
    def take(self, param: Tensor) -> None:
        """What a parameter's hook calls."""
        with self._lock, no_autocast():
            if param.grad is None:
                return
            self._enter_pass(param)
            site = self._sites.get(id(param))
            if site is None:
                return  # it is in no group any more
            if param.grad.requires_grad:
                raise ValueError(
                    f"backward(create_graph=True) of {site.label()} with update_in_backward: "
                    "accepted is torch.autograd.grad(..., create_graph=True)"
                )
            check_dense(param, site.name)
            self._check_kept(param, site)
            self._use(param, site)

    def _enter_pass(self, param: Tensor) -> None:
        """Begins a backward pass with its first hook."""
        window, task = self._window, torch._C._current_graph_task_id()
        if task == window.task:
            return
        if nested():
            if not window.open:
                raise RuntimeError(
                    "update_in_backward with checkpoint(use_reentrant=True) of what the backward "
                    "pass begins with: accepted is use_reentrant=False"
                )
            return  # a part of the pass
        if window.open:
            raise RuntimeError(
                "the backward pass before this one did not end: accepted is zero_grad() after an "
                "error in a backward pass"
            )
        if window.passes >= self._accumulation:
            param.grad = None
            raise RuntimeError(
                f"backward pass {window.passes + 1} of a step, with accumulation="
                f"{self._accumulation}: accepted is step() after each {self._accumulation}"
            )
        self._begin(task)

    def _begin(self, task: int) -> None:
        optimizer, window = self._optimizer, self._window
        refuse_options(optimizer)
        if not self._examined:
            refuse_wrappers(optimizer, scaled=self._defers)
            self._examined = True
        optimizer._check_before_updates()
        self._plans = optimizer._prepare()
        places = places_in(self._plans, optimizer)
        self._check_places(places)
        self._sites = sites_of(self._plans)
        self._kept = self._kept_for_step()
        self.attach()
        window.places, window.task, window.open = places, task, True
        window.passes += 1
        if self._last and not self._defers:
            window.record_rates(self._plans)
        this = weakref.ref(self)
        Variable._execution_engine.queue_callback(lambda: _end_pass(this, task))

    def _kept_for_step(self) -> dict[int, str]:
        """By parameter id: why its gradient is kept until `step`.

        That of the smallest parameter is: where it was changed, so were others to be, that are gone
        (`clip_grad_norm_`, a sum over processes). A `GradScaler` looks at it, too.
        """
        groups = self._optimizer.param_groups
        params = [p for group in groups for p in group["params"] if p.requires_grad]
        small = [param for param in params if 0 < param.numel() <= LARGEST_GUARD]
        kept: dict[int, str] = {}
        if small and (self._scaled or not self._defers):
            reason = _TOLD if self._scaled else _GUARD
            kept[id(min(small, key=lambda param: param.numel()))] = reason
        return kept | self._optimizer._kept_for_step()

    def end_pass(self, task: int) -> None:
        """Called at the end of a backward pass."""
        if self._window.task == task:
            self._window.open = False
            self._release()
            if self._last and self._scaled:
                self._tell_scaler()

    @torch.no_grad()
    def _tell_scaler(self) -> None:
        """Makes the smallest whole gradient NaN where one is not finite that is only projected."""
        window = self._window
        if not (window.sums and window.whole):
            return
        known = min(window.whole.values(), key=lambda own: own.gradient.numel())
        for key, own in window.sums.items():
            norm = window.norms[key].norm if key in window.norms else norm_of(own.projected)
            known.gradient.add_((norm * 0).to(known.gradient))
        window.keep(known.param)

    def _release(self) -> None:
        for plan in self._plans:
            plan.release()

    @property
    def _last(self) -> bool:
        return self._window.passes == self._accumulation

    @property
    def _defers(self) -> bool:
        """Whether no update can be made before the norm of all gradients is known."""
        return self._max_norm is not None and self._kind != "previous"

    @property
    def whole_norm(self) -> bool:
        """Whether clipping needs all gradients whole: norms of sums aren't known from terms."""
        return self._defers and self._kind == "exact" and self._accumulation > 1

    def _check_kept(self, param: Tensor, site: Site) -> None:
        window, known = self._window, self._window.whole.get(id(param))
        if id(param) in window.updated or id(param) in window.norms:
            param.grad = None
            raise RuntimeError(
                f"{site.label()} got a second gradient in one backward pass, after the first was "
                "used: accepted is use_reentrant=False for segments that share parameters"
            )
        # What is no plain tensor is not accumulated in place.
        if known is not None and type(param.grad) is Tensor and param.grad is not known.gradient:
            raise RuntimeError(
                f"the gradient of {site.label()} was replaced between backward passes of one step: "
                "accepted is optimizer.zero_grad(), which drops what is kept elsewhere too"
            )

    def _use(self, param: Tensor, site: Site) -> None:
        """Takes a parameter's step, or keeps what it will need."""
        window, place = self._window, self._window.places.get(id(param))
        if id(param) in self._kept or self.whole_norm:
            window.keep(param)
        elif self._last and not self._defers:
            self._update(param, site)
        elif place is None and not self._refitted(param, site):
            window.keep(param)
        else:
            if self._defers and self._kind == "exact":
                assert param.grad is not None
                window.norms[id(param)] = site.length(param.grad, whole=True)
            self._add(param, site)

    def _refitted(self, param: Tensor, site: Site) -> bool:
        """Refits a basis that is due to the first gradient of the step, where that is asked for.

        Returns:
            Whether the projection of the gradient is enough now: not after a fit that failed.
        """
        window, optimizer = self._window, self._optimizer
        if self._refit != "first" or id(param) in window.whole:
            return False
        if site.why_whole() is not None or param in optimizer._pending_moments:
            return False
        site.refit(tuple(optimizer._refresh_hooks.values()))
        window.places |= places_of(site.plan, site.first, site.of, (site.position,), optimizer)
        return id(param) in window.places

    def _add(self, param: Tensor, site: Site) -> None:
        projected = site.project()
        self._window.add(param, projected, site.group, alone=self._accumulation == 1)
        self._window.whole.pop(id(param), None)
        param.grad = None

    def _update(self, param: Tensor, site: Site) -> None:
        window, given = self._window, Given((site.position,))
        if id(param) in window.places and self._accumulation > 1:
            self._add(param, site)
        known = window.sums.get(id(param))
        if self._max_norm is not None:
            gradient = param.grad if known is None else known.projected
            assert gradient is not None
            window.norms[id(param)] = site.length(gradient, whole=known is None)
            if self._previous is not None:
                factor = clip_factor(self._previous, self._max_norm)
                scale_(gradient, factor, self._previous, skip_nonfinite=False)
        if known is not None:
            given = Given(given.positions, {site.position: known.in_dtype()})
        self._optimizer._advance_group(site.plan, site.first, site.of, given)
        site.plan.write_steps()
        param.grad = None
        window.sums.pop(id(param), None)
        window.whole.pop(id(param), None)
        window.updated[id(param)] = param

    def _check_places(self, places: dict[int, Any]) -> None:
        """Raises `ValueError` if only a projection is left of a gradient that is needed whole."""
        for key, known in self._window.sums.items():
            place = places.get(key)
            if place is None or bool(place.plan.group["maximize"]) != known.maximize:
                names = unique_names(self._optimizer.param_groups)
                params = [p for g in self._optimizer.param_groups for p in g["params"]]
                name = next((n for n, p in zip(names, params, strict=True) if id(p) == key), "?")
                raise ValueError(
                    f"options or state were changed after a backward pass that left only a "
                    f"projection of the gradient of {name}, and the change calls for all of it: "
                    "accepted is a change after step() (or zero_grad() and the passes again)"
                )

    def check_idle(self, what: str) -> None:
        """Raises `ValueError` in the middle of a step."""
        window = self._window
        if window.passes:
            raise ValueError(
                f"{what} after {window.passes} of {self._accumulation} backward passes of a step: "
                "accepted is after step() or zero_grad()"
            )


def _end_pass(handle: weakref.ref[Passes], task: int) -> None:
    found = handle()
    if found is not None:
        found.end_pass(task)


class ParamHook:
    """What autograd calls; it keeps no optimizer alive."""

    def __init__(self, handle: weakref.ref[Passes]) -> None:
        self.handle = handle

    def __call__(self, param: Tensor) -> None:
        """Uses a gradient that is complete."""
        found = self.handle()
        if found is not None:
            found.take(param)
