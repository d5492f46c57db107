"""Group quantisation in eight and four bits."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support import hashed, matrix
from torch import Tensor

from lowrank.cuda import groups, int4
from lowrank.cuda.noise import mix, uniform

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def steps(scales: Tensor, group_size: int, count: int) -> Tensor:
    """The step of each entry's group."""
    return scales.double().repeat_interleave(group_size)[:count]


def test_golden_int4_numbers() -> None:
    """16 x 16, groups of 64: what q-galore-torch's formula gives (fp32)."""
    packed = int4.quantize_int4(matrix(16, 16, 5).float(), group_size=64)
    expected = torch.tensor([0.06574730, 0.06551354, 0.06641750, 0.06579207])
    torch.testing.assert_close(packed.scales, expected, rtol=1e-6, atol=0)
    assert packed.zeros is not None
    assert packed.zeros.tolist() == [8.0] * 4
    codes = int4.unpack(packed.codes, 256)
    assert codes[:8].tolist() == [3, 2, 13, 3, 3, 11, 15, 11]
    assert int(codes.sum()) == 2094
    assert packed.codes.numel() == 128


@given(st.lists(st.integers(0, 15), max_size=70))
@settings(max_examples=100, deadline=None)
def test_pack_and_unpack(values: list[int]) -> None:
    codes = torch.tensor(values, dtype=torch.uint8)
    packed = int4.pack(codes)
    assert packed.numel() == (len(values) + 1) // 2
    assert torch.equal(int4.unpack(packed, len(values)), codes)
    for i, byte in enumerate(packed.tolist()):
        assert byte & 15 == values[2 * i]
        assert byte >> 4 == (values[2 * i + 1] if 2 * i + 1 < len(values) else 0)


@given(st.integers(1, 400), st.integers(1, 70), st.integers(0, 10**6), st.sampled_from([15, 255]))
@settings(max_examples=80, deadline=None)
def test_error_is_at_most_half_a_step(count: int, group: int, stream: int, levels: int) -> None:
    x = (hashed(count, stream) + 0.4 * hashed(1, stream + 1)).float()
    codes, scales, zeros = groups.quantize_groups(x, levels, group)
    assert codes.shape == x.shape
    assert scales.shape == zeros.shape == (groups.group_count(count, group),)
    assert int(codes.max()) <= levels
    back = groups.dequantize_groups(codes, scales, zeros, group)
    # Both ends of the range and the zero point are rounded, each to half a step.
    assert ((back - x).abs().double() <= 1.001 * steps(scales, group, count)).all()
    zero = x == 0
    assert (back[zero] == 0).all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("low", [0.5, -1.5, 0.0, -0.25])
def test_zero_lies_in_every_range(dtype: torch.dtype, low: float) -> None:
    """A group in [0.5, 1.5] keeps its values; the released code is 0.5 off."""
    x = (low + torch.rand(1000)).to(dtype)
    codes, scales, zeros = groups.quantize_groups(x, 255, 256)
    back = groups.dequantize_groups(codes, scales, zeros, 256)
    assert back.dtype == dtype
    own = torch.finfo(dtype).eps * x.abs().double()
    assert ((back.double() - x.double()).abs() <= 1.01 * steps(scales, 256, 1000) + own).all()
    # zero itself is a code of each group
    at_zero = groups.dequantize_groups(zeros.to(torch.uint8), scales, zeros, 1)
    assert (at_zero == 0).all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_zeros_and_tiny_groups(dtype: torch.dtype) -> None:
    x = torch.zeros(300, dtype=dtype)
    x[256:] = 1e-7
    codes, scales, zeros = groups.quantize_groups(x, 255, 256)
    back = groups.dequantize_groups(codes, scales, zeros, 256)
    assert (back[:256] == 0).all()
    assert back.isfinite().all()
    assert (scales > 0).all()


def test_half_precision_scales_cover_the_range() -> None:
    x = hashed(256 * 50, 3).float()
    codes, scales, zeros = groups.quantize_groups(x, 255, 256, dtype=torch.bfloat16)
    ranges = x.view(50, 256).amax(1) - x.view(50, 256).amin(1)
    assert (scales.float() * 255 >= ranges).all()
    back = groups.dequantize_groups(codes, scales, zeros, 256, dtype=torch.float32)
    assert ((back - x).abs() <= 1.001 * steps(scales, 256, len(x))).all()


def test_stochastic_rounding_is_unbiased_seeded_and_free_of_chunks(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    x = (0.1 * hashed(1000, 1)).float()
    draws = []
    for seed in range(600):
        parts = groups.quantize_groups(x, 255, 100, seed=mix(seed))
        draws.append(groups.dequantize_groups(*parts, 100).double())
    step = steps(parts[1], 100, 1000)
    error = (torch.stack(draws).mean(0) - x) / step
    inner = ~((parts[0] == 0) | (parts[0] == 255))  # the ends of a range are clamped
    assert error[inner].abs().max() < 5 * 0.5 / 600**0.5
    assert error.abs().max() <= 0.5 + 1e-3
    by_hand = torch.floor(x / parts[1].repeat_interleave(100) + uniform(1000, mix(599)))
    expected = (by_hand + parts[2].repeat_interleave(100)).clamp(0, 255)
    assert torch.equal(expected.to(torch.uint8), parts[0])
    monkeypatch.setattr(groups, "_CPU_CHUNK", 200)
    again = groups.quantize_groups(x, 255, 100, seed=mix(599))
    assert all(torch.equal(a, b) for a, b in zip(parts, again, strict=True))
    second = groups.quantize_groups(x[500:], 255, 100, seed=mix(599), first=500)
    assert torch.equal(second[0], parts[0][500:])


@pytest.mark.parametrize("format", int4.FORMATS)
@pytest.mark.parametrize("group", [1, 7, 64, 256])
@pytest.mark.parametrize("count", [1, 63, 64, 1001])
def test_int4_formats(format: str, group: int, count: int, monkeypatch: pytest.MonkeyPatch) -> None:
    x = hashed(count, 9).float()
    packed = int4.quantize_int4(x, format, group)
    stored = sum(t.nbytes for t in packed if t is not None)
    per_group = 2 if format == "asymmetric" else 1
    assert stored == groups.group_bytes(count, 4, group, 4, per_group)
    back = int4.dequantize_int4(packed, count, format, group)
    clipped = {"asymmetric": 1.001, "midrise": 15 / 2 / 0.85 - 7, "nf4": 0.153}[format]
    assert ((back - x).abs() <= clipped * steps(packed.scales, group, count)).all()
    monkeypatch.setattr(groups, "_CPU_CHUNK", 30)
    again = int4.quantize_int4(x, format, group)
    assert torch.equal(again.codes, packed.codes)
    assert torch.equal(int4.dequantize_int4(packed, count, format, group), back)


def test_int4_errors_on_a_singular_basis_are_the_stated_ones() -> None:
    basis = torch.linalg.qr(torch.randn(1024, 128))[0]
    expected = {"asymmetric": 0.109, "midrise": 0.106, "nf4": 0.0986}
    for format, error in expected.items():
        packed = int4.quantize_int4(basis.T, format)
        back = int4.dequantize_int4(packed, basis.numel(), format).view(128, 1024).T
        relative = float((back - basis).norm() / basis.norm())
        assert relative == pytest.approx(error, rel=0.04)


def test_nf4_values() -> None:
    values = int4.nf4_values()
    assert values.numel() == 16
    assert (values.diff() > 0).all()
    assert values[[0, 7, 15]].tolist() == [-1, 0, 1]
    assert float(values[8]) == pytest.approx(0.0795803, abs=1e-6)
    assert float(values[1]) == pytest.approx(-0.6961928, abs=1e-6)


def test_what_is_not_accepted() -> None:
    with pytest.raises(ValueError, match=r"torch.int64"):
        groups.quantize_groups(torch.arange(4))
    with pytest.raises(ValueError, match="group_size is 0"):
        groups.quantize_groups(torch.ones(4), group_size=0)
    with pytest.raises(ValueError, match=r"'int3'.*'nf4'"):
        int4.quantize_int4(torch.ones(4), "int3")
