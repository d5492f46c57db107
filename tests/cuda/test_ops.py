"""The operations as torch sees them: schemas, fakes, tracing, and what they refuse."""

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from samples import SIZE, cloned, samples

from lowrank.cuda import library, ops, rademacher, status, using_kernels
from lowrank.cuda.philox import philox


def test_every_operation_has_a_sample() -> None:
    assert samples().keys() == ops.OPERATIONS.keys()


@pytest.mark.parametrize("kernels", ["native", "torch"])
@pytest.mark.parametrize("name", list(ops.OPERATIONS))
def test_opcheck(name: str, kernels: str) -> None:
    operation = getattr(torch.ops.lowrank, name).default
    with using_kernels(kernels):
        torch.library.opcheck(operation, tuple(map(cloned, samples()[name])))


@pytest.mark.skipif(status("host").library is None, reason="the host's library is not compiled")
@pytest.mark.parametrize(
    ("name", "position", "wrong", "message"),
    [
        ("quantize_blockwise", 1, torch.zeros(SIZE - 1, dtype=torch.uint8), "codes has 599"),
        ("quantize_blockwise", 2, torch.zeros(2), "absmax has 2 entries"),
        ("dequantize_blockwise", 1, torch.zeros(3, dtype=torch.bfloat16), "torch.bfloat16"),
        ("quantize_groups", 3, torch.zeros(4), "zeros has 4 entries"),
        ("dequantize_int4", 0, torch.zeros(299, dtype=torch.uint8), "codes has 299"),
        ("stochastic_bfloat16", 1, torch.zeros(SIZE + 1, dtype=torch.bfloat16), "out has 601"),
        ("stochastic_bfloat16", 4, torch.zeros(2, dtype=torch.int64), "device_seed has 2"),
        ("step_seeds", 1, [5], "2 step counts have 1 states"),
        ("step_seeds", 3, torch.zeros(2), "seeds has 2 entries of torch.float32"),
        ("adam", 1, [torch.zeros(SIZE - 1)], "state or direction has 599"),
        ("adam_8bit", 2, [torch.zeros(2)], "absmax has 2"),
        ("adam_8bit", 10, torch.ones(3), "sizes has 3 entries"),
        ("write_back", 1, torch.zeros(20, 29), "direction has 580"),
        ("write_back", 3, torch.zeros(3, 30), r"factors are \(3, 30\)"),
        ("write_back", 3, None, "grad without factors"),
        ("write_back", 8, torch.zeros(3), "sizes has 3"),
        ("write_back_int8", 12, torch.zeros(1), "device_seed has 1 entries of torch.float32"),
        ("dequantize_groups_list", 0, [torch.zeros(9, dtype=torch.uint8)] * 2, "codes has 9"),
        ("dequantize_int4_list", 1, [torch.ones(2)] * 2, "scales has 2"),
        ("gaussian_list", 1, [5], "2 tensors have 1 seeds"),
        ("gaussian_list", 2, [torch.zeros(2, dtype=torch.int64)] * 2, "device_seeds has 2"),
        ("limit_growth", 1, torch.zeros(3), "norms has 3"),
        ("limit_growth", 2, torch.tensor([1, 0]), "torch.int64"),
        ("write_back_list", 2, [torch.ones(3, 30)], r"factors are \(3, 30\)"),
        ("write_back_list", 1, [torch.zeros(20, 29)], "grad has 580"),
        ("write_back_int8", 1, torch.zeros(2), "scales has 2"),
        ("write_back_int4", 0, torch.zeros(299, dtype=torch.uint8), "codes has 299"),
        ("write_back_int4", 1, torch.zeros(2), "scales has 2"),
        ("write_back_int4", 14, torch.zeros(1), "device_turn has 1 entries of torch.float32"),
    ],
)
def test_buffers_that_do_not_fit_are_refused(
    name: str, position: int, wrong: Any, message: str
) -> None:
    arguments = list(samples()[name])
    arguments[position] = wrong
    with using_kernels("native"), pytest.raises(ValueError, match=message):
        getattr(torch.ops.lowrank, name)(*arguments)


def test_a_compiled_function_calls_them() -> None:
    def double(x: torch.Tensor) -> torch.Tensor:
        out = torch.empty_like(x, dtype=torch.bfloat16)
        torch.ops.lowrank.stochastic_bfloat16(x, out, 3, 0)
        return out.float() * 2

    x = torch.randn(300)
    torch.testing.assert_close(torch.compile(double, fullgraph=True)(x), double(x))


def test_philox_known_answers() -> None:
    """The vectors that come with the generator's publication (philox4x32, 10 rounds)."""
    ones = (1 << 32) - 1
    counters = torch.tensor([[0] * 4, [ones] * 4, [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344]])
    keys = (0, (1 << 64) - 1, 0x299F31D0A4093822)
    expected = (
        (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8),
        (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    )
    for counter, key, words in zip(counters, keys, expected, strict=True):
        assert philox(counter.unsqueeze(1), key)[:, 0].tolist() == list(words)


@settings(deadline=None)
@given(seed=st.integers(0, (1 << 64) - 1), start=st.integers(0, 3000))
def test_signs_depend_on_their_position_alone(seed: int, start: int) -> None:
    long = rademacher((4096,), seed)
    assert set(long.unique().tolist()) == {-1.0, 1.0}
    assert torch.equal(rademacher((64, 32), seed).view(-1), long[:2048])
    assert abs(float(long.mean())) < 0.1
    assert not torch.equal(long[start : start + 1000], rademacher((1000,), seed + 1))


def test_the_interface_version_is_checked(monkeypatch: pytest.MonkeyPatch) -> None:
    found = status("host").library
    if found is None:
        pytest.skip("the host's library is not compiled")
    own = library.ABI
    monkeypatch.setattr(library, "ABI", 999)
    with pytest.raises(ImportError, match=f"has interface {own}, this package needs 999"):
        library.Library(found.path, "cpu")
