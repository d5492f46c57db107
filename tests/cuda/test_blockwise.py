"""The block-wise 8-bit quantiser: maps, nearest codes, bounds, edge cases."""

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lowrank.cuda import blockwise as module
from lowrank.cuda import blockwise_bytes, dequantize_blockwise, dynamic_map, quantize_blockwise

SIGNS = pytest.mark.parametrize("signed", [True, False], ids=["signed", "unsigned"])


def sample(numel: int, signed: bool, seed: int = 0) -> Tensor:
    """Values over many decades, as moments are."""
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(numel, generator=generator)
    decades = torch.rand(numel, generator=generator) * 8 - 8
    values = values * 10.0**decades
    return values if signed else values.abs()


def distances(x: Tensor, codes: Tensor, absmax: Tensor, signed: bool, block: int) -> Tensor:
    ratio = normalised(x, absmax, block)
    return (ratio - dynamic_map(signed).double()[codes.reshape(-1).long()]).abs()


def normalised(x: Tensor, absmax: Tensor, block: int) -> Tensor:
    """`x / absmax` in fp32, as the quantiser computes it; then exact in fp64."""
    scale = absmax.repeat_interleave(block)[: x.numel()]
    return (x.reshape(-1).float() / torch.where(scale == 0, 1.0, scale)).double()


def brute_force_distances(ratio: Tensor, signed: bool) -> Tensor:
    values = dynamic_map(signed).double()[0 if signed else 1 :]  # its 0 is never chosen
    return torch.cat([(part[:, None] - values).abs().amin(1) for part in ratio.split(4096)])


@SIGNS
def test_map_is_sorted_distinct_and_covers_its_range(signed: bool) -> None:
    values = dynamic_map(signed)
    assert values.shape == (256,)
    assert values.dtype == torch.float32
    assert bool((values.diff() > 0).all())
    assert values[-1] == 1
    assert int((values == 0).sum()) == 1
    assert values[0] == (pytest.approx(-0.99296875) if signed else 0)


@SIGNS
def test_map_equals_bitsandbytes(signed: bool) -> None:
    functional = bitsandbytes_functional()
    assert torch.equal(dynamic_map(signed), functional.create_dynamic_map(signed).float())


@SIGNS
def test_map_is_cached_per_device(signed: bool) -> None:
    assert dynamic_map(signed) is dynamic_map(signed, torch.device("cpu"))


@SIGNS
def test_codes_agree_with_bitsandbytes_and_are_never_worse(signed: bool) -> None:
    # Its CPU kernel is not exactly nearest (it may be several codes off, mostly near zero), so
    # most codes must be equal and where they differ ours must be at least as near.
    functional = bitsandbytes_functional()
    x = torch.randn(256 * 500, generator=torch.Generator().manual_seed(3))
    x = x if signed else x.square()
    codes, absmax = quantize_blockwise(x, signed)
    theirs, state = functional.quantize_blockwise(
        x, code=functional.create_dynamic_map(signed), blocksize=256
    )
    assert torch.equal(state.absmax, absmax)
    assert (codes == theirs).float().mean() > 0.95
    ours = distances(x, codes, absmax, signed, 256)
    assert bool((ours <= distances(x, theirs, absmax, signed, 256)).all())
    back = functional.dequantize_blockwise(codes, state)
    assert torch.equal(back, dequantize_blockwise(codes, absmax, signed))


@SIGNS
def test_codes_are_nearest_by_brute_force(signed: bool) -> None:
    x = sample(20_000, signed)
    codes, absmax = quantize_blockwise(x, signed)
    best = brute_force_distances(normalised(x, absmax, 256), signed)
    assert torch.equal(distances(x, codes, absmax, signed, 256), best)


@SIGNS
def test_codes_are_nearest_on_both_sides_of_every_midpoint(signed: bool) -> None:
    # The code can only change at a midpoint or where the upper 16 bits change: with all of
    # these tried, and the code monotone between, every fp32 in [-1, 1] is covered.
    values = dynamic_map(signed).double()
    middle = ((values[1:] + values[:-1]) / 2).float()
    upper = torch.arange(0x3F80 + 1, dtype=torch.int32) << 16
    edges = torch.cat((upper, (upper[:-1] | 0xFFFF))).view(torch.float32)
    one = torch.ones(1)
    inside = torch.cat(
        (middle, torch.nextafter(middle, one), torch.nextafter(middle, -one), edges, values.float())
    )
    inside = torch.cat((inside, -inside)) if signed else inside[inside >= 0]
    # A block of one element per row would rescale it: give each its own block that holds 1.
    x = torch.stack((torch.ones_like(inside), inside), dim=1)
    codes, absmax = quantize_blockwise(x, signed, block=2)
    assert bool((absmax == 1).all())
    found = (inside.double() - values[codes[:, 1].long()]).abs()
    assert torch.equal(found, brute_force_distances(inside.double(), signed))
    assert bool((codes[:, 1][inside.argsort()].int().diff() >= 0).all())


@SIGNS
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_round_trip_error_is_bounded(signed: bool, dtype: torch.dtype) -> None:
    x = sample(10_000, signed).to(dtype)
    codes, absmax = quantize_blockwise(x, signed)
    back = dequantize_blockwise(codes, absmax, signed)
    scale = absmax.repeat_interleave(256)[: x.numel()]
    half_gap = 0.9 / 64 / 2 if signed else 0.9 / 128 / 2  # of the widest gap, in the top decade
    error = (back - x.float()).abs()
    assert bool((error <= half_gap * 1.0001 * scale).all())
    # The decades keep small elements precise relative to themselves, down to the seventh.
    ratio = x.float().abs() / scale
    middle = (ratio > 1e-3) & (ratio < 1)
    assert middle.sum() > 1000
    assert bool((error[middle] <= 0.3 * x.float().abs()[middle]).all())
    assert (error[middle] / x.float().abs()[middle]).mean() < 0.05


@SIGNS
def test_zero_blocks_stay_exact_zeros(signed: bool) -> None:
    x = torch.zeros(600)
    x[300] = 2.0
    codes, absmax = quantize_blockwise(x, signed)
    back = dequantize_blockwise(codes, absmax, signed)
    expected = x.clone()
    expected[256:512].clamp_(min=0.0 if signed else 2.0 * float(dynamic_map(False)[1]))
    assert torch.equal(back, expected)
    assert absmax.tolist() == [0.0, 2.0, 0.0]


def test_a_second_moment_is_never_rounded_to_zero() -> None:
    """Beside a first moment that isn't 0 it would be what a step is divided by."""
    x = torch.cat((torch.logspace(-30, 0, 200), torch.zeros(56), 2.0 ** torch.arange(-60.0, 1.0)))
    codes, _ = quantize_blockwise(x, signed=False, block=len(x))
    assert int(codes.min()) == 1


@SIGNS
def test_negative_zeros_and_denormals(signed: bool) -> None:
    x = torch.tensor([-0.0, 0.0, 1e-42, 3e-45])
    codes, absmax = quantize_blockwise(x, signed)
    back = dequantize_blockwise(codes, absmax, signed)
    assert torch.isfinite(back).all()
    assert bool((back == 0).all())  # no reciprocal of such an absmax is finite
    y = torch.tensor([-0.0, 2e-38, 1e-42])
    back = dequantize_blockwise(*quantize_blockwise(y, signed), signed)
    assert (back - y).abs().max() <= 0.05 * 2e-38


def test_unsigned_map_clips_negative_elements() -> None:
    codes, absmax = quantize_blockwise(torch.tensor([-1e-9, -1.0, -0.3, 0.5]), signed=False)
    assert codes[:3].tolist() == [0, 0, 0]
    assert dequantize_blockwise(codes, absmax, signed=False)[3] == pytest.approx(0.5, rel=0.01)


def test_most_negative_element_takes_the_lowest_code() -> None:
    codes, absmax = quantize_blockwise(torch.tensor([-2.0, 2.0]), signed=True)
    assert codes.tolist() == [0, 255]
    assert dequantize_blockwise(codes, absmax, True).tolist() == pytest.approx([-1.9859375, 2.0])


@SIGNS
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_non_finite_value_spoils_its_block_only(signed: bool, bad: float) -> None:
    x = sample(768, signed)
    x[300] = bad
    back = dequantize_blockwise(*quantize_blockwise(x, signed), signed)
    assert not back[256:512].isfinite().any()
    assert back[:256].isfinite().all()
    assert back[512:].isfinite().all()


@SIGNS
@pytest.mark.parametrize("numel", [0, 1, 255, 256, 257, 1000])
def test_shapes_with_partial_and_missing_blocks(signed: bool, numel: int) -> None:
    x = sample(numel, signed)
    codes, absmax = quantize_blockwise(x, signed)
    assert codes.shape == x.shape
    assert absmax.shape == (math.ceil(numel / 256),)
    assert codes.numel() + 4 * absmax.numel() == blockwise_bytes(numel)
    assert dequantize_blockwise(codes, absmax, signed).shape == x.shape


@SIGNS
def test_scalars_and_blocks_longer_than_the_tensor(signed: bool) -> None:
    codes, absmax = quantize_blockwise(torch.tensor(0.5), signed, block=4096)
    assert codes.shape == ()
    assert dequantize_blockwise(codes, absmax, signed, block=4096) == 0.5


@SIGNS
def test_non_contiguous_input_equals_its_copy(signed: bool) -> None:
    x = sample(64 * 48, signed).view(64, 48)
    for view in (x.t(), x[::2, ::3], x[:, 1:]):
        codes, absmax = quantize_blockwise(view, signed)
        expected_codes, expected_absmax = quantize_blockwise(view.contiguous(), signed)
        assert torch.equal(codes, expected_codes)
        assert torch.equal(absmax, expected_absmax)
        transposed = codes.t().contiguous().t()
        assert torch.equal(
            dequantize_blockwise(transposed, absmax, signed),
            dequantize_blockwise(codes, absmax, signed),
        )


@SIGNS
def test_chunking_changes_nothing(signed: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    x = sample(5000, signed)
    codes, absmax = quantize_blockwise(x, signed, block=64)
    back = dequantize_blockwise(codes, absmax, signed, block=64)
    monkeypatch.setattr(module, "_CPU_CHUNK", 200)
    small_codes, small_absmax = quantize_blockwise(x, signed, block=64)
    assert torch.equal(codes, small_codes)
    assert torch.equal(absmax, small_absmax)
    assert torch.equal(back, dequantize_blockwise(codes, absmax, signed, block=64))


def test_results_go_to_the_given_tensors() -> None:
    x = sample(700, True).view(70, 10)
    codes, absmax = torch.empty(70, 10, dtype=torch.uint8), torch.empty(3)
    written = quantize_blockwise(x, True, out=(codes, absmax))
    assert written[0] is codes
    assert written[1] is absmax
    back = torch.empty(70, 10, dtype=torch.bfloat16)
    assert dequantize_blockwise(codes, absmax, True, out=back) is back
    plain = dequantize_blockwise(*quantize_blockwise(x, True), True, dtype=torch.bfloat16)
    assert torch.equal(back, plain)


def test_gradients_do_not_flow_and_the_input_is_untouched() -> None:
    x = sample(300, True).requires_grad_()
    before = x.detach().clone()
    codes, absmax = quantize_blockwise(x, True)
    assert not absmax.requires_grad
    assert not dequantize_blockwise(codes, absmax, True).requires_grad
    assert torch.equal(x.detach(), before)


@settings(deadline=None, max_examples=50)
@given(
    values=st.lists(
        st.floats(width=32, allow_nan=False, allow_infinity=False), min_size=1, max_size=70
    ),
    block=st.integers(1, 40),
    signed=st.booleans(),
)
def test_any_finite_input_gets_its_nearest_code(
    values: list[float], block: int, signed: bool
) -> None:
    x = torch.tensor(values)
    x = torch.where(x.abs() < 2.0**-126, 0.0, x)  # blocks of these are stored as zeros
    x = x if signed else x.abs()
    codes, absmax = quantize_blockwise(x, signed, block)
    best = brute_force_distances(normalised(x, absmax, block), signed)
    assert torch.equal(distances(x, codes, absmax, signed, block), best)


@settings(deadline=None, max_examples=50)
@given(
    values=st.lists(st.floats(-(2.0**100), 2.0**100, width=32), min_size=1, max_size=70),
    power=st.integers(-20, 20),
)
def test_scaling_by_a_power_of_two_keeps_the_codes(values: list[float], power: int) -> None:
    x = torch.tensor(values)
    x = torch.where(x.abs() < 1e-25, 0.0, x)  # denormals would round when scaled
    codes, absmax = quantize_blockwise(x, True, 16)
    scaled, scaled_absmax = quantize_blockwise(x * 2.0**power, True, 16)
    assert torch.equal(codes, scaled)
    assert torch.equal(absmax * 2.0**power, scaled_absmax)


@SIGNS
def test_quantising_again_changes_nothing(signed: bool) -> None:
    # Only blocks whose absmax is reached by +absmax are fixed points: -1 is not in the map.
    x = sample(4096, signed)
    x[::256] = x.abs().amax() * 2
    codes, absmax = quantize_blockwise(x, signed)
    again, absmax_again = quantize_blockwise(dequantize_blockwise(codes, absmax, signed), signed)
    assert torch.equal(codes, again)
    assert torch.equal(absmax, absmax_again)


def test_blockwise_bytes() -> None:
    assert [blockwise_bytes(n) for n in (0, 1, 256, 257)] == [0, 5, 260, 265]
    assert blockwise_bytes(100, block=10) == 140


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: blockwise_bytes(-1), "numel is -1"),
        (lambda: blockwise_bytes(5, block=0), "block is 0"),
        (lambda: quantize_blockwise(torch.zeros(4, dtype=torch.int64), True), "int64"),
        (lambda: quantize_blockwise(torch.zeros(4), True, block=0), "block is 0"),
        (
            lambda: quantize_blockwise(
                torch.zeros(4), True, out=(torch.zeros(3, dtype=torch.uint8), torch.zeros(1))
            ),
            "out codes is",
        ),
        (
            lambda: quantize_blockwise(
                torch.zeros(4, 4),
                True,
                out=(torch.zeros(4, 4, dtype=torch.uint8).t()[:, :4], torch.zeros(1)),
            ),
            "must be contiguous",
        ),
        (lambda: dequantize_blockwise(torch.zeros(4), torch.zeros(1), True), "codes has dtype"),
        (
            lambda: dequantize_blockwise(torch.zeros(4, dtype=torch.uint8), torch.zeros(2), True),
            "absmax is",
        ),
        (
            lambda: dequantize_blockwise(
                torch.zeros(4, dtype=torch.uint8), torch.zeros(1), True, dtype=torch.int32
            ),
            "must be a floating dtype",
        ),
    ],
)
def test_mistakes_are_named(call: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()


def bitsandbytes_functional() -> Any:
    return pytest.importorskip("bitsandbytes.functional")
