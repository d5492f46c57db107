"""Geometry, projection and write-back: sides, shapes, row ranges, slabs of lower precision."""

from __future__ import annotations

import itertools

import pytest
import torch
from support import matrix
from torch import Tensor

from lowrank.optimizers.engine import chunks
from lowrank.optimizers.engine.geometry import Geometry, RowRange, Side, side_of
from lowrank.optimizers.engine.processes import Processes
from lowrank.optimizers.projectors import apply


@pytest.mark.parametrize(
    ("shape", "proj_type", "expected"),
    [
        ((12, 8), "std", Side.RIGHT),
        ((8, 12), "std", Side.LEFT),
        ((8, 8), "std", Side.RIGHT),
        ((12, 8), "reverse_std", Side.LEFT),
        ((8, 12), "reverse_std", Side.RIGHT),
        ((8, 8), "reverse_std", Side.LEFT),
        ((12, 8), "left", Side.LEFT),
        ((12, 8), "right", Side.RIGHT),
        ((12, 8), "full", Side.BOTH),
    ],
)
def test_sides_are_galores(shape: tuple[int, int], proj_type: str, expected: Side) -> None:
    assert side_of(shape, proj_type) is expected


def test_rank_is_clamped_and_side_comes_from_the_original_shape() -> None:
    geometry = Geometry.of((6, 20), 50, "reverse_std")
    assert geometry.rank == 6
    assert geometry.side is Side.RIGHT
    assert geometry.basis_shapes == {"basis": (20, 6)}
    assert geometry.projected_shape() == (6, 6)
    assert geometry.projected_shape(local_rows=2) == (2, 6)


class KnownSum(Processes):
    """Processes whose sum is known beforehand."""

    def __init__(self, total: Tensor) -> None:
        super().__init__()
        self.__dict__["total"] = total

    def sum(self, tensor: Tensor) -> Tensor:
        assert tensor.shape == self.__dict__["total"].shape
        return self.__dict__["total"]


def bases_for(geometry: Geometry) -> list[Tensor]:
    return [
        torch.linalg.qr(matrix(*shape, i)).Q
        for i, shape in enumerate(geometry.basis_shapes.values())
    ]


@pytest.mark.parametrize("side", ["left", "right", "full"])
@pytest.mark.parametrize("parts", [2, 3])
def test_sharded_rows_equal_the_whole(side: str, parts: int) -> None:
    """Row blocks of ragged sizes, summed by a `reduce`, give the same projection and update."""
    geometry = Geometry.of((11, 7), 3, side)
    grad, weight = matrix(11, 7, 1), matrix(11, 7, 2)
    bases = bases_for(geometry)
    cuts = [0, 4, 11] if parts == 2 else [0, 1, 8, 11]
    whole = RowRange.whole(11)
    low = apply.project(grad, bases, geometry, whole)
    left_sum = bases[0].T @ grad if side != "right" else low
    expected = weight.clone()
    apply.write_back(expected, low, bases, geometry, whole, alpha=0.5, decay_factor=0.9)

    partial = [
        apply.project(grad[a:b], bases, geometry, RowRange(a, b))
        for a, b in itertools.pairwise(cuts)
    ]
    total = torch.cat(partial) if side == "right" else torch.stack(partial).sum(0)
    torch.testing.assert_close(total, low)  # projection is linear in the rows
    sharded = weight.clone()
    for a, b in itertools.pairwise(cuts):
        rows = RowRange(a, b, KnownSum(left_sum))  # what the others' rows sum up to
        own = apply.project(grad[a:b], bases, geometry, rows)
        local = sharded[a:b]
        apply.write_back(local, own, bases, geometry, rows, alpha=0.5, decay_factor=0.9)
    torch.testing.assert_close(sharded, expected)


def test_rows_that_are_all_here_are_the_whole() -> None:
    grad = matrix(6, 4, 1)
    assert RowRange.whole(6).assemble(grad) is grad


@pytest.mark.parametrize("side", ["left", "right", "full"])
@pytest.mark.parametrize("slab", [8, 1 << 18])
def test_low_precision_slabs(side: str, slab: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Slabs give what one bf16 GEMM gives, within bf16's rounding, and keep the weight's dtype."""
    monkeypatch.setattr(chunks, "CACHE_ELEMENTS", slab)
    geometry = Geometry.of((24, 16), 5, side)
    grad, weight = matrix(24, 16, 1).float(), matrix(24, 16, 2).float()
    bases = [basis.float() for basis in bases_for(geometry)]
    rows = RowRange.whole(24)
    exact = apply.project(grad, bases, geometry, rows)
    low = apply.project(grad, bases, geometry, rows, dtype=torch.bfloat16)
    assert low.dtype == torch.float32
    torch.testing.assert_close(low, exact, rtol=0, atol=0.02 * exact.abs().max().item())
    expected, result = weight.clone(), weight.clone()
    apply.write_back(expected, exact, bases, geometry, rows, alpha=0.1, decay_factor=0.9)
    apply.write_back(
        result, exact, bases, geometry, rows, alpha=0.1, decay_factor=0.9, dtype=torch.bfloat16
    )
    torch.testing.assert_close(result, expected, rtol=0, atol=3e-3)


def test_write_back_makes_no_whole_temporary() -> None:
    """One GEMM each way: nothing as large as the matrix is allocated."""
    geometry = Geometry.of((256, 512), 8, "std")
    grad, weight = torch.randn(256, 512), torch.randn(256, 512)
    bases = [torch.linalg.qr(torch.randn(256, 8)).Q]
    rows = RowRange.whole(256)
    with torch.profiler.profile(profile_memory=True) as profile:
        low = apply.project(grad, bases, geometry, rows)
        apply.write_back(weight, low, bases, geometry, rows, alpha=0.1, decay_factor=0.9)
    largest = max(event.cpu_memory_usage for event in profile.events())
    assert largest < 256 * 512 * 4 / 4
