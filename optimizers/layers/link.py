"""A layer together with the group and the parameters that an optimizer has of it."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn

from ..engine.options import Group
from .base import FactoredLinear
from .seeds import layer_seed


@dataclass(frozen=True)
class Link:
    """A layer that an optimizer trains.

    Attributes:
        name: the layer's name in its model, without wrappers.
        layer: the layer.
        group: options of its factors.
        params: its trained parts, in the order of `FACTORS`, as the optimizer has them. Under
            FSDP2 the layer has others in their place where it is unsharded, under ZeRO they are row
            blocks.
    """

    name: str
    layer: FactoredLinear
    group: Group
    params: tuple[Tensor, ...]

    def factors(self) -> list[Tensor]:
        """The trained parts, in the order of `FACTORS`."""
        return list(self.params)

    def present(self) -> tuple[nn.Parameter, ...]:
        """What the layer has in the place of its trained parts now."""
        return tuple(getattr(self.layer, name) for name in self.layer.FACTORS)

    def seed(self, *parts: int) -> int:
        """The layer's seed, from its group's."""
        return layer_seed(self.group["seed"], self.name, *parts)
