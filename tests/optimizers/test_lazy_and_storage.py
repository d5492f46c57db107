"""The lazy schedule's rule, and bases in four and eight bits as they are stored."""

from __future__ import annotations

import itertools

import pytest
import torch
from support import hashed, matrix
from torch import Tensor

from lowrank.optimizers.engine.geometry import Geometry, Side
from lowrank.optimizers.schedules.lazy import LazyLayerwise
from lowrank.optimizers.storage.quantized import Int4Basis, Int8Basis, QuantizedBasis

GEOMETRY = Geometry.of((12, 8), 3, "std")


def vector(angle: float) -> tuple[Tensor, ...]:
    """A basis whose first column lies at an angle (radians) in a plane."""
    basis = torch.zeros(8, 3)
    basis[0, 0], basis[1, 0] = torch.cos(torch.tensor(angle)), torch.sin(torch.tensor(angle))
    return (basis,)


def steps_of_refreshes(
    schedule: LazyLayerwise, angles: list[float], steps: int, missed: tuple[int, ...] = ()
) -> tuple[list[int], dict[str, object]]:
    """When a matrix is refitted, its leading vector turning by each angle in turn (then by 0)."""
    state = schedule.init(GEOMETRY, torch.zeros(12, 8))
    turned, found = 0.0, []
    for taken in range(steps):
        if schedule.due(state, taken, 0, 1) and taken not in missed:
            turned += angles[len(found)] if len(found) < len(angles) else 0.0
            schedule.refreshed(state, taken, vector(turned))
            found.append(taken)
    return found, state


def test_gap_doubles_from_the_sixth_refresh_on_and_at_every_one_after() -> None:
    found, state = steps_of_refreshes(LazyLayerwise(gap=10), [], 400)
    # five similarities are in the queue at 50; from then on it is never emptied
    assert found == [0, 10, 20, 30, 40, 50, 60, 80, 160, 320]
    assert state["gap"] == 10 * 2**5


def test_gap_stays_where_the_subspace_turns() -> None:
    found, state = steps_of_refreshes(LazyLayerwise(gap=10), [1.5] * 40, 400)
    assert found == list(range(0, 400, 10))
    assert state["gap"] == 10
    assert float(state["similarities"].mean()) == pytest.approx(0.0707, abs=1e-3)


def test_the_mean_decides_and_signs_count() -> None:
    """Four similarities of 1 and one of -1: a mean of 0.6; three and two: 0.2."""
    half_turn = 3.14159265
    once = [0.0, 0.0, half_turn, 0.0, 0.0, 0.0]
    twice = [0.0, half_turn, half_turn, 0.0, 0.0, 0.0]
    assert steps_of_refreshes(LazyLayerwise(gap=10), once, 51)[1]["gap"] == 20
    assert steps_of_refreshes(LazyLayerwise(gap=10), twice, 51)[1]["gap"] == 10
    lenient = LazyLayerwise(gap=10, cos_threshold=0.15)
    assert steps_of_refreshes(lenient, twice, 51)[1]["gap"] == 20


def test_own_queue_size_and_growth() -> None:
    schedule = LazyLayerwise(gap=4, queue_size=1, gamma_proj=1.5)
    found, state = steps_of_refreshes(schedule, [], 40)
    assert found == [0, 4, 6, 9, 13, 19, 28]  # gaps 4, 6, 9, 13, 19, 28, 42
    assert state["gap"] == 42


def test_a_missed_refresh_is_made_up_at_the_next_step() -> None:
    found, _ = steps_of_refreshes(LazyLayerwise(gap=10), [1.5] * 40, 40, missed=(0, 1, 20, 21))
    assert found == [2, 10, 22, 30]


def test_state_of_the_schedule() -> None:
    schedule = LazyLayerwise(gap=10, queue_size=7)
    for proj_type, length in (("std", 8), ("left", 12), ("full", 12)):
        geometry = Geometry.of((12, 8), 3, proj_type)
        state = schedule.init(geometry, torch.zeros(12, 8, dtype=torch.bfloat16))
        tensors = [value for value in state.values() if isinstance(value, Tensor)]
        stored = sum(value.nbytes for value in tensors)
        assert stored == schedule.state_bytes(geometry) == 4 * (7 + length)
        assert all(isinstance(value, Tensor | int) for value in state.values())


STORAGES = (
    Int4Basis(),
    Int4Basis(quant_group_size=5),
    Int4Basis(quant_group_size=16, quant_format="midrise"),
    Int4Basis(quant_group_size=16, quant_format="nf4"),
    Int8Basis(),
    Int8Basis(quant_group_size=7),
)


@pytest.mark.parametrize("storage", STORAGES, ids=str)
@pytest.mark.parametrize("shape", [(13, 3), (16, 8), (1, 1)], ids=str)
def test_storage_round_trip(storage: QuantizedBasis, shape: tuple[int, int]) -> None:
    for side, key in itertools.product(Side, ("basis", "basis_right")):
        for dtype in (torch.float32, torch.bfloat16):
            check_round_trip(storage, side, key, shape, dtype)


def check_round_trip(
    storage: QuantizedBasis, side: Side, key: str, shape: tuple[int, int], dtype: torch.dtype
) -> None:
    like = torch.zeros(2, 2, dtype=dtype)
    state = {"side": int(side), **storage.init(key, shape, like)}
    assert (storage.read(state, key) == 0).all()
    assert storage.read(state, key).shape == shape
    basis = torch.linalg.qr(matrix(*shape, 3))[0].float()
    storage.write(state, key, basis)
    back = storage.read(state, key)
    assert back.dtype == dtype
    allowed = 0.03 if isinstance(storage, Int8Basis) else 0.25
    assert float((back.float() - basis).norm() / basis.norm()) < allowed
    tensors = [value for value in state.values() if isinstance(value, Tensor)]
    stored = sum(t.untyped_storage().nbytes() for t in tensors)
    assert stored == storage.state_bytes(shape, dtype.itemsize)
    assert all(name.startswith(key) for name, t in state.items() if isinstance(t, Tensor))
    assert not storage.exact


def test_order_of_entries_is_the_official_one() -> None:
    """A left basis is grouped along its rows, a right one along its singular vectors."""
    basis = hashed(24, 1).view(8, 3).float()
    storage = Int8Basis(quant_group_size=6)
    for side, official in ((Side.LEFT, basis), (Side.RIGHT, basis.T)):
        state = {"side": int(side), **storage.init("basis", (8, 3), basis)}
        storage.write(state, "basis", basis)
        rows = official.reshape(-1, 6)
        spread = rows.amax(1).clamp(min=0) - rows.amin(1).clamp(max=0)
        torch.testing.assert_close(state["basis_scales"], spread / 255)
