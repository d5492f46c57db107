"""INT8 weights as parameters: what a training loop, a checkpoint and a copy see of them."""

from __future__ import annotations

import copy
import io
import os
import pickle
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from hypothesis import given, settings
from hypothesis import strategies as st
from support import hashed, matrix, set_gradients, tiny_model
from torch import Tensor, nn
from torch.nn import functional

from lowrank.cuda import groups
from lowrank.optimizers import Int8Weight, build, convert, dense_state_dict, merge
from lowrank.optimizers.projectors import RowRange
from lowrank.optimizers.weights import editable_rows

NAME = "qgalore_adamw_8bit"
DTYPES = (torch.float32, torch.bfloat16)


def parameter(m: int, n: int, group: int = 256, dtype: torch.dtype = torch.float32) -> nn.Parameter:
    return nn.Parameter(Int8Weight.quantize((0.2 * matrix(m, n, 0)).to(dtype), group))


def same(first: Tensor, second: Tensor) -> bool:
    assert isinstance(first, Int8Weight)
    assert isinstance(second, Int8Weight)
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


# Copies, files, devices and dtypes


@pytest.mark.parametrize("how", ["deepcopy", "pickle", "torch.save"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_copies(how: str, dtype: torch.dtype) -> None:
    model = convert(NAME, tiny_model(dtype=dtype))
    set_gradients(model, 0)
    if how == "deepcopy":
        twin = copy.deepcopy(model)
    elif how == "pickle":
        twin = pickle.loads(pickle.dumps(model))
    else:
        file = io.BytesIO()
        torch.save(model, file)
        file.seek(0)
        twin = torch.load(file, weights_only=False)
    ours, theirs = model.mlp["up_proj"].weight, twin.mlp["up_proj"].weight
    assert same(ours, theirs)
    assert ours.codes.data_ptr() != theirs.codes.data_ptr()
    assert isinstance(theirs, nn.Parameter)
    assert theirs.requires_grad
    if how == "deepcopy":
        assert torch.equal(ours.grad, theirs.grad)
        assert ours.grad is not theirs.grad
    # the hooks came along
    assert list(twin.state_dict()) == list(model.state_dict())
    twin.load_state_dict(model.state_dict())


def test_weights_only_load() -> None:
    model = convert(NAME, tiny_model())
    file = io.BytesIO()
    torch.save({"parameters": dict(model.named_parameters()), "state": model.state_dict()}, file)
    file.seek(0)
    loaded = torch.load(file, weights_only=True)
    for name, param in model.named_parameters():
        assert torch.equal(loaded["parameters"][name], param)
        assert type(loaded["parameters"][name]) is type(param)


def test_to_moves_and_casts_in_place_of_the_parameter() -> None:
    model = convert(NAME, tiny_model())
    weight = model.mlp["up_proj"].weight
    set_gradients(model, 0)
    codes = weight.codes.clone()
    dense = weight.dequantize()
    model.to(torch.bfloat16)
    assert model.mlp["up_proj"].weight is weight
    assert weight.dtype == weight.scales.dtype == weight.grad.dtype == torch.bfloat16
    assert torch.equal(weight.codes, codes)
    torch.testing.assert_close(weight.dequantize().float(), dense, rtol=2e-2, atol=1e-6)
    model.float()
    assert weight.dtype == torch.float32
    saved = {name: value.clone() for name, value in model.state_dict().items()}
    model.to("meta")
    assert weight.device.type == "meta"
    model.to_empty(device="cpu")
    model.load_state_dict(saved)
    assert torch.equal(weight.codes, codes)
    optimizer = build(NAME, model, rank=4)
    assert weight in optimizer.state


def test_state_dict_is_plain_and_loads_strictly() -> None:
    model = convert(NAME, tiny_model())
    state = model.state_dict()
    assert all(type(value) is Tensor for value in state.values())
    expected = [
        key
        for name in tiny_model().state_dict()
        for key in (
            [f"{name}.codes", f"{name}.scales", f"{name}.zeros"]
            if name.startswith(("self_attn", "mlp")) and name.endswith("weight")
            else [name]
        )
    ]
    assert list(state) == expected
    named = dict(model.named_parameters())
    assert set(model.state_dict(keep_vars=True)) == set(named)
    for assign in (False, True):
        other = convert(NAME, tiny_model(seed=1))
        other.load_state_dict(state, assign=assign)
        for name, param in other.named_parameters():
            assert torch.equal(param, named[name])
            assert type(param) is type(named[name])
    broken = {
        key: value for key, value in state.items() if not key.endswith("up_proj.weight.zeros")
    }
    with pytest.raises(RuntimeError, match=r"up_proj\.weight"):
        other.load_state_dict(broken)
    small = convert(NAME, tiny_model(), weight_group_size=64)
    with pytest.raises(RuntimeError, match="groups of 64"):
        small.load_state_dict(state)
    with pytest.raises(RuntimeError, match="Unexpected"):
        tiny_model().load_state_dict(state)


@pytest.mark.parametrize("assign", [False, True])
def test_a_dense_weight_is_quantised_when_loaded(assign: bool) -> None:
    dense = tiny_model(seed=1)
    model = convert(NAME, tiny_model(), weight_group_size=64)
    model.load_state_dict(dense.state_dict(), assign=assign)
    expected = convert(NAME, tiny_model(seed=1), weight_group_size=64)
    for a, b in zip(model.parameters(), expected.parameters(), strict=True):
        assert type(a) is type(b)
        assert torch.equal(a, b)
    assert model.mlp["up_proj"].weight.group_size == 64


def test_safetensors_hold_the_state(tmp_path: Path) -> None:
    files = pytest.importorskip("safetensors.torch")
    model = convert(NAME, tiny_model(dtype=torch.bfloat16))
    files.save_file(model.state_dict(), tmp_path / "model.safetensors")
    other = convert(NAME, tiny_model(seed=1, dtype=torch.bfloat16))
    other.load_state_dict(files.load_file(tmp_path / "model.safetensors"))
    assert same(model.mlp["up_proj"].weight, other.mlp["up_proj"].weight)


# Conversion


def test_convert_and_merge() -> None:
    model = tiny_model()
    start = [param.detach().clone() for param in model.parameters()]
    assert convert(NAME, model, weight_group_size=32, rank=4) is model
    kinds = [isinstance(param, Int8Weight) for param in model.parameters()]
    assert kinds == [False, True, True, False, True, False, False, False]
    assert isinstance(model.mlp["up_proj"], nn.Linear)
    once = list(model.parameters())
    convert(NAME, model)  # what is converted stays, groups of 32 too
    build(NAME, model, rank=4)
    assert all(a is b for a, b in zip(once, model.parameters(), strict=True))
    for old, new in zip(start, model.parameters(), strict=True):
        torch.testing.assert_close(new.detach().to(old.dtype) + 0, old, rtol=0, atol=2e-3)
    values = dense_state_dict(model)
    set_gradients(model, 0)
    grads = [param.grad for param in model.parameters()]
    assert merge(model) is model
    assert not any(isinstance(param, Int8Weight) for param in model.parameters())
    assert all(a is b.grad for a, b in zip(grads, model.parameters(), strict=True))
    dense = list(model.parameters())
    assert merge(model) is model
    assert all(a is b for a, b in zip(dense, model.parameters(), strict=True))
    assert list(model.state_dict()) == list(values) == list(tiny_model().state_dict())
    assert all(torch.equal(value, values[key]) for key, value in model.state_dict().items())
    assert not model.mlp["up_proj"]._state_dict_hooks
    assert not model.mlp["up_proj"]._load_state_dict_pre_hooks


def test_what_convert_leaves_alone() -> None:
    for name, options in (("galore_adamw", {}), ("adamw", {}), (NAME, {"weight_bits": None})):
        model = tiny_model()
        assert convert(name, model, **options) is model
        assert not any(isinstance(param, Int8Weight) for param in model.parameters())
    model = tiny_model()
    model.mlp["up_proj"].weight.requires_grad_(False)
    model.mlp["tied"] = nn.Linear(16, 16, bias=False)
    model.mlp["tied"].weight = model.self_attn["q_proj"].weight
    convert(NAME, model, patterns=["mlp", "lm_head"])
    kinds = {name for name, p in model.named_parameters() if isinstance(p, Int8Weight)}
    assert kinds == {"mlp.down_proj.weight", "lm_head.weight"}


def test_convert_errors() -> None:
    with pytest.raises(ValueError, match="'nothing'"):
        convert(NAME, tiny_model(), patterns=["nothing"])
    with pytest.raises(ValueError, match="did you mean 'weight_bits'"):
        convert(NAME, tiny_model(), weight_bit=8)
    with pytest.raises(ValueError, match="unknown optimizer 'qgalore'"):
        convert("qgalore", tiny_model())
    with pytest.raises(ValueError, match="weight_bits"):
        convert("galore_adamw", tiny_model(), weight_bits=8)


# Several processes


def _worker(rank: int, world: int, folder: str) -> None:
    os.environ.update(MASTER_ADDR="127.0.0.1", GLOO_SOCKET_IFNAME="lo")
    torch.set_num_threads(1)
    store = f"file://{folder}/store-{world}"
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=world)
    model = convert(NAME, tiny_model())
    start = [param.detach().clone() for param in model.parameters()]
    wrapped: nn.Module = nn.parallel.DistributedDataParallel(model) if world > 1 else model
    kept = all(torch.equal(a, b) for a, b in zip(start, model.parameters(), strict=True))
    optimizer = build(NAME, model, lr=1e-2, rank=4, update_proj_gap=2)
    refused = False
    if world > 1:
        try:
            convert(NAME, nn.parallel.DistributedDataParallel(tiny_model()))
        except ValueError:
            refused = True
    norms = []
    for step in range(4):
        tokens = torch.randint(0, 32, (8, 6), generator=torch.Generator().manual_seed(step))
        optimizer.zero_grad()
        halves = tokens.chunk(world)[rank].chunk(2)  # two micro-batches
        for i, half in enumerate(halves):
            waits = world > 1 and i == 0
            context = wrapped.no_sync() if waits else torch.enable_grad()  # type: ignore[operator]
            with context:
                loss = functional.cross_entropy(wrapped(half).flatten(0, 1), half.flatten())
                (loss / 2).backward()
        norms.append(torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5))
        optimizer.step()
    result = {
        "parameters": [param.detach().clone() for param in model.parameters()],
        "moved": [not torch.equal(a, b) for a, b in zip(start, model.parameters(), strict=True)],
        "norms": torch.stack(norms),
        "kept": kept,
        "refused": refused or world == 1,
    }
    torch.save(result, f"{folder}/{world}-{rank}.pt")
    dist.destroy_process_group()


@pytest.mark.slow
def test_two_processes_agree_to_the_bit_and_with_one() -> None:
    with tempfile.TemporaryDirectory() as folder:
        mp.spawn(_worker, (2, folder), nprocs=2)
        mp.spawn(_worker, (1, folder), nprocs=1)
        first, second, single = (torch.load(f"{folder}/{x}.pt") for x in ("2-0", "2-1", "1-0"))
    for run in (first, second, single):
        assert run["kept"]
        assert run["refused"]
        assert all(run["moved"])
    torch.testing.assert_close(first["norms"], single["norms"], rtol=2e-2, atol=0)
    for a, b, c in zip(
        first["parameters"], second["parameters"], single["parameters"], strict=True
    ):
        assert type(a) is type(c)
        if isinstance(a, Int8Weight):
            assert same(a, b)
        assert torch.equal(a, b)
        torch.testing.assert_close(a + 0, c + 0, rtol=0, atol=2e-2)
