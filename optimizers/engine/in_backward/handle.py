"""The handle of `update_in_backward`: what is left to a step, and what a user asks and saves."""

from __future__ import annotations

from types import TracebackType
from typing import Any, Self

import torch
from torch import Tensor

from .. import checks
from ..composition import Composition
from ..low_rank_gradients import examine, places_in
from ..options import Group
from ..parameters import unique_names
from ..plan import EVERYTHING, Given, Plan
from ..sharding import local_part
from ..warn import warn_user
from .norm import Length, clip_factor, scale_, total_norm
from .passes import Passes
from .refusals import check_refit, refuse_options
from .scaler import Scale, scale_of
from .sites import Site, sites_of
from .state import Pending
from .window import Sum, Window

_WHOLE_NORM = "norm='exact' with accumulation: the norm of a sum is not known from its terms"


class InBackward(Passes):
    """Updates in backward passes that are on; see `update_in_backward`, which makes it."""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None
    ) -> None:
        if kind is None:
            self.check_idle("remove()")
        self._remove()

    def __deepcopy__(self, memo: dict[int, Any]) -> InBackward:
        raise TypeError("a handle of update_in_backward can't be copied: accepted is a new one")

    def __reduce__(self) -> Any:
        raise TypeError("a handle of update_in_backward can't be pickled: accepted is a new one")

    def __repr__(self) -> str:
        clipped = "" if self._max_norm is None else f", max_norm={self._max_norm}"
        kind = "" if self._max_norm is None else f", norm={self._kind!r}"
        first = "" if self._refit == "whole" else f", refit={self._refit!r}"
        return (
            f"InBackward({type(self._optimizer).__name__}, accumulation={self._accumulation}"
            f"{clipped}{kind}{first}; {len(self.whole())} gradients are kept whole)"
        )

    # What a user asks it

    @property
    def accumulation(self) -> int:
        """Backward passes of a step; may be set between steps."""
        return self._accumulation

    @accumulation.setter
    def accumulation(self, value: int) -> None:
        checks.integer("accumulation", value, low=1)
        self.check_idle("a change of accumulation")
        check_refit(self._refit, self._max_norm, self._kind, value)
        self._accumulation = value

    @property
    def norm(self) -> float | None:
        """The norm of the last step's gradients before clipping, as `max_norm` bounds it.

        None without `max_norm`, and before the first step.
        """
        return None if self._norm is None else float(self._norm)

    @property
    def kept_bytes(self) -> int:
        """Bytes of gradients, and of sums of their projections, that are kept now."""
        kept = [own.gradient for own in self._window.whole.values()]
        kept += [own.projected for own in self._window.sums.values()]
        return sum(int(local_part(tensor).nbytes) for tensor in kept)

    def whole(self) -> dict[str, str]:
        """Parameters whose gradients are kept whole until `step()` or the last pass: {name: why}.

        What is due for a refit is not listed: it is kept whole in the step of the refit.
        """
        groups, known = self._optimizer.param_groups, examine(self._optimizer)
        kept = self._kept_for_step()
        params = [param for group in groups for param in group["params"]]
        found = {}
        for name, param in zip(unique_names(groups), params, strict=True):
            reason: int | str | None = kept.get(id(param))
            if reason is None and (self._accumulation > 1 or self._defers):
                reason = _WHOLE_NORM if self.whole_norm else known[id(param)]
            if isinstance(reason, str) and param.requires_grad:
                found[name] = reason
        return found

    def remove(self) -> None:
        """Turns updates in the backward pass off.

        Raises:
            ValueError: in the middle of a step.
        """
        self.check_idle("remove()")
        self._remove()

    def _remove(self) -> None:
        for _, hook in self._hooks.values():
            hook.remove()
        self._hooks = {}
        self._release()
        self._window = Window()
        if self._optimizer._in_backward is self:
            self._optimizer._in_backward = None
            del self._optimizer._step_supports_amp_scaling  # type: ignore[attr-defined]

    # In the step

    def before_step(self) -> bool:
        """Checks that all backward passes of the step are done, and clips what is left.

        Returns:
            Whether the step is to be taken: not where a `GradScaler` would skip it.

        Raises:
            ValueError: options, a state or gradients were changed in between, or a `GradScaler`
                takes the step after updates were made.
            RuntimeError: there were fewer backward passes.
        """
        window, optimizer = self._window, self._optimizer
        scale = scale_of(optimizer, waits=self._defers)
        self._scaled = scale is not None
        refuse_options(optimizer)
        if window.open:
            raise RuntimeError(
                "step() after a backward pass that did not end: accepted is zero_grad() first"
            )
        if 0 < window.passes < self._accumulation:
            raise RuntimeError(
                f"step() after {window.passes} of {self._accumulation} backward passes: accepted "
                "are all of them, or handle.accumulation set before the first one "
                "(passes under set_requires_gradient_sync(False) don't count)"
            )
        if window.scaled:
            return True
        for group in window.changed_groups():
            raise ValueError(
                f"options of a group of {len(group['params'])} parameters (the learning rate?) "
                "were changed after a backward pass that has made updates with them: accepted is a "
                "change after step()"
            )
        self._check_whole()  # a scaler's look at them leaves their versions as they are
        taken = True
        if window.sums or self._max_norm is not None:
            plans = optimizer._prepare()
            try:
                self._check_places(places_in(plans, optimizer))
                taken = self._clip(sites_of(plans), scale)
            finally:
                for plan in plans:
                    plan.release()
        window.scaled = taken
        return taken

    def _check_whole(self) -> None:
        """Raises `ValueError` if a gradient was changed that is not all that there is."""
        window = self._window
        if not (window.sums or window.updated):
            return
        for known in window.whole.values():
            if not known.unchanged():
                raise ValueError(
                    f"gradients were changed after the backward pass, when {len(window.sums)} of "
                    f"them are projected and {len(window.updated)} used already: accepted is "
                    "max_norm of update_in_backward in the place of clip_grad_norm_"
                )

    def _clip(self, sites: dict[int, Site], scale: Scale | None) -> bool:
        """Finds the norm of the step's gradients, and scales those that are left.

        Returns:
            Whether the step is to be taken, as `before_step`.
        """
        if self._max_norm is None:
            return True
        window = self._window
        left: list[tuple[Tensor, Site]] = []
        lengths: list[Length] = []
        for key, site in sites.items():
            known = window.sums.get(key)
            used = site.param.grad if known is None else known.projected
            if used is not None:
                left.append((used, site))
            if key in window.norms:
                lengths.append(window.norms[key])
            elif used is not None:
                lengths.append(site.length(used, whole=known is None))
        norm = total_norm(lengths)
        if norm is None:
            return scale is None or not scale.overflows()
        if scale is not None:
            norm = norm * scale.inverse(norm)
        self._norm = norm
        if scale is not None and (scale.overflows() or not norm.isfinite()):
            return False
        bound = norm if self._defers else self._previous
        for gradient, site in left if bound is not None else ():
            assert bound is not None
            skips = bool(site.group["skip_nonfinite"]) and self._defers
            factor = clip_factor(bound, self._max_norm)
            if scale is not None:
                factor = factor * scale.inverse(factor)
            scale_(gradient, factor, bound, skip_nonfinite=skips)
        known_norm = norm if self._previous is None else self._previous.to(norm)
        self._previous = torch.where(norm.isfinite(), norm, known_norm)
        return True

    def left_of(self, plan: Plan) -> Given:
        """What of a group a step takes: the gradients that are there, and the projected sums."""
        sums = {
            position: self._window.sums[id(param)].in_dtype()
            for position, param in enumerate(plan.params)
            if id(param) in self._window.sums
        }
        return Given(None, sums) if sums else EVERYTHING

    def finish(self) -> None:
        """Frees what the step has used, and begins a new one."""
        for known in self._window.whole.values():
            known.param.grad = None
        self._window = Window()
        self._sites, self._plans = {}, []
        self.attach()

    def clear(self) -> None:
        """Drops the gradients of an unfinished step, in `zero_grad()`.

        Raises:
            RuntimeError: some are used already.
        """
        window = self._window
        if window.updated and not window.open:
            raise RuntimeError(
                f"zero_grad() before step(), when {len(window.updated)} parameters were updated in "
                "the backward pass: accepted is step() after it; whether to skip a step must be "
                "decided by the loss, before backward()"
            )
        if window.updated:
            warn_user(
                f"a backward pass ended with an error after {len(window.updated)} parameters were "
                "updated: these updates stay"
            )
        self._release()
        self._window = Window()

    # Saving and loading

    def check_unapplied(self, what: str) -> None:
        """Raises `ValueError` if updates of an unfinished step were made."""
        if self._window.updated or self._window.open:
            raise ValueError(
                f"{what} in the middle of a step, after a backward pass that made updates: "
                "accepted is after step()"
            )
        lacking = self._optimizer._not_saved() if self._window.passes else None
        if lacking is not None:
            raise ValueError(
                f"{what} in the middle of a step would lack {lacking}: accepted is after step()"
            )

    def meaning(self, saved_group: Group) -> Composition:
        """The composition of a saved group."""
        return self._optimizer._meaning(saved_group)

    def pending(self) -> Pending:
        """What is kept of an unfinished step, for a `state_dict`."""
        window = self._window
        norms = {
            own.param: window.norms[key].norm
            for key, own in window.sums.items()
            if key in window.norms
        }
        return Pending(
            passes=window.passes,
            norm=self._previous if self._kind == "previous" else None,
            projected={own.param: own.projected for own in window.sums.values()},
            gradients={own.param: own.gradient for own in window.whole.values()},
            norms=norms,
        )

    def restore(self, pending: Pending) -> None:
        """Goes on with an unfinished step that was loaded."""
        window = Window(passes=pending.passes)
        groups = {id(p): group for group in self._optimizer.param_groups for p in group["params"]}
        for param, value in pending.projected.items():
            own = value.detach().to(param.device, copy=True)
            window.sums[id(param)] = Sum(param, own, bool(groups[id(param)]["maximize"]))
        for param, value in pending.norms.items():
            window.norms[id(param)] = Length(value.detach().to(param.device, copy=True))
        for param, value in pending.gradients.items():
            param.grad = value.detach().to(param.device, param.dtype, copy=True)
            window.keep(param)
        self._window, self._norm = window, None
        self._previous = pending.norm
