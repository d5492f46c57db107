"""Adafactor with an 8-bit first moment: one byte an entry and one fp32 scale per 256 entries.

The rule is `Adafactor`'s; the factored second moment is small and stays in fp32.
Memory of a x b entries: 4 (a + b) + a b + 4 ceil(a b / 256) bytes; below `min_8bit_size` entries
the first moment is in fp32.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Self

from torch import Tensor

from lowrank.cuda import blockwise

from ..engine.rotation import Rotation
from ..engine.sharding import Part
from .adafactor import Adafactor
from .base import RowUpdates, State, numel
from .quantizers import NATIVE, Quantizer
from .spread_blocks import cut_part, dequantize, quantize, scale_bytes

KEY = "exp_avg"
SCALES = "exp_avg_absmax"


@dataclass(frozen=True)
class Adafactor8bit(Adafactor):
    """`Adafactor` with an 8-bit first moment.

    Attributes:
        min_8bit_size: a (projected) gradient with fewer entries has an fp32 first moment.
        quantizer: converts between fp32 and codes.
    """

    min_8bit_size: int = 4096
    quantizer: Quantizer = NATIVE

    def init(self, shape: Sequence[int], like: Tensor) -> State:
        """Zero factors, and codes of a zero first moment."""
        state = super().init(shape, like)
        if KEY in state and numel(shape) >= self.min_8bit_size:
            state[KEY], state[SCALES] = self.quantizer.quantize(state[KEY].float(), True)
        return state

    def state_bytes(self, shape: Sequence[int], itemsize: int) -> int:
        """Factors, codes and scales."""
        size, total = numel(shape), super().state_bytes(shape, itemsize)
        if self.beta1 is None or size < self.min_8bit_size:
            return total
        return total - max(itemsize, 4) * size + blockwise.blockwise_bytes(size)

    def deciding_for(self, shape: Sequence[int]) -> Self:
        """See `UpdateRule.deciding_for`: whether the first moment has 8 bits."""
        eight = numel(shape) >= self.min_8bit_size
        return replace(self, min_8bit_size=0 if eight else sys.maxsize)

    def part_bytes(self, part: Part, itemsize: int) -> int:
        """See `UpdateRule.part_bytes`: scales are those of its share of the whole's blocks."""
        dense, size = Adafactor.state_bytes(self, part.local_shape, itemsize), numel(part.shape)
        if self.beta1 is None or size < self.min_8bit_size:
            return dense
        held = numel(part.local_shape)
        return dense - max(itemsize, 4) * held + held + scale_bytes(part)

    def spread(self, key: str, axis: int, shape: Sequence[int]) -> int | None:
        """See `UpdateRule.spread`: scales are spread by blocks."""
        return 0 if key == SCALES else super().spread(key, axis, shape)

    def by_rows(self, grad: Tensor, state: State, weight: Tensor) -> RowUpdates:
        """See `UpdateRule.by_rows`: at once, where processes share blocks."""
        by_rows = super().by_rows(grad, state, weight)
        if SCALES not in state or cut_part(state) is None:
            return by_rows
        whole = by_rows(slice(0, len(grad)))
        return lambda rows: replace(whole, direction=whole.direction[rows])

    def first_moment(self, state: State) -> Tensor | None:
        """The first moment, dequantised to fp32."""
        if SCALES in state:
            return dequantize(self.quantizer, state[KEY], state[SCALES], True, cut_part(state))
        return super().first_moment(state)

    def _averaged(self, state: State, direction: Tensor) -> Tensor:
        if SCALES not in state:
            return super()._averaged(state, direction)
        assert self.beta1 is not None
        moment = self.first_moment(state)
        assert moment is not None
        moment.lerp_(direction.float(), 1 - self.beta1)
        self._save(state, moment)
        return moment

    def _save(self, state: State, moment: Tensor) -> None:
        out = state[KEY], state[SCALES]
        quantize(self.quantizer, moment, True, out, cut_part(state))

    def transport_moments(
        self, state: State, how: str, rotation: Rotation, into: State | None = None
    ) -> None:
        """See `Adafactor.transport_moments`, on the dequantised moment."""
        target = into or state
        if SCALES not in state and SCALES not in target:
            super().transport_moments(state, how, rotation, into)
            return
        moment = self.first_moment(state)
        assert moment is not None
        shape = target[KEY].shape
        moved = moment if into is None else moment.new_empty(shape)
        dense = {**target, KEY: moved}
        super().transport_moments(
            {**state, KEY: moment}, how, rotation, None if into is None else dense
        )
        if SCALES in target:
            self._save(target, moved)
        else:
            target[KEY].copy_(moved)
