"""Adam with block-wise 8-bit moments: one byte an entry and one fp32 scale per 256 entries.

The rule is `Adam`'s in bitsandbytes' form (eps after bias correction); the moments are
dequantised to fp32, advanced, and quantised again with the dynamic maps of Dettmers et al. (8-bit
Optimizers via Block-wise Quantization, 2022): signed for M, unsigned for V.

Memory of s entries: 2 (s + 4 ceil(s / 256)) bytes; below `min_8bit_size` entries 8 s (fp32).
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Self

import torch
from torch import Tensor

from lowrank.cuda import blockwise
from lowrank.cuda.native_update import knows_adam

from ..engine.chunks import DEVICE_ELEMENTS
from ..engine.devices import on_gpu
from ..engine.rotation import Rotation
from ..engine.sharding import Part
from .adam import KERNEL_DTYPES, Adam
from .base import ElementwiseRule, RowUpdates, State, Update, UpdateRule, numel
from .kernel_sizes import joined_sizes, listed_sizes
from .quantizers import NATIVE, Native, Quantizer
from .spread_blocks import cut_part, dequantize, quantize, scale_bytes, scale_traffic
from .transport import transported_moments
from .updates import add_updates_, picked, zeroed

SIGNED = {"exp_avg": True, "exp_avg_sq": False}


@dataclass(frozen=True)
class Adam8bit(Adam):
    """`Adam` whose moments are stored in 8 bits.

    Attributes:
        min_8bit_size: a (projected) gradient with fewer entries keeps fp32 moments.
        quantizer: converts between fp32 and codes.
    """

    min_8bit_size: int = 4096
    quantizer: Quantizer = NATIVE

    def _is_8bit(self, shape: Sequence[int]) -> bool:
        return numel(shape) >= self.min_8bit_size

    def init(self, shape: Sequence[int], like: Tensor) -> State:
        """Codes of zero and their scales, or fp32 zeros for a small tensor."""
        state: State = {}
        for key, signed in SIGNED.items():
            zeros = torch.zeros(tuple(shape), dtype=torch.float32, device=like.device)
            if not self._is_8bit(shape):
                state[key] = zeros
            else:
                state[key], state[f"{key}_absmax"] = self.quantizer.quantize(zeros, signed)
        return state

    def state_bytes(self, shape: Sequence[int], itemsize: int) -> int:
        """Codes and scales of both moments, or two fp32 tensors."""
        size = numel(shape)
        return 2 * (blockwise.blockwise_bytes(size) if self._is_8bit(shape) else 4 * size)

    def deciding_for(self, shape: Sequence[int]) -> Self:
        """See `UpdateRule.deciding_for`: whether moments have 8 bits."""
        return replace(self, min_8bit_size=0 if self._is_8bit(shape) else sys.maxsize)

    def part_bytes(self, part: Part, itemsize: int) -> int:
        """See `UpdateRule.part_bytes`: scales are those of its share of the whole's blocks."""
        if not self._is_8bit(part.shape):
            return super().part_bytes(part, itemsize)
        return 2 * (numel(part.local_shape) + scale_bytes(part))

    def step_traffic(self, part: Part, itemsize: int) -> int:
        """See `UpdateRule.step_traffic`: scales of blocks that processes share."""
        return 2 * scale_traffic(part) if self._is_8bit(part.shape) else 0

    def spread(self, key: str, axis: int, shape: Sequence[int]) -> int | None:
        """See `UpdateRule.spread`: scales are spread by blocks."""
        return 0 if key.endswith("_absmax") else axis

    def by_rows(self, grad: Tensor, state: State, weight: Tensor) -> RowUpdates:
        """See `UpdateRule.by_rows`: at once, where processes share blocks."""
        return self._rows_of(state).by_rows(self, grad, state, weight)

    def gated_rows(
        self, grad: Tensor, state: State, weight: Tensor, good: Tensor | None
    ) -> RowUpdates:
        """See `UpdateRule.gated_rows`: at once, where processes share blocks."""
        return self._rows_of(state).gated_rows(self, grad, state, weight, good)

    @staticmethod
    def _rows_of(state: State) -> type[UpdateRule]:
        whole = cut_part(state) is not None and "exp_avg_absmax" in state
        return UpdateRule if whole else ElementwiseRule

    def update(
        self, grads: Sequence[Tensor], states: Sequence[State], weights: Sequence[Tensor]
    ) -> list[Update]:
        """See `UpdateRule.update`; without a kernel, one by one in fp32 scratch."""
        updates: list[Update | None] = [None] * len(grads)
        packed = [i for i, state in enumerate(states) if self._fuses(grads[i], state)]
        if packed:
            fused = self._fused([grads[i] for i in packed], [states[i] for i in packed])
            for i, update in zip(packed, fused, strict=True):
                updates[i] = update
        for i, (grad, state) in enumerate(zip(grads, states, strict=True)):
            if updates[i] is None:
                grad = grad.to(torch.float32).contiguous()
                moments = {key: self._load(state, key) for key in SIGNED}
                m, v = moments.values()
                (updates[i],) = self._advance([grad], [m], [v], state)
                self._save(state, moments)
        return [update for update in updates if update is not None]

    def update_with_norms(
        self,
        grads: Sequence[Tensor],
        states: Sequence[State],
        weights: Sequence[Tensor],
        axes: Sequence[int],
    ) -> list[Update]:
        """`update`: the 8-bit kernel works by blocks, so it can't sum by row or column."""
        return self.update(grads, states, weights)

    def scratch_bytes(self, dtype: torch.dtype, state: State, *, overwrites: bool) -> int:
        """See `UpdateRule.scratch_bytes`: by the kernel no more than the directions."""
        scales = state.get("exp_avg_absmax")
        if scales is None or dtype not in KERNEL_DTYPES or not self._fuses(scales, state):
            return super().scratch_bytes(dtype, state, overwrites=overwrites)
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
        """See `UpdateRule.update_together`: one launch, without norms."""
        grads = list(grads_b.unbind(0))
        if not all(map(self._fuses, grads, states)):
            return ElementwiseRule.update_together(self, grads_b, states, weights, axis, good_b)
        numbers, sizes, factor, lr = joined_sizes(self, states, good_b)
        # Each entry is read before its direction is written.
        directions_b = grads_b if overwrites else torch.empty_like(grads_b)
        self._call(grads, states, list(directions_b.unbind(0)), numbers, sizes)
        decay_factor, alpha = self._decay_and_alpha(lr)
        return Update(directions_b, alpha, decay_factor, factor)

    def _fuses(self, grad: Tensor, state: State) -> bool:
        """Whether one kernel can dequantise, advance and quantise the moments."""
        return (
            isinstance(self.quantizer, Native)
            and not self.compiled
            and "exp_avg_absmax" in state
            and cut_part(state) is None
            and knows_adam([grad], [state["exp_avg"]], eight_bit=True)
        )

    def _fused(
        self, grads: list[Tensor], states: list[State], good_b: Tensor | None = None
    ) -> list[Update]:
        """One launch; directions of those without a flag are zero."""
        if good_b is None:
            numbers, sizes, factors, lr = listed_sizes(self, states)
        else:
            numbers, sizes, factor, lr = joined_sizes(self, states, good_b)
            factors = [factor] * len(states)  # which only residuals read
        directions = [torch.empty_like(grad) for grad in grads]
        self._call(grads, states, directions, numbers, sizes)
        decay_factor, alpha = self._decay_and_alpha(lr)
        return [
            Update(direction, alpha, decay_factor, factor)
            for direction, factor in zip(directions, factors, strict=True)
        ]

    def _call(
        self,
        grads: list[Tensor],
        states: Sequence[State],
        directions: list[Tensor],
        numbers: tuple[float, float],
        sizes: Tensor | None,
    ) -> None:
        keys = ("exp_avg", "exp_avg_absmax", "exp_avg_sq", "exp_avg_sq_absmax")
        stored = [[state[key] for state in states] for key in keys]
        torch.ops.lowrank.adam_8bit(grads, *stored, directions, *self.betas, *numbers, sizes)

    def bounds_scratch(self, weight: Tensor, state: State) -> bool:
        """See `UpdateRule.bounds_scratch`: it takes some for each weight."""
        return False

    def apply(
        self,
        grads: Sequence[Tensor],
        states: Sequence[State],
        weights: Sequence[Tensor],
        good_b: Tensor | None = None,
    ) -> None:
        """See `UpdateRule.apply`: in chunks of rows that bound the fp32 copies.

        Small ones on a GPU in one list, to save launches.
        """
        small = [
            on_gpu(weight) and weight.numel() <= DEVICE_ELEMENTS and self._fuses(grad, state)
            for grad, state, weight in zip(grads, states, weights, strict=True)
        ]
        listed = [i for i, own in enumerate(small) if own]
        if listed:
            own_grads, own_states, targets, flags = picked(listed, grads, states, weights, good_b)
            if flags is not None:
                own_grads = zeroed(own_grads, flags)
            add_updates_(targets, self._fused(own_grads, own_states, flags))
        for i, own in enumerate(small):
            if not own:
                ElementwiseRule.apply(self, *picked([i], grads, states, weights, good_b))

    def first_moment(self, state: State) -> Tensor:
        """The first moment, dequantised to fp32."""
        return self._load(state, "exp_avg")

    def transport_moments(
        self, state: State, how: str, rotation: Rotation, into: State | None = None
    ) -> None:
        """See `Adam.transport_moments`, on dequantised moments."""
        moments = {key: self._load(state, key) for key in SIGNED}
        m, v = moments.values()
        moved = transported_moments(m, v, how, rotation, self.betas, int(state["step"]))
        self._save(into or state, dict(zip(SIGNED, moved, strict=True)))

    def _load(self, state: State, key: str) -> Tensor:
        if f"{key}_absmax" not in state:
            dense: Tensor = state[key]
            return dense
        scales = state[f"{key}_absmax"]
        return dequantize(self.quantizer, state[key], scales, SIGNED[key], cut_part(state))

    def _save(self, state: State, moments: dict[str, Tensor]) -> None:
        for key, signed in SIGNED.items():
            if f"{key}_absmax" in state:
                out = state[key], state[f"{key}_absmax"]
                quantize(self.quantizer, moments[key], signed, out, cut_part(state))
            elif moments[key] is not state[key]:
                state[key].copy_(moments[key])
