"""Random choices of the kernels' cases: hypothesis' in tests, seeded ones where it is missing."""

from __future__ import annotations

import random
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from hypothesis import strategies as st


class Draw:
    """Random choices, and the tensors that go with them.

    Attributes:
        device: where kernels compute.
        around: the references run in it.
        reference: where references compute, on copies of the same numbers; None is the same device.
        plain: the reference takes the kernel's place, too: it is compared with itself elsewhere.
    """

    def __init__(
        self,
        draw: Callable[[st.SearchStrategy[Any]], Any] | None,
        device: torch.device,
        around: Callable[[], AbstractContextManager[object]] = nullcontext,
    ) -> None:
        """With hypothesis' function, or None in a subclass that chooses by itself."""
        self._draw = draw
        self.device, self.around = device, around
        self.reference: torch.device | None = None
        self.plain = False

    def integer(self, low: int, high: int) -> int:
        """In [low, high]."""
        from hypothesis import strategies as st

        assert self._draw is not None
        return int(self._draw(st.integers(low, high)))

    def one(self, *values: Any) -> Any:
        """One of them."""
        from hypothesis import strategies as st

        assert self._draw is not None
        return self._draw(st.sampled_from(values))

    def seed(self) -> int:
        """64 signed bits."""
        return self.integer(-(1 << 63), (1 << 63) - 1)

    def tensor(self, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        """Normal entries of a random size, some of them zero."""
        generator = torch.Generator().manual_seed(self.integer(0, 1 << 30))
        x = torch.randn(shape, generator=generator) * 10.0 ** self.integer(-4, 2)
        x[torch.rand(shape, generator=generator) < 0.05] = 0.0
        return x.to(self.device, dtype)

    def integers(self, *shape: int, high: int) -> Tensor:
        """uint8 below `high`."""
        generator = torch.Generator().manual_seed(self.integer(0, 1 << 30))
        return torch.randint(high, shape, generator=generator, dtype=torch.uint8).to(self.device)


class SeededDraw(Draw):
    """Choices from a seed alone: the ends of each range more often than what lies between."""

    def __init__(self, seed: int, device: torch.device) -> None:
        super().__init__(None, device)
        self._random = random.Random(seed)

    def integer(self, low: int, high: int) -> int:
        """In [low, high]."""
        end = self._random.random()
        if end < 0.2:
            return low if end < 0.1 else high
        return self._random.randint(low, high)

    def one(self, *values: Any) -> Any:
        """One of them."""
        return self._random.choice(values)
