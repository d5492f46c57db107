"""Pieces to work on: all of a tensor, in order, of a size that fits the device."""

from __future__ import annotations

from math import gcd

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lowrank.optimizers.engine import chunks
from lowrank.optimizers.engine.chunks import row_chunks, wide_dtype
from lowrank.optimizers.engine.geometry import RowRange


@given(
    rows=st.integers(0, 5000),
    width=st.integers(0, 3000),
    block=st.integers(1, 300),
    product=st.booleans(),
    entries=st.booleans(),
)
def test_pieces_follow_each_other(
    rows: int, width: int, block: int, product: bool, entries: bool
) -> None:
    # meta: nothing is allocated, and the size is a GPU's
    for device in ("cpu", "meta"):
        like = torch.empty(1, device=device).expand(rows, width)
        spans = list(row_chunks(like, product=product, block=block, entries=entries))
        assert [row for span in spans for row in range(span.start, span.stop)] == [*range(rows)]
        sizes = [span.stop - span.start for span in spans]
        assert all(size * max(1, width) % block == 0 for size in sizes[:-1])
        bound = chunks.ENTRY_ELEMENTS if entries else chunks.DEVICE_ELEMENTS
        if device == "cpu":
            bound = chunks.PRODUCT_ELEMENTS if product else chunks.CACHE_ELEMENTS
        least = block // gcd(block, max(1, width))
        assert all(size * width <= bound or size == least for size in sizes[:-1])
        # as few pieces as the bound and the block allow
        assert all((size + least) * width > bound for size in sizes[:-1])


def test_a_matrix_of_7b_on_a_gpu_takes_two_pieces() -> None:
    gate = torch.empty(11008, 4096, device="meta")
    assert len(list(row_chunks(gate))) == 2
    assert len(list(row_chunks(gate.mT))) == 2
    assert len(list(row_chunks(torch.empty(0, 3)))) == 0
    assert len(list(row_chunks(torch.empty(3, 0)))) == 1


def test_vectors_and_convolutions() -> None:
    assert list(row_chunks(torch.empty(5))) == [slice(0, 5)]
    kernel = torch.empty(64, 64, 8, 8)
    assert [span.stop for span in row_chunks(kernel)] == [64]
    assert [span.stop for span in row_chunks(kernel.expand(64, 64, 8, 8).repeat(2, 1, 1, 1))] == [
        64,
        128,
    ]


def test_parts_of_rows() -> None:
    held = RowRange(10, 20)
    assert held.part(slice(2, 5)) == RowRange(12, 15)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_wide(dtype: torch.dtype) -> None:
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    assert wide_dtype(dtype) == wide_dtype(torch.empty(1, dtype=dtype)) == wide
