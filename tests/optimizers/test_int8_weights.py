"""INT8 weights as parameters: what a training loop sees of them, and what an optimizer edits."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support import hashed, matrix
from torch import Tensor, nn
from torch.nn import functional

from lowrank.cuda import groups
from lowrank.optimizers import AdamW8bit, Int8Weight, QuantizedWeight
from lowrank.optimizers.engine import chunks
from lowrank.optimizers.engine.geometry import RowRange
from lowrank.optimizers.weights import editable_rows

NAME = "qgalore_adamw_8bit"
DTYPES = (torch.float32, torch.bfloat16)


def parameter(m: int, n: int, group: int = 256, dtype: torch.dtype = torch.float32) -> nn.Parameter:
    return nn.Parameter(Int8Weight.quantize((0.2 * matrix(m, n, 0)).to(dtype), group))


def same(first: Tensor, second: Tensor) -> bool:
    assert isinstance(first, QuantizedWeight)
    assert isinstance(second, QuantizedWeight)
    return all(torch.equal(a, b) for a, b in zip(first.parts(), second.parts(), strict=True))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_it_looks_like_the_parameter_it_stands_for(dtype: torch.dtype) -> None:
    weight = parameter(6, 50, 64, dtype)
    assert isinstance(weight, nn.Parameter)
    assert isinstance(weight, Int8Weight)
    assert (weight.shape, weight.dtype, weight.is_leaf) == ((6, 50), dtype, True)
    assert weight.requires_grad
    assert weight.element_size() == dtype.itemsize
    assert weight.nbytes == 300 + 2 * 5 * dtype.itemsize  # the last group has 44 entries
    assert "Int8Weight" in repr(weight)
    assert torch.equal(weight, weight.dequantize())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(5, 7), (2, 3, 7), (7,)], ids=str)
def test_linear_is_the_dense_layers(dtype: torch.dtype, bias: bool, shape: tuple[int, ...]) -> None:
    dense = nn.Linear(7, 4, bias=bias, dtype=dtype)
    layer = nn.Linear(7, 4, bias=bias, dtype=dtype)
    layer.weight = nn.Parameter(Int8Weight.quantize(dense.weight, 10))
    with torch.no_grad():
        dense.weight.copy_(layer.weight)
        if bias:
            layer.bias.copy_(dense.bias)
    results = []
    for module in (layer, dense):
        x = hashed(torch.Size(shape).numel(), 3).view(shape).to(dtype).requires_grad_()
        y = module(x)
        y.float().square().sum().backward()
        results.append((y.detach(), x.grad, module.weight.grad, module.bias.grad if bias else x))
    for ours, theirs in zip(*results, strict=True):
        assert type(ours) is type(theirs)
        torch.testing.assert_close(ours, theirs)


def test_linear_under_autocast_is_the_dense_layers() -> None:
    layer, dense = nn.Linear(7, 4), nn.Linear(7, 4)
    layer.weight = nn.Parameter(Int8Weight.quantize(layer.weight))
    dense.load_state_dict({"weight": layer.weight.dequantize(), "bias": layer.bias})
    results = []
    for module in (layer, dense):
        x = hashed(21, 3).view(3, 7).float().requires_grad_()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            y = module(x)
        assert y.dtype == torch.bfloat16
        y.float().square().sum().backward()
        assert module.weight.grad.dtype == torch.float32
        results.append((y.detach(), x.grad, module.weight.grad, module.bias.grad))
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=2e-2, atol=1e-2)


@torch.no_grad()
def copy_double(weight: Tensor) -> None:
    weight.copy_(weight.dequantize() * 2)


def edit_double(weight: Tensor) -> None:
    for chunk, _ in editable_rows(weight, RowRange.whole(len(weight))):
        chunk.mul_(2)


def test_nothing_dense_is_kept_for_the_backward_pass() -> None:
    weight = parameter(64, 32)
    x = torch.randn(3, 32)
    saved: list[Tensor] = []

    def keep(tensor: Tensor) -> Tensor:
        saved.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        y = functional.linear(x, weight)
    assert sum(tensor.nbytes for tensor in saved) == x.nbytes + weight.nbytes
    y.sum().backward()
    # as for any parameter, changing it between the passes is an error
    for change in (copy_double, edit_double):
        y = functional.linear(x, weight)
        change(weight)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            y.sum().backward()


def test_frozen_weight_passes_gradients_on() -> None:
    weight = parameter(4, 7).requires_grad_(False)
    x = torch.randn(3, 7, requires_grad=True)
    functional.linear(x, weight).sum().backward()
    torch.testing.assert_close(x.grad, weight.dequantize().sum(0).expand(3, 7))
    assert weight.grad is None


def test_other_operations_are_those_of_the_dense_weight() -> None:
    weight = parameter(6, 7)
    dense = nn.Parameter(weight.dequantize())
    for operand in (weight, dense):
        ((operand.t() @ torch.ones(6, 2)).square().sum() + operand.abs().sum()).backward()
    torch.testing.assert_close(weight.grad, dense.grad)
    assert type(weight.grad) is Tensor
    assert torch.equal(weight + 1, dense + 1)
    assert type(torch.zeros_like(weight)) is Tensor
    assert torch.equal(weight[2:, 1], dense[2:, 1])


IN_PLACE: dict[str, Any] = {
    "add_": lambda w: w.add_(1),
    "mul_ of data": lambda w: w.data.mul_(2),
    "zero_": lambda w: w.zero_(),
    "foreach": lambda w: torch._foreach_add_([torch.ones(6, 7), w], 1.0),
    "init": lambda w: nn.init.normal_(w),
    "out": lambda w: torch.add(w.dequantize(), 1, out=w.detach()),
    "torch.optim": lambda w: torch.optim.SGD([w], lr=0.1).step(),
}


@pytest.mark.parametrize("name", list(IN_PLACE))
def test_in_place_operations_raise(name: str) -> None:
    weight = parameter(6, 7)
    weight.grad = torch.ones(6, 7)
    before = weight.detach().clone()
    with pytest.raises(ValueError, match="merge"), torch.no_grad():
        IN_PLACE[name](weight)
    assert same(before, weight)


def test_copy_and_data_write() -> None:
    weight, dense = parameter(6, 50, 64), (0.1 * matrix(6, 50, 4)).float()
    expected = Int8Weight.quantize(dense, 64)
    with torch.no_grad():
        weight.copy_(dense)
    assert same(weight, expected)
    weight.data = torch.zeros(6, 50)
    assert (weight.dequantize() == 0).all()
    weight.data = expected
    assert same(weight, expected)
    with torch.no_grad():
        dense.copy_(weight)
    assert torch.equal(dense, expected.dequantize())
    with torch.no_grad():
        weight.copy_(0.5 * torch.ones(50))  # broadcasts
    torch.testing.assert_close(weight.dequantize(), torch.full((6, 50), 0.5))
    with pytest.raises(ValueError, match=r"module\.to"):
        weight.data = torch.zeros(6, 50, dtype=torch.bfloat16)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_writing_back_what_was_read_changes_nothing(dtype: torch.dtype) -> None:
    """As DDP does with rank 0's weights; after training, ranges are not those of fresh codes."""
    weight = parameter(30, 50, 64, dtype)
    for seed in range(3):
        for chunk, _ in editable_rows(weight, RowRange.whole(30), seed):
            chunk.add_(0.01 * torch.randn(chunk.shape))
    before = weight.detach().clone()
    with torch.no_grad():
        weight.copy_(weight.dequantize())
    assert same(before, weight)


# Rows


@given(
    st.integers(1, 40), st.integers(1, 40), st.integers(1, 300), st.integers(1, 500), st.booleans()
)
@settings(max_examples=60, deadline=None)
def test_editable_rows(m: int, n: int, group: int, elements: int, half: bool) -> None:
    """Chunks cover the rows, begin between groups, and edits arrive to within a step."""
    weight = parameter(m, n, group, torch.bfloat16 if half else torch.float32)
    start = weight.dequantize(torch.float32)
    untouched = weight.detach().clone()
    change = (0.05 * matrix(m, n, 9)).float()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(groups, "_CPU_CHUNK", elements)
        seen = 0
        for chunk, span in editable_rows(weight, RowRange(5, 5 + m), 1):
            assert chunk.dtype == torch.float32
            assert (span.start - 5) * n % group == 0
            assert span.start - 5 == seen
            seen = span.stop - 5
            assert torch.equal(chunk, start[span.start - 5 : seen])
        assert seen == m
        assert same(untouched, weight)  # what was not edited is not requantised
        for chunk, span in editable_rows(weight, RowRange.whole(m), 2):
            chunk.add_(change[span.start : span.stop])
    steps = weight.scales.float().repeat_interleave(group)[: m * n].view(m, n)
    error = (weight.dequantize(torch.float32) - start - change).abs()
    assert (error <= 1.51 * steps + 1e-7).all()
    whole = nn.Parameter(untouched)
    for chunk, span in editable_rows(whole, RowRange.whole(m), 2):
        chunk.add_(change[span.start : span.stop])
    assert same(whole, weight)  # the noise does not know of chunks


def test_only_edited_groups_are_requantised() -> None:
    weight = parameter(8, 64, 64)
    before = weight.detach().clone()
    for chunk, _ in editable_rows(weight, RowRange.whole(8), 0):
        chunk[3, 5] += 1.0
    changed = [not torch.equal(a, b) for a, b in zip(before.codes, weight.codes, strict=True)]
    assert changed == [False] * 3 + [True] + [False] * 4
    assert float(weight.dequantize()[3, 5] - before.dequantize()[3, 5]) == pytest.approx(
        1, abs=0.01
    )


@pytest.mark.parametrize("shape", [(), (5,), (3, 4), (600, 700), (2, 3, 4, 5)], ids=str)
def test_rows_of_bfloat16_weights(shape: tuple[int, ...]) -> None:
    weight = torch.ones(shape, dtype=torch.bfloat16)
    length = shape[0] if shape else 1
    for chunk, _ in editable_rows(weight, RowRange.whole(length), 7):
        assert chunk is weight
    for chunk, _ in editable_rows(weight, RowRange.whole(length), 7, stochastic=True):
        assert chunk.dtype == torch.float32
        chunk.mul_(1 + 2**-9)
    values = weight.float().unique()
    assert set(values.tolist()) <= {1.0, 1.0 + 2**-7}
    if weight.numel() > 1000:
        assert float(weight.double().mean()) == pytest.approx(1 + 2**-9, abs=1e-4)


def test_pieces_end_with_a_block_of_the_moments(monkeypatch: pytest.MonkeyPatch) -> None:
    """Groups of 64 and 8-bit moments in blocks of 256, with rows of 64: by pieces as at once."""
    grads = [1e-2 * matrix(64, 64, k + 1).float() for k in range(3)]
    results = []
    for bound in (64, 1 << 18):
        monkeypatch.setattr(chunks, "CACHE_ELEMENTS", bound)
        weight = parameter(64, 64, 64)
        made = AdamW8bit([weight], lr=1e-2, min_8bit_size=0)
        for grad in grads:
            weight.grad = grad.clone()
            made.step()
        results.append((weight, made.state[weight]["exp_avg_absmax"]))
    assert torch.equal(results[0][1], results[1][1])
    assert same(results[0][0], results[1][0])
