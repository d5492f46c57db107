"""Normal numbers from a seed and a position."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lowrank.cuda import fill_gaussian, gaussian, rademacher, using_kernels
from lowrank.cuda.noise import mix, signed_seed
from lowrank.cuda.normal import normals
from lowrank.cuda.philox import NORMALS, words

COUNT = 1 << 21
#: Patterns of entries 3 to 8 under the seed 12345.
GOLDEN = [1044033324, 1063684139, 1053157301, 1065367636, 1060777471, -1088432960]
KERNELS = pytest.mark.parametrize("kernels", ["native", "torch"])


@pytest.fixture(scope="module")
def sample() -> Tensor:
    return gaussian((COUNT,), mix(2024, "test"), torch.float64)


def in_exact_arithmetic(words_4k: Tensor) -> Tensor:
    """Box-Muller of the same bits in fp64; u is rounded to fp32 as it is there."""
    made = []
    for column in words_4k.mT.tolist():
        for radius, angle in (column[:2], column[2:]):
            k = torch.tensor(radius >> 1).float() + 0.5
            length = math.sqrt(-2 * math.log(float(k) / 2**31))
            turn = math.pi * (angle - 2**31) / 2**32
            sign = -1 if radius & 1 else 1
            made += [sign * length * math.cos(turn), length * math.sin(turn)]
    return torch.tensor(made, dtype=torch.float64)


@KERNELS
def test_golden_numbers(kernels: str) -> None:
    with using_kernels(kernels):
        made = gaussian((6,), 12345, first=3)
    patterns = made.view(torch.int32).tolist()
    assert patterns == GOLDEN


def test_they_are_the_formula() -> None:
    bits = words(0, 5000, NORMALS, 77, torch.device("cpu"))
    exact = in_exact_arithmetic(bits)
    assert float((normals(bits).double() - exact).abs().max()) < 2e-6
    assert torch.equal(normals(bits), gaussian((20_000,), 77))


def test_the_ends_of_the_bits_range() -> None:
    ends = [0, 1, 2, 3, (1 << 31) - 1, 1 << 31, (1 << 32) - 2, (1 << 32) - 1]
    bits = torch.tensor([(a, b, b, a) for a in ends for b in ends]).mT.contiguous()
    made = normals(bits)
    assert bool(made.isfinite().all())
    assert float((made.double() - in_exact_arithmetic(bits)).abs().max()) < 2e-6
    assert float(made.abs().max()) == pytest.approx(math.sqrt(2 * 32 * math.log(2)), rel=1e-6)


def test_moments(sample: Tensor) -> None:
    exact = {1: 0.0, 2: 1.0, 3: 0.0, 4: 3.0, 5: 0.0, 6: 15.0}
    # Variances of the powers are E x^(2 k) - (E x^k)^2.
    spread = {1: 1.0, 2: 2.0, 3: 15.0, 4: 96.0, 5: 945.0, 6: 10170.0}
    for power, value in exact.items():
        found = float(sample.pow(power).mean())
        assert abs(found - value) < 4 * (spread[power] / COUNT) ** 0.5, power


def test_kolmogorov_smirnov(sample: Tensor) -> None:
    ordered = sample.sort()[0]
    expected = torch.special.ndtr(ordered)
    rank = torch.arange(COUNT + 1, dtype=torch.float64) / COUNT
    distance = max(float((rank[1:] - expected).max()), float((expected - rank[:-1]).max()))
    assert distance < 1.63 / COUNT**0.5  # 1 % of samples are farther


def test_tails(sample: Tensor) -> None:
    for sigmas in (3.0, 4.0, 4.5):
        share = math.erfc(sigmas / 2**0.5)
        found = int((sample.abs() > sigmas).sum())
        assert abs(found - share * COUNT) < 4 * (share * COUNT) ** 0.5 + 1, sigmas
    assert float(sample.abs().max()) > 4.5


def test_neighbours_seeds_and_signs_are_independent(sample: Tensor) -> None:
    limit = 4.5 / COUNT**0.5

    def correlation(x: Tensor, y: Tensor) -> float:
        return float(torch.corrcoef(torch.stack((x, y)))[0, 1])

    for lag in (1, 2, 3, 4, 8, 1024):
        ahead, behind = sample[lag:], sample[:-lag]
        assert abs(correlation(ahead, behind)) < limit
        assert abs(correlation(ahead.square(), behind.square())) < limit
        assert abs(correlation(ahead.abs(), behind)) < limit
    for other in (gaussian((COUNT,), 1), rademacher((COUNT,), mix(2024, "test"))):
        assert abs(correlation(sample, other.double())) < limit


@KERNELS
@given(start=st.integers(0, 700), length=st.integers(0, 700), seed=st.integers(-5, (1 << 64) + 5))
@settings(max_examples=40, deadline=None)
def test_a_part_is_a_part_of_the_whole(start: int, length: int, seed: int, kernels: str) -> None:
    with using_kernels(kernels):
        whole = gaussian((1400,), seed)
        assert torch.equal(gaussian((length,), seed, first=start), whole[start : start + length])
        rows = gaussian((35, 40), seed)
        assert torch.equal(rows.view(-1), whole)
        assert torch.equal(gaussian((3, 40), seed, first=7 * 40), rows[7:10])


@KERNELS
def test_chunks_do_not_matter(kernels: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lowrank.cuda.normal._CPU_CHUNK", 5)
    with using_kernels("torch"):
        pieces = gaussian((1003,), 3, first=2)
    monkeypatch.undo()
    with using_kernels(kernels):
        assert torch.equal(gaussian((1003,), 3, first=2), pieces)


@KERNELS
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_other_types_are_casts(dtype: torch.dtype, kernels: str) -> None:
    with using_kernels(kernels):
        assert torch.equal(gaussian((999,), 5, dtype), gaussian((999,), 5).to(dtype))


@KERNELS
def test_a_seed_in_a_tensor(kernels: str) -> None:
    seed = torch.tensor(-17)
    with using_kernels(kernels):
        assert torch.equal(gaussian((50,), seed), gaussian((50,), -17))
        assert torch.equal(gaussian((50,), seed), gaussian((50,), (1 << 64) - 17))
        seed.fill_(mix(1, 2) >> 1)  # as between two replays of a graph
        assert torch.equal(gaussian((50,), seed), gaussian((50,), mix(1, 2) >> 1))


@KERNELS
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("on_device", [False, True])
def test_a_list_has_the_numbers_of_each(dtype: torch.dtype, on_device: bool, kernels: str) -> None:
    """Scaled in fp32 and then cast, as a basis that is drawn by itself."""
    shapes, scale = [(30, 7), (1, 1), (5, 129)] * 6, 7**-0.5
    numbers = [mix(3, i) for i in range(len(shapes))]
    seeds = [torch.tensor(signed_seed(n)) for n in numbers] if on_device else numbers
    outs = [torch.full(shape, torch.nan, dtype=dtype) for shape in shapes]
    with using_kernels(kernels):
        fill_gaussian(outs, seeds, scale)
        for shape, number, out in zip(shapes, numbers, outs, strict=True):
            wide = torch.promote_types(dtype, torch.float32)
            assert torch.equal(out, gaussian(shape, number, wide).mul_(scale).to(dtype))
        fill_gaussian([], [])


@pytest.mark.parametrize(
    ("outs", "seeds", "message"),
    [
        ([torch.zeros(3), torch.zeros(3).bfloat16()], [1, 2], "one floating dtype.*torch.bfloat16"),
        ([torch.zeros(3, dtype=torch.int64)], [1], "one floating dtype.*torch.int64"),
        ([torch.zeros(4, 3).mT], [1], "must be contiguous"),
        ([torch.zeros(3)] * 2, [1], "2 tensors with 1 seeds"),
        ([torch.zeros(3)] * 2, [1, torch.tensor(2)], "of which 1 are tensors"),
        ([torch.zeros(3)], [torch.tensor(1.0)], r"tensor \(\) torch.float32 on cpu"),
    ],
)
def test_lists_that_are_not_accepted(outs: list[Tensor], seeds: Any, message: str) -> None:
    before = [out.clone() for out in outs]
    with pytest.raises(ValueError, match=message):
        fill_gaussian(outs, seeds)
    assert all(map(torch.equal, outs, before))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dtype": torch.int64}, "dtype is torch.int64"),
        ({"first": -1}, "first is -1"),
        ({"seed": torch.tensor(1.0)}, r"tensor \(\) torch.float32 on cpu"),
        ({"seed": torch.tensor([1, 2])}, r"tensor \(2,\) torch.int64"),
        ({"seed": torch.tensor(1), "device": "meta"}, "on cpu; it must have one entry.*on meta"),
    ],
)
def test_what_is_not_accepted(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        gaussian(**({"shape": (3,), "seed": 1} | options))
