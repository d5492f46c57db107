"""Adam, in both forms that the official codes use.

    M <- b1 M + (1 - b1) G,  V <- b2 V + (1 - b2) G o G,  c1 = 1 - b1^t,  c2 = sqrt(1 - b2^t)
    transformers (GaLore, Fira, COAP):
        W <- W - lr (c2/c1) M / (sqrt(V) + eps),  then  W <- (1 - lr wd) W
    torch (AdamW), bitsandbytes:
        W <- (1 - lr wd) W,  then  W <- W - lr (c2/c1) M / (sqrt(V) + eps c2)

Kingma and Ba, 2015; Loshchilov and Hutter, 2019. Memory: 2 entries of `moments_dtype`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any, ClassVar

import torch
from torch import Tensor

from lowrank.cuda.adam import Number, adam_step
from lowrank.cuda.native_update import knows_adam

from ..engine.chunks import DEVICE_ELEMENTS, wide_dtype
from ..engine.devices import on_gpu
from ..engine.rotation import Rotation
from .base import (
    MOMENT_TRANSPORTS,
    ElementwiseRule,
    State,
    Update,
    UpdateRule,
    numel,
    scalar,
    steps_done,
)
from .fused_adam import FUSED_DTYPES, bias_corrections, fused_step
from .kernel_sizes import joined_sizes, listed_sizes, with_rates
from .precision import moments_dtype, moments_itemsize
from .transport import transported_moments
from .updates import add_updates_, left_out, picked, zeroed

#: Of gradients that the compiled kernels know.
KERNEL_DTYPES = (torch.float32, torch.bfloat16)


@cache
def _compiled_step() -> Callable[..., list[Tensor]]:
    return torch.compile(adam_step)


@dataclass(frozen=True)
class Adam(ElementwiseRule):
    """Adam or AdamW.

    Attributes:
        lr: learning rate, a float or a 0-d tensor.
        betas: (b1, b2).
        eps: the denominator's constant.
        weight_decay: decoupled, times lr.
        eps_corrected: eps is added after bias correction (torch) rather than before (transformers).
        decay_first: decay before the update (torch) rather than after it (transformers).
        correct_bias: False drops c2/c1.
        capturable: step counts stay on the device and no value is read back (CUDA graphs).
        fused: use torch's fused kernel where possible.
        compiled: `torch.compile` the update of the moments.
        restarts: bias corrections count from the last refresh (moments="reset").
        moments_dtype: precision of the moments, None for the default (`moments_dtype`).
    """

    transports: ClassVar[tuple[str, ...]] = MOMENT_TRANSPORTS

    lr: Number
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    weight_decay: float = 0.0
    eps_corrected: bool = True
    decay_first: bool = True
    correct_bias: bool = True
    capturable: bool = False
    fused: bool = True
    compiled: bool = False
    restarts: bool = False
    moments_dtype: torch.dtype | None = None

    def __post_init__(self) -> None:
        if self.restarts and self.capturable:
            raise ValueError("moments='reset' with capturable=True: accepted is one of them")

    def init(self, shape: Sequence[int], like: Tensor) -> State:
        """Zero moments."""
        dtype = moments_dtype(self.moments_dtype, like.dtype)
        return {
            key: torch.zeros(tuple(shape), dtype=dtype, device=like.device)
            for key in ("exp_avg", "exp_avg_sq")
        }

    def state_bytes(self, shape: Sequence[int], itemsize: int) -> int:
        """Two moments."""
        return 2 * numel(shape) * moments_itemsize(self.moments_dtype, itemsize)

    def sizes(self, state: State) -> tuple[Number, Number, Number]:
        """(step size without lr, eps for the uncorrected sqrt(V), lr); tensors when capturable."""
        beta1, beta2 = self.betas
        if self.capturable:
            step = state["step"]
            lr = self.lr
            correction2: Number = (1 - torch.pow(beta2, step)).sqrt()
            size: Number = correction2 / (1 - torch.pow(beta1, step))
        else:
            lr = scalar(self.lr)
            correction1, correction2 = bias_corrections(
                beta1, beta2, steps_done(state, self.restarts)
            )
            size = correction2 / correction1
        eps = self.eps * correction2 if self.eps_corrected else float(self.eps)
        return (size if self.correct_bias else 1.0), eps, lr

    def _decay_and_alpha(self, lr: Any) -> tuple[Any, Any]:
        decay_factor = 1.0 - lr * self.weight_decay if self.weight_decay else 1.0
        return decay_factor, (lr if self.decay_first else lr * decay_factor)

    def _can_fuse(self, tensors: Sequence[Tensor]) -> bool:
        return (
            self.fused
            and not self.capturable
            and not self.compiled
            and len({t.dtype for t in tensors}) == 1
            and all(
                t.dtype in FUSED_DTYPES and t.device.type in ("cpu", "cuda") and t.is_contiguous()
                for t in tensors
            )
        )

    def _moments(self, state: State) -> tuple[Tensor, Tensor]:
        return state["exp_avg"], state["exp_avg_sq"]

    def update(
        self, grads: Sequence[Tensor], states: Sequence[State], weights: Sequence[Tensor]
    ) -> list[Update]:
        """See `UpdateRule.update`; all share a dtype, a device and, if not capturable, a step."""
        exp_avgs, exp_avg_sqs = (list(t) for t in zip(*map(self._moments, states), strict=True))
        if self._has_kernel(list(grads), exp_avgs):
            return self._by_kernel(list(grads), exp_avgs, exp_avg_sqs, states)
        if not self.capturable:
            return self._advance(list(grads), exp_avgs, exp_avg_sqs, states[0])
        updates: list[Update] = []
        for grad, m, v, state in zip(grads, exp_avgs, exp_avg_sqs, states, strict=True):
            updates += self._advance([grad], [m], [v], state)  # each has its own step count
        return updates

    def update_with_norms(
        self,
        grads: Sequence[Tensor],
        states: Sequence[State],
        weights: Sequence[Tensor],
        axes: Sequence[int],
    ) -> list[Update]:
        """See `UpdateRule.update_with_norms`: the kernel sums the squares in the same pass."""
        exp_avgs, exp_avg_sqs = (list(t) for t in zip(*map(self._moments, states), strict=True))
        if not self._has_kernel(list(grads), exp_avgs):
            return self.update(grads, states, weights)
        updates: dict[int, Update] = {}
        for axis in sorted(set(axes)):
            picked = [i for i, own in enumerate(axes) if own == axis]
            made = self._by_kernel(
                [grads[i] for i in picked],
                [exp_avgs[i] for i in picked],
                [exp_avg_sqs[i] for i in picked],
                [states[i] for i in picked],
                axis,
            )
            updates.update(zip(picked, made, strict=True))
        return [updates[i] for i in range(len(grads))]

    def scratch_bytes(self, dtype: torch.dtype, state: State, *, overwrites: bool) -> int:
        """See `UpdateRule.scratch_bytes`: by the kernel no more than the directions."""
        moments = [state["exp_avg"]]
        if dtype not in KERNEL_DTYPES or not self._has_kernel(moments, moments):
            return dtype.itemsize + 4 * max(4, dtype.itemsize)  # lists of operands and results
        return dtype.itemsize * (1 if overwrites else 2)

    def update_together(
        self,
        grads_b: Tensor,
        states: Sequence[State],
        weights: Sequence[Tensor],
        axis: int | None = None,
        good_b: Tensor | None = None,
        *,
        overwrites: bool = False,
    ) -> Update:
        """See `UpdateRule.update_together`: one launch, directions in the gradients' precision."""
        grads = list(grads_b.unbind(0))
        exp_avgs, exp_avg_sqs = (list(t) for t in zip(*map(self._moments, states), strict=True))
        if not self._has_kernel(grads, exp_avgs):
            return super().update_together(grads_b, states, weights, axis, good_b)
        numbers, sizes, factor, lr = joined_sizes(self, states, good_b)
        # Each entry is read before its direction is written.
        directions_b = grads_b if overwrites else torch.empty_like(grads_b)
        norms: tuple[Tensor, Tensor] | None = None
        if axis is not None:
            shape = list(grads_b.shape)
            shape[1 + axis] = 1
            made = [grads_b.new_empty(shape, dtype=torch.float32) for _ in range(2)]
            norms = made[0], made[1]
        torch.ops.lowrank.adam(
            *(grads, exp_avgs, exp_avg_sqs, list(directions_b.unbind(0))),
            *([list(side.unbind(0)) for side in norms] if norms else [[], []]),
            *(-1 if axis is None else axis, *self.betas, *numbers, sizes),
        )
        decay_factor, alpha = self._decay_and_alpha(lr)
        return Update(directions_b, alpha, decay_factor, factor, norms=norms)

    def _has_kernel(self, grads: list[Tensor], exp_avgs: list[Tensor]) -> bool:
        # On a CPU torch's fused kernel is as fast.
        return on_gpu(grads[0]) and not self.compiled and knows_adam(grads, exp_avgs)

    def _by_kernel(
        self,
        grads: list[Tensor],
        exp_avgs: list[Tensor],
        exp_avg_sqs: list[Tensor],
        states: Sequence[State],
        axis: int = -1,
    ) -> list[Update]:
        """One launch for many tensors."""
        numbers, sizes, factors, lr = listed_sizes(self, states)
        directions = [torch.empty_like(m) for m in exp_avgs]
        norms: list[list[Tensor]] = [[], []]
        if axis >= 0:
            shapes = [(1, t.shape[1]) if axis == 0 else (t.shape[0], 1) for t in grads]
            device = grads[0].device
            norms = [
                [torch.empty(shape, dtype=torch.float32, device=device) for shape in shapes]
                for _ in range(2)
            ]
        torch.ops.lowrank.adam(
            *(grads, exp_avgs, exp_avg_sqs, directions, *norms, axis),
            *(*self.betas, *numbers, sizes),
        )
        decay_factor, alpha = self._decay_and_alpha(lr)
        pairs = zip(*norms, strict=True) if axis >= 0 else [None] * len(directions)
        return [
            Update(direction, alpha, decay_factor, factor, norms=pair)
            for direction, factor, pair in zip(directions, factors, pairs, strict=True)
        ]

    def _advance(
        self,
        grads: list[Tensor],
        exp_avgs: list[Tensor],
        exp_avg_sqs: list[Tensor],
        state: State,
    ) -> list[Update]:
        if any(m.dtype != grad.dtype for m, grad in zip(exp_avgs, grads, strict=True)):
            return self._advance_wide(grads, exp_avgs, exp_avg_sqs, state)
        size, eps, lr = self.sizes(state)
        if self._can_fuse([*grads, *exp_avgs]):
            assert isinstance(size, float)
            assert isinstance(eps, float)
            # With zero "weights" the kernel gives the negated direction in one pass over moments.
            directions = [torch.zeros_like(grad) for grad in grads]
            fused_step(
                directions,
                grads,
                exp_avgs,
                exp_avg_sqs,
                steps_done=steps_done(state, self.restarts) - 1,
                size=-size,
                beta1=self.betas[0],
                beta2=self.betas[1],
                eps=eps,
            )
        else:
            step: Callable[..., list[Tensor]] = adam_step
            if self.compiled:
                step = _compiled_step()
                size, eps = (torch.as_tensor(x, device=grads[0].device) for x in (size, eps))
            directions = step(grads, exp_avgs, exp_avg_sqs, *self.betas, eps, size)
        decay_factor, alpha = self._decay_and_alpha(lr)
        return [Update(direction, alpha, decay_factor, size) for direction in directions]

    def _advance_wide(
        self,
        grads: list[Tensor],
        exp_avgs: list[Tensor],
        exp_avg_sqs: list[Tensor],
        state: State,
    ) -> list[Update]:
        """`_advance` in fp32 (fp64 for fp64) if moments and gradients differ in precision."""
        wide = wide_dtype(grads[0])
        m, v = ([t.to(wide) for t in tensors] for tensors in (exp_avgs, exp_avg_sqs))
        updates = self._advance([grad.to(wide) for grad in grads], m, v, state)
        for old, new in zip([*exp_avgs, *exp_avg_sqs], [*m, *v], strict=True):
            if old is not new:
                old.copy_(new)
        return updates

    def transport_moments(
        self, state: State, how: str, rotation: Rotation, into: State | None = None
    ) -> None:
        """See `UpdateRule`: M -> C M, and V -> (C sqrt(V))^2 or LDAdam's estimate."""
        m, v = self._moments(state)
        moved_m, moved_v = transported_moments(m, v, how, rotation, self.betas, int(state["step"]))
        for target, moved in zip(self._moments(into or state), (moved_m, moved_v), strict=True):
            target.copy_(moved)

    def bounds_scratch(self, weight: Tensor, state: State) -> bool:
        """See `UpdateRule.bounds_scratch`: the compiled kernel needs none."""
        moments = [state["exp_avg"]]
        return weight.dtype in KERNEL_DTYPES and self._has_kernel(moments, moments)

    def apply(
        self,
        grads: Sequence[Tensor],
        states: Sequence[State],
        weights: Sequence[Tensor],
        good_b: Tensor | None = None,
    ) -> None:
        """See `UpdateRule.apply`: through a fused kernel where possible."""
        exp_avgs, exp_avg_sqs = (list(t) for t in zip(*map(self._moments, states), strict=True))
        if good_b is not None or not self._can_fuse([*weights, *grads, *exp_avgs]):
            known = self._has_kernel(list(grads), exp_avgs)
            if known and all(w.dtype == grads[0].dtype and w.is_contiguous() for w in weights):
                moments = exp_avgs, exp_avg_sqs
                self._apply_by_kernel(list(weights), list(grads), *moments, states, good_b)
            else:
                self._apply_unfused(grads, states, weights, good_b)
            return
        size, eps, lr = self.sizes(states[0])
        assert isinstance(size, float)
        assert isinstance(eps, float)
        decay_factor, alpha = self._decay_and_alpha(lr)
        fused_step(
            list(weights),
            list(grads),
            exp_avgs,
            exp_avg_sqs,
            steps_done=steps_done(states[0], self.restarts) - 1,
            size=alpha * size,
            beta1=self.betas[0],
            beta2=self.betas[1],
            eps=eps,
            decay=1.0 - decay_factor,
        )

    def _apply_by_kernel(
        self,
        weights: list[Tensor],
        grads: list[Tensor],
        exp_avgs: list[Tensor],
        exp_avg_sqs: list[Tensor],
        states: Sequence[State],
        good_b: Tensor | None,
    ) -> None:
        """One launch for many weights, and one pass over each, in which nothing else is stored."""
        numbers, sizes, _, lr = joined_sizes(self, states, good_b)
        rates = self._decay_and_alpha(lr)
        lists = weights, grads, exp_avgs, exp_avg_sqs
        if sizes is None:
            torch.ops.lowrank.adam_weights(*lists, *self.betas, *numbers, *rates, None)
            return
        own = with_rates(sizes, rates)
        torch.ops.lowrank.adam_weights(*lists, *self.betas, *numbers, 1.0, 1.0, own)

    def _apply_unfused(
        self,
        grads: Sequence[Tensor],
        states: Sequence[State],
        weights: Sequence[Tensor],
        good_b: Tensor | None,
    ) -> None:
        """Small weights on a GPU in one list, to save launches; others in chunks of rows."""
        small = [self.compiled or (on_gpu(w) and w.numel() <= DEVICE_ELEMENTS) for w in weights]
        listed = [i for i, own in enumerate(small) if own]
        if listed:
            self._apply_listed(*picked(listed, grads, states, weights, good_b))
        for i, own in enumerate(small):
            if not own:
                super().apply(*picked([i], grads, states, weights, good_b))

    def _apply_listed(
        self,
        grads: list[Tensor],
        states: list[State],
        weights: list[Tensor],
        good_b: Tensor | None,
    ) -> None:
        """By list operations, with directions of all at once."""
        updates = self.update(grads if good_b is None else zeroed(grads, good_b), states, weights)
        if good_b is not None:
            updates = list(map(left_out, updates, good_b.unbind()))
        add_updates_(weights, updates)


def may_fuse(rule: UpdateRule) -> bool:
    """Whether a rule takes torch's fused kernel where precision and strides allow it."""
    return type(rule) is Adam and rule.fused and not (rule.capturable or rule.compiled)
