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
from lowrank.trainers.plan.fakes import batches_grow
from lowrank.trainers.plan.launches import count_step

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
    with watching_batches() as seen:
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


def test_batches_and_those_of_deeper_models() -> None:
    with watching_batches() as seen:
        assert list(bounded_batches([3, 3, 3, 9, 1], 6)) == [[0, 1], [2], [3], [4]]
        assert list(bounded_batches([], 6)) == []
    assert seen[0] == Bounded(19, 9, 6, refits=False)

    def of(*totals: int) -> list[Bounded]:
        return [Bounded(total, 1, 100, refits=False) for total in totals]

    assert batches_grow(of(50, 1), 16) is True
    assert batches_grow(of(51), 16) is None
    assert batches_grow(of(101, 300), 64) is False
    assert batches_grow(of(50, 300), 16) is None
    assert batches_grow([Bounded(500, 500, 100, refits=False)], 16) is True  # an embedding


@pytest.mark.exhaustive
def test_plans_have_the_scratch_of_all_blocks() -> None:
    """Rank 1024 in 32 blocks: one batch of the largest shape on the larger card."""
    small, large = (
        plan("llama_7b", "galore_adamw", card=card, options={"rank": 1024}).phases["step"]
        for card in ("T4", "H100")
    )
    assert large["scratch"] == pytest.approx(64 * 11008 * 1024 * 2, rel=1e-4)
    assert 0.9 * DEVICE_SCRATCH_BYTES < small["scratch"] <= 1.001 * DEVICE_SCRATCH_BYTES
