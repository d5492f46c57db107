"""Factored layers under DeepSpeed's ZeRO, stages 1 to 3.

In a step a layer shows the optimizer's row blocks (`engine.zero`) in the place of its factors, so
that events work on the engine's own weights, fp32 where the model is bf16; the engine writes the
model's from them. Frozen weights are no business of the engine's optimizer: in stages 1 and 2 each
process has all of them and changes them alike, in stage 3 they are cut as all parameters are, and
become row blocks as well while an event goes on.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from torch import Tensor, distributed

from ..engine.parameters import whole_shape
from ..engine.row_block import Fragment, RowBlock, return_rows, take_rows
from ..engine.zero import Partitions, Place, layouts
from .base import FactoredLinear
from .link import Link

#: A layer, the name of one of its parameters, and what to have in its place.
_Exchange = tuple[FactoredLinear, str, Tensor]
#: The name of a frozen weight, its piece, and the rows that are made of it.
_Frozen = tuple[str, Place, Fragment]


class PartitionedLayers:
    """The layers of an optimizer whose parameters ZeRO has cut; all processes call alike."""

    def __init__(
        self, links: Sequence[Link], partitions: Partitions, *, steps_together: bool
    ) -> None:
        """Finds the pieces of frozen weights.

        Args:
            links: the layers, with row blocks for factors.
            partitions: of the optimizer.
            steps_together: whether events need all factors of a layer to step at once.

        Raises:
            ValueError: factors of a layer step in turn and must not, or a frozen weight is stored
                in another place or form.
        """
        self.processes = partitions.processes
        apart = partitions.unite([link.params for link in links])
        for link, several in zip(links, apart, strict=True):
            if several and steps_together:
                raise ValueError(
                    f"the factors of {link.name} are in more than one partition of ZeRO, and its "
                    "vectors are switched before the first of them steps: accepted are factors in "
                    "one group, and in stage 3 a sub_group_size that all of them fit in"
                )
        self._arrived: set[RowBlock] = set()
        self._frozen = {link.layer: self._fragments(link) for link in links}

    def _fragments(self, link: Link) -> list[_Frozen]:
        """A layer's frozen weights that are cut, which they are in stage 3."""
        found = {name: link.layer._parameters.get(name) for name in link.layer.FROZEN}
        cut: dict[str, Any] = {n: p for n, p in found.items() if hasattr(p, "ds_tensor")}
        places = []
        for name, param in cut.items():
            piece = param.ds_tensor
            if piece.dtype != param.dtype or piece.device != param.device:
                raise ValueError(
                    f"{link.name}.{name} is {param.dtype} on {param.device}, and ZeRO stores "
                    f"{piece.dtype} on {piece.device}: accepted is ZeRO without offload_param and "
                    "zero_quantized_nontrainable_weights"
                )
            size = piece.ds_numel
            rank = distributed.get_rank(param.ds_process_group)
            start = min(rank * size, param.ds_numel)
            places.append(Place(piece, 0, start, min(start + size, param.ds_numel) - start))
        if not places:
            return []
        cuts = layouts(places, [whole_shape(param) for param in cut.values()], self.processes)
        blocks = [
            RowBlock(layout.shape, place.flat.detach()[:0], layout.rows(self.processes))
            for place, layout in zip(places, cuts, strict=True)
        ]
        return [
            (name, place, Fragment(layout, block, place.of(place.flat)))
            for name, place, layout, block in zip(cut, places, cuts, blocks, strict=True)
        ]

    def complete(self, links: Sequence[Link]) -> list[Link]:
        """The layers of which the last factor has its gradient in this step.

        The engine steps its partitions in turn, so that factors may get theirs one by one.
        """
        blocks = [block for link in links for block in link.params if block.grad is not None]
        self._arrived.update(block for block in blocks if isinstance(block, RowBlock))
        done = [link for link in links if self._arrived.issuperset(link.params)]
        self._arrived.difference_update(block for link in done for block in link.params)
        return done

    @property
    def waiting(self) -> bool:
        """Whether some factors have had their gradient, and others of their layer not yet."""
        return bool(self._arrived)

    @contextmanager
    def shown(self, links: Sequence[Link]) -> Iterator[None]:
        """Has layers show the blocks of their factors."""
        with _exchanged(
            (link.layer, name, block)
            for link in links
            for name, block in zip(link.layer.FACTORS, link.params, strict=True)
        ):
            yield

    @contextmanager
    def frozen_rows(self, links: Sequence[Link]) -> Iterator[None]:
        """Has layers show blocks of their frozen weights where those are cut, and writes them."""
        own = [(link.layer, *frozen) for link in links for frozen in self._frozen[link.layer]]
        fragments = [fragment for *_, fragment in own]
        for _, _, place, fragment in own:
            fragment.weight = place.of(place.flat)
        take_rows(fragments, self.processes)
        with _exchanged((layer, name, fragment.block) for layer, name, _, fragment in own):
            yield
        return_rows(fragments, self.processes)


@contextmanager
def _exchanged(exchanges: Iterable[_Exchange]) -> Iterator[None]:
    """Puts tensors in the place of layers' parameters for a while."""
    before: list[_Exchange] = []
    try:
        for layer, name, tensor in exchanges:
            before.append((layer, name, layer._parameters[name]))  # type: ignore[arg-type]
            layer._parameters[name] = tensor  # type: ignore[assignment]
        yield
    finally:
        for layer, name, tensor in before:
            layer._parameters[name] = tensor  # type: ignore[assignment]
