"""What steps on a GPU take as scratch: as much as batches are bounded by, and one batch a shape."""

from __future__ import annotations

import pytest
import torch

from lowrank.optimizers.engine import scratch
from lowrank.optimizers.engine.devices import assuming_memory
from lowrank.optimizers.engine.scratch import (
    DEVICE_SCRATCH_BYTES,
    Bounded,
    bounded_batches,
    device_scratch,
    watching_batches,
)
from lowrank.trainers.plan import plan
from lowrank.trainers.plan.cards import card_bytes
from lowrank.trainers.plan.deeper import Depths, Part, Step, deeper
from lowrank.trainers.plan.launches import count_step


class Seen(list[Bounded]):
    """What was split."""

    def begin(self, split: Bounded) -> None:
        self.append(split)

    def end(self) -> None:
        """Nothing is noted of it."""


CUDA = torch.device("cuda")
#: How far a step may go beyond what its batch is thought to take: weights in eight bits and Fira's
#: have a piece of a product in fp32 each, which is large beside these small matrices.
BEYOND = {"qgalore_adamw_8bit": 1.5, "fira_adamw": 1.4, "frugal_adamw": 1.2}
NAMES = [
    pytest.param(name, marks=() if name in ("fira_adamw", "galore_muon") else pytest.mark.slow)
    for name in (
        *("galore_adamw_8bit", "apollo_adamw", "online_subspace_adamw", "online_subspace_lion"),
        *("galore_muon", "galore_adafactor", "muon", *BEYOND),
    )
]


@pytest.mark.parametrize("name", NAMES)
def test_a_batch_takes_what_bounds_it(name: str) -> None:
    seen = Seen()
    with watching_batches(seen):
        found = count_step(name, (1376, 512), 16, rank=128)
    thought = [own.total for own in seen if not own.refits][-1]
    assert 0.9 * thought <= found.scratch <= BEYOND.get(name, 1.1) * thought


def test_the_bound_follows_the_card() -> None:
    for card, bound in (("T4", DEVICE_SCRATCH_BYTES), ("H100", (81559 << 20) // 16)):
        with assuming_memory(card_bytes(card)):
            assert device_scratch(CUDA) == bound
    assert device_scratch(torch.device("cpu")) == DEVICE_SCRATCH_BYTES


def test_larger_cards_take_fewer_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    """Directions take the place of projected gradients: two bytes an entry in bf16."""
    each = 1376 * 128 * 2
    monkeypatch.setattr(scratch, "DEVICE_SCRATCH_BYTES", each)
    small, large = (
        count_step("galore_adamw", (1376, 512), 6, rank=128, memory=16 * count * each)
        for count in (3, 6)
    )
    assert (small.operations, large.operations) == (16, 8)
    assert small.scratch == pytest.approx(3 * each, rel=0.01)
    assert large.scratch == pytest.approx(6 * each, rel=0.01)


def test_batches() -> None:
    seen = Seen()
    with watching_batches(seen):
        assert list(bounded_batches([3, 3, 3, 9, 1], 6)) == [[0, 1], [2], [3], [4]]
        assert list(bounded_batches([], 6)) == []
    assert seen == [Bounded((3, 3, 3, 9, 1), 6, refits=False)]
    assert (seen[0].total, seen[0].largest_batch) == (19, 9)


DEPTHS = Depths(2, 3, 10)


def test_lists_of_deeper_models() -> None:
    """An embedding, two matrices a block, and a head."""
    sizes = [(7, *(1, 2) * depth, 7) for depth in (2, 3, 10)]
    assert DEPTHS.sizes(sizes[0], sizes[1]) == sizes[2]
    assert DEPTHS.sizes([5], [5]) == (5,)
    assert DEPTHS.sizes([1, 2], [1, 2, 3, 4]) == (1, 2, *(3, 4) * 8)
    assert DEPTHS.sizes([1, 2, 3], [4, 5, 6, 7]) is None
    assert DEPTHS.sizes([1, 1, 1], [1, 1]) is None


@pytest.mark.parametrize("bound", [4, 8, 12, 24, 1000])
def test_steps_of_deeper_models(bound: int) -> None:
    """Each block holds 5, a matrix takes 10 of what its batch is bounded by 4 of."""

    def step(depth: int) -> Step:
        split = Bounded((4,) * depth, bound, refits=False)
        held = 5 * depth
        full = Part(split, held, held + 10 * split.largest_batch // 4)
        return Step((Part(None, 0, held), full, Part(None, held, held + 1)), renews=False)

    assert deeper(step(2), step(3), DEPTHS) == step(10).peak


def test_steps_that_differ_are_no_guide() -> None:
    def step(*splits: Bounded, renews: bool = False) -> Step:
        parts = tuple(Part(split, 0, 1) for split in splits)
        return Step((Part(None, 0, 1), *parts), renews)

    two, three = (Bounded((4,) * depth, 8, refits=False) for depth in (2, 3))
    assert deeper(step(two), step(three), DEPTHS) == 1
    assert deeper(step(two), step(three, three), DEPTHS) is None
    assert deeper(step(two), step(three, renews=True), DEPTHS) is None
    assert deeper(step(two), step(Bounded((4, 4, 5), 8, refits=False)), DEPTHS) == 1
    assert deeper(step(two), step(Bounded((5, 4, 5), 8, refits=False)), DEPTHS) is None
    assert deeper(step(two), step(Bounded((4,) * 3, 9, refits=False)), DEPTHS) is None


@pytest.mark.exhaustive
def test_plans_have_the_scratch_of_all_blocks() -> None:
    """Rank 1024 in 32 blocks: one batch of the largest shape on the larger card."""
    small, large = (
        plan("llama_7b", "galore_adamw", card=card, options={"rank": 1024}).phases["step"]
        for card in ("T4", "H100")
    )
    assert large["scratch"] == pytest.approx(64 * 11008 * 1024 * 2, rel=1e-4)
    assert 0.9 * DEVICE_SCRATCH_BYTES < small["scratch"] <= 1.001 * DEVICE_SCRATCH_BYTES
