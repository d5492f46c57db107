"""Random numbers from a seed and a position."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lowrank.cuda.noise import mix, random_bits, stochastic_bfloat16, uniform

MASK = (1 << 32) - 1


def by_hand(position: int, seed: int) -> int:
    """The hash in Python's integers."""
    x = (position * 0x9E3779B1 + (seed & MASK)) & MASK
    x ^= x >> 16
    x = x * 0x7FEB352D & MASK
    x ^= x >> 15
    x = (x ^ (seed >> 32)) * 0x846CA68B & MASK
    return x ^ (x >> 16)


@given(st.integers(0, (1 << 64) - 1), st.integers(0, (1 << 34)), st.integers(0, 70))
@settings(max_examples=100, deadline=None)
def test_bits_are_the_hash_of_each_position(seed: int, first: int, count: int) -> None:
    bits = random_bits(count, seed, first).tolist()
    assert [bit & MASK for bit in bits] == [by_hand(first + i, seed) for i in range(count)]


@given(st.integers(1, 300), st.integers(0, 299))
@settings(max_examples=50, deadline=None)
def test_chunks_do_not_matter(count: int, cut: int) -> None:
    cut = min(cut, count)
    whole = uniform(count, mix(3, 4))
    parts = torch.cat((uniform(cut, mix(3, 4)), uniform(count - cut, mix(3, 4), cut)))
    assert torch.equal(whole, parts)


def test_uniform_looks_uniform_and_independent() -> None:
    count = 1 << 18
    a, b = uniform(count, mix(0, 1, 2)), uniform(count, mix(0, 2, 2))
    assert 0 <= a.min() < a.max() < 1
    tolerance = 5 / count**0.5
    for u in (a, b):
        assert float(u.mean()) == pytest.approx(0.5, abs=tolerance)
        assert float(u.var()) == pytest.approx(1 / 12, abs=tolerance)
        histogram = torch.histc(u, 64, 0, 1) / count * 64
        assert (histogram - 1).abs().max() < 0.1
    for x, y in ((a, b), (a[1:], a[:-1]), (a[320:], a[:-320])):
        correlation = torch.corrcoef(torch.stack((x, y)))[0, 1]
        assert abs(float(correlation)) < tolerance


def test_mix_depends_on_every_value_and_their_order() -> None:
    seeds = {mix(a, b, c) for a in range(8) for b in range(8) for c in range(-4, 4)}
    assert len(seeds) == 8 * 8 * 8
    assert mix(1, 2) != mix(2, 1)
    assert all(0 <= seed < 1 << 64 for seed in seeds)


@pytest.mark.parametrize(
    ("parts", "expected"),
    [
        ((0,), 0xE220A8397B1DCDAF),
        ((1, 2, 3), 0x6AE515C1C0AC7E37),
        ((-1, 5), 0x3562133A936C2870),
        (((1 << 70) + 3, 1), 0xBCA402F674DDD08D),
        ((0, "model.layers.0.self_attn.q_proj.weight"), 0xC5F3810755374839),
        ((0, ""), 0xF99D1EED24B4C8D5),
        ((0, "\u00fc", 4), 0x5CA407FC47FCC687),
    ],
)
def test_golden_seeds(parts: tuple[Any, ...], expected: int) -> None:
    """The same in every process: a resumed run draws what the first one drew."""
    assert mix(*parts) == expected


def test_names_give_seeds_of_their_own() -> None:
    names = [f"layers.{i}.{j}" for i in range(30) for j in ("q", "k")]
    assert len({mix(3, name) for name in names} | {mix(3, i) for i in range(60)}) == 120


@pytest.mark.parametrize("part", [1.5, None, b"head", torch.tensor(1.0)], ids=repr)
def test_other_parts_of_a_seed_are_refused(part: Any) -> None:
    with pytest.raises(TypeError, match="accepted are int and str"):
        mix(0, part)


def test_bfloat16_rounding_keeps_the_mean_and_exact_numbers() -> None:
    x = torch.tensor([1.0 + 2**-9, -3.1416, 1e-30, 0.0, -0.0, 2.5, float("inf"), float("nan")])
    rounded = torch.stack([stochastic_bfloat16(x, mix(i)).float() for i in range(4000)])
    for i in range(3):
        ulp = float(rounded[:, i].max() - rounded[:, i].min())
        assert ulp <= abs(float(x[i])) * 2**-7
        assert float(rounded[:, i].mean()) == pytest.approx(float(x[i]), abs=ulp * 0.05)
    assert torch.equal(rounded[:, 3:6], x[3:6].expand(4000, 3))
    assert (rounded[:, 6] == torch.inf).all()
    assert rounded[:, 7].isnan().all()
