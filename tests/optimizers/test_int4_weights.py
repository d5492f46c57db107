"""INT4 weights: codes, unbiased small updates, and what a training loop sees of both widths."""

from __future__ import annotations

import copy
import io
import pickle

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support import hashed, matrix, set_gradients, tiny_model
from torch import Tensor, nn
from torch.nn import functional

from lowrank.cuda import int4, int4_update
from lowrank.cuda.noise import uniform
from lowrank.optimizers import (
    Int4Weight,
    Int8Weight,
    QuantizedWeight,
    build,
    convert,
    dense_state_dict,
    merge,
)
from lowrank.optimizers.engine.geometry import RowRange
from lowrank.optimizers.weights import editable_rows, rounding_seed
from lowrank.optimizers.weights.formats import Format4, Format8

NAME = "galore_adamw"
DTYPES = (torch.float32, torch.bfloat16)
KINDS = (Int4Weight, Int8Weight)
both = pytest.mark.parametrize("kind", KINDS)


def parameter(m: int, n: int, group: int = 64, dtype: torch.dtype = torch.float32) -> Int4Weight:
    return nn.Parameter(Int4Weight.quantize((0.2 * matrix(m, n, 0)).to(dtype), group))  # type: ignore[return-value]


def same(first: Tensor, second: Tensor) -> bool:
    assert isinstance(first, QuantizedWeight)
    assert isinstance(second, QuantizedWeight)
    return all(torch.equal(a, b) for a, b in zip(first.parts(), second.parts(), strict=True))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_it_looks_like_the_parameter_it_stands_for(dtype: torch.dtype) -> None:
    weight = parameter(6, 51, 64, dtype)
    assert isinstance(weight, nn.Parameter)
    assert (weight.shape, weight.dtype, weight.is_leaf) == ((6, 51), dtype, True)
    assert weight.requires_grad
    assert weight.nbytes == 153 + 5 * dtype.itemsize  # the last group has 50 entries
    assert weight.nbytes == Format4.bytes(306, 64, dtype.itemsize)
    assert "Int4Weight" in repr(weight)
    assert torch.equal(weight, weight.dequantize())
    error = (weight.dequantize().float() - (0.2 * matrix(6, 51, 0)).float()).abs()
    assert float(error.max()) < 0.025  # steps of 0.0113, and 0.015 beyond the clipped range


def test_small_writes_add_up(monkeypatch: pytest.MonkeyPatch) -> None:
    """30 steps of a tenth of a code each: about 3 codes, where independent draws are 1.6 off."""
    monkeypatch.setattr(int4_update, "TOO_WIDE", 1e9)  # one scale throughout
    codes = torch.randint(4, 11, (64, 64), generator=torch.Generator().manual_seed(0))
    packed = int4.pack(codes.view(-1).to(torch.uint8))
    weight = Int4Weight(packed, torch.full((64,), 0.01), (64, 64), 64)
    old = weight.dequantize()
    for turn in range(30):
        for chunk, _ in editable_rows(weight, RowRange.whole(64), 5, turn):
            chunk.add_(0.001)
    moved = (weight.dequantize() - old) / 0.01
    assert float(moved.mean()) == pytest.approx(3.0, abs=0.03)
    assert float((moved - 3.0).abs().max()) < 1.01  # independent draws: up to 7
    assert float(moved.std()) < 0.7


def test_noise_over_turns_is_uniform_and_spread() -> None:
    draws = torch.stack([uniform(1000, 3, 0, turn=t) for t in range(89)])
    assert float(draws.mean()) == pytest.approx(0.5, abs=1e-2)
    ordered = draws.sort(0).values
    assert float((ordered[1:] - ordered[:-1]).min()) > 0.4 / 89  # the golden section's spread
    assert torch.equal(uniform(10, 3, 4, turn=7), uniform(14, 3, 0, turn=7)[4:])


def test_groups_without_a_change_stay_to_the_bit() -> None:
    weight = parameter(8, 64, 64)
    before = copy.deepcopy(weight)
    for chunk, _ in editable_rows(weight, RowRange.whole(8), 0):
        chunk[3, 5] += 1.0
    moved = (weight.dequantize() != before.dequantize()).any(1)
    assert moved.tolist() == [False] * 3 + [True] + [False] * 4
    assert float(weight.dequantize()[3, 5]) == pytest.approx(
        float(before.dequantize()[3, 5]) + 1, abs=0.08
    )
    # a new, wider scale; the others' scales are unchanged
    assert (weight.scales != before.scales).tolist() == moved.tolist()


def test_scales_shrink_again() -> None:
    weight = parameter(4, 64)
    start = weight.scales.clone()
    for chunk, _ in editable_rows(weight, RowRange.whole(4), 0):
        chunk.mul_(0.25)
    assert (weight.scales < 0.4 * start).all()
    for chunk, _ in editable_rows(weight, RowRange.whole(4), 0, 1):
        chunk.zero_()
    assert (weight.dequantize() == 0).all()
    for chunk, _ in editable_rows(weight, RowRange.whole(4), 0, 2):
        chunk.add_(1.0)
    torch.testing.assert_close(weight.dequantize(), torch.ones(4, 64), rtol=0, atol=0.15)


def test_what_is_not_finite_is_seen() -> None:
    weight = parameter(4, 64)
    for chunk, _ in editable_rows(weight, RowRange.whole(4), 0):
        chunk[1, 3] = torch.nan
    assert weight.dequantize()[1].isnan().any()
    assert weight.dequantize()[0].isfinite().all()


@given(st.integers(1, 30), st.integers(1, 40), st.integers(1, 100), st.booleans())
@settings(max_examples=40, deadline=None)
def test_edits_arrive_within_a_step_whatever_the_shape(
    m: int, n: int, half_group: int, half: bool
) -> None:
    group = 2 * half_group
    weight = parameter(m, n, group, torch.bfloat16 if half else torch.float32)
    start = weight.dequantize(torch.float32)
    change = (0.05 * matrix(m, n, 9)).float()
    for chunk, rows in editable_rows(weight, RowRange.whole(m), 2, 3):
        assert chunk.dtype == torch.float32
        chunk.add_(change[rows.start : rows.stop])
    steps = weight.scales.float().repeat_interleave(group)[: m * n].view(m, n)
    error = (weight.dequantize(torch.float32) - start - change).abs()
    assert (error <= 1.01 * steps + 1e-7).all()


@both
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_linear_keeps_codes_for_the_backward_pass(
    kind: type[QuantizedWeight], dtype: torch.dtype
) -> None:
    weight = nn.Parameter(kind.quantize(matrix(12, 32, 1).to(dtype), 32))
    dense = nn.Parameter(weight.dequantize())
    x = hashed(160, 3).view(5, 32).to(dtype)
    saved: list[Tensor] = []

    def keep(tensor: Tensor) -> Tensor:
        saved.append(tensor)
        return tensor

    results = []
    for own in (weight, dense):
        inputs = x.clone().requires_grad_()
        saved.clear()
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            y = functional.linear(inputs, own)
        if own is weight:
            assert sum(tensor.nbytes for tensor in saved) == x.nbytes + weight.nbytes
        y.float().square().sum().backward()
        results.append((y.detach(), inputs.grad, own.grad))
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs)


@both
@pytest.mark.parametrize("width", [32, 20, 7])
def test_embedding_reads_rows_from_codes(kind: type[QuantizedWeight], width: int) -> None:
    """Rows of whole groups, and such that begin within groups and (four bits) within bytes."""
    weight = nn.Parameter(kind.quantize(matrix(11, width, 1).float(), 16))
    dense = nn.Parameter(weight.dequantize())
    indices = torch.tensor([[0, 3, 10], [3, 4, 5]])
    for own in (weight, dense):
        y = functional.embedding(indices, own, padding_idx=4)
        assert type(y) is Tensor
        y.square().sum().backward()
    assert torch.equal(functional.embedding(indices, weight), functional.embedding(indices, dense))
    assert torch.equal(weight.grad, dense.grad)
    with pytest.raises(IndexError):
        functional.embedding(torch.tensor([11]), weight)
    with pytest.raises(ValueError, match=r"max_norm=1\.0 with an embedding in"):
        functional.embedding(indices, weight, max_norm=1.0)


@both
def test_dense_memory_is_refused_by_name(kind: type[QuantizedWeight]) -> None:
    weight = nn.Parameter(kind.quantize(matrix(4, 16, 1).float(), 16))
    for act in (
        lambda: weight.detach().numpy(),
        lambda: weight.share_memory_(),
        lambda: weight.tolist(),
        lambda: nn.ParameterList([weight]).share_memory(),
    ):
        with pytest.raises(ValueError, match=f"in {kind.BITS} bits, which has no dense memory"):
            act()


# In-place writes


@both
def test_a_running_average_follows(kind: type[QuantizedWeight]) -> None:
    """w <- 0.99 w + 0.01 t through copy_: to the nearest it would never move."""
    torch.manual_seed(0)
    target = (0.2 * matrix(16, 64, 5)).float()
    weight = nn.Parameter(kind.quantize((0.2 * matrix(16, 64, 0)).float(), 64))
    start = float((weight.dequantize() - target).norm())
    with torch.no_grad():
        for _ in range(200):
            weight.copy_(0.98 * weight.dequantize() + 0.02 * target)
    # exp(-4) of the distance, and the rounding's
    assert float((weight.dequantize() - target).norm()) < (0.25 if kind is Int4Weight else 0.1) * (
        start
    )


@both
def test_an_average_follows_beside_an_entry_that_moves_far(kind: type[QuantizedWeight]) -> None:
    dense = matrix(4, 64, 0).float()
    weight = kind.quantize(dense, 64)
    start = weight.dequantize()
    step = (start.amax(1) - start.amin(1)).max() / 15
    moved = 0.0
    for seed in range(200):
        torch.manual_seed(seed)
        average = weight.like([part.clone() for part in weight.parts()])
        target = start + 0.02 * step
        target[:, 0] -= 2 * step  # away from the largest of the group, or towards it
        average.copy_(target)
        moved += float((average.dequantize() - start)[:, 1:].mean())
    assert moved / 200 == pytest.approx(0.02 * float(step), rel=0.4)


@both
def test_an_averaged_model_follows(kind: type[QuantizedWeight]) -> None:
    from torch.optim.swa_utils import AveragedModel

    torch.manual_seed(0)
    model = convert(NAME, tiny_model(), weight_bits=kind.BITS)
    averaged = AveragedModel(
        model, avg_fn=lambda average, now, count: average + (now - average) / 8
    )
    averaged.update_parameters(model)
    with torch.no_grad():
        model.mlp["up_proj"].weight.copy_(model.mlp["up_proj"].weight.dequantize() + 0.2)
    before = averaged.module.mlp["up_proj"].weight.dequantize().mean()
    for _ in range(20):
        averaged.update_parameters(model)
    moved = averaged.module.mlp["up_proj"].weight.dequantize().mean() - before
    assert float(moved) == pytest.approx(0.2 * (1 - (7 / 8) ** 20), abs=0.02)


@both
def test_first_weights_are_the_nearest(kind: type[QuantizedWeight]) -> None:
    weight = nn.Parameter(kind.quantize((0.2 * matrix(30, 50, 0)).float(), 64))
    dense = (0.1 * matrix(30, 50, 4)).float()
    state = torch.get_rng_state()
    with torch.no_grad():
        weight.copy_(dense)
    assert same(weight, kind.quantize(dense, 64))
    before = copy.deepcopy(weight)
    with torch.no_grad():
        weight.copy_(weight.dequantize())  # as DDP does
    assert same(weight, before)
    assert torch.equal(torch.get_rng_state(), state)
    with pytest.raises(ValueError, match="accepted are copy_"), torch.no_grad():
        weight.lerp_(dense, 0.01)
    weight.data = 5 * dense
    assert same(weight, kind.quantize(5 * dense, 64))


# Copies and files


@pytest.mark.parametrize("how", ["deepcopy", "pickle", "torch.save", "weights_only"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_copies(how: str, dtype: torch.dtype) -> None:
    model = convert(NAME, tiny_model(dtype=dtype), weight_bits=4)
    ours = model.mlp["up_proj"].weight
    if how == "deepcopy":
        theirs = copy.deepcopy(model).mlp["up_proj"].weight
    elif how == "pickle":
        theirs = pickle.loads(pickle.dumps(model)).mlp["up_proj"].weight
    else:
        file = io.BytesIO()
        torch.save({"w": ours}, file)
        file.seek(0)
        theirs = torch.load(file, weights_only=how == "weights_only")["w"]
    assert same(ours, theirs)
    assert type(ours) is type(theirs)
    assert isinstance(theirs, nn.Parameter)
    assert ours.codes.data_ptr() != theirs.codes.data_ptr()


def test_state_dict_is_plain_and_names_another_width() -> None:
    model = convert(NAME, tiny_model(), weight_bits=4)
    state = model.state_dict()
    assert all(type(value) is Tensor for value in state.values())
    for assign in (False, True):
        other = convert(NAME, tiny_model(seed=1), weight_bits=4)
        other.load_state_dict(state, assign=assign)
        assert same(other.mlp["up_proj"].weight, model.mlp["up_proj"].weight)
    eight = convert(NAME, tiny_model(), weight_bits=8)
    with pytest.raises(RuntimeError, match=r"saved in 4 bits, and the layer has 8"):
        eight.load_state_dict(state)
    with pytest.raises(RuntimeError, match=r"saved in 8 bits, and the layer has 4"):
        model.load_state_dict(convert(NAME, tiny_model(), weight_bits=8).state_dict())
    with pytest.raises(RuntimeError, match="groups of 32"):
        convert(NAME, tiny_model(), weight_bits=4, weight_group_size=32).load_state_dict(state)
    # a dense one, nearly the same as the present: to the nearest, not at random
    near = {k: v + 1e-4 for k, v in tiny_model().state_dict().items()}
    model.load_state_dict(near)
    expected = Int4Weight.quantize(near["mlp.up_proj.weight"])
    assert same(model.mlp["up_proj"].weight, expected)


def test_to_moves_and_casts() -> None:
    model = convert(NAME, tiny_model(), weight_bits=4)
    weight = model.mlp["up_proj"].weight
    codes = weight.codes.clone()
    model.to(torch.bfloat16)
    assert model.mlp["up_proj"].weight is weight
    assert weight.dtype == weight.scales.dtype == torch.bfloat16
    saved = {name: value.clone() for name, value in model.state_dict().items()}
    model.to("meta").to_empty(device="cpu")
    model.load_state_dict(saved)
    assert torch.equal(weight.codes, codes)


def test_merge_and_export_are_dense() -> None:
    model = convert(NAME, tiny_model(), weight_bits=4, weight_include=("embeddings", "head"))
    exported = dense_state_dict(model)
    assert list(exported) == list(tiny_model().state_dict())
    merge(model)
    assert not any(isinstance(p, QuantizedWeight) for p in model.parameters())
    assert all(torch.equal(value, exported[key]) for key, value in model.state_dict().items())


# Training


def test_seeds_and_turns_resume_exactly() -> None:
    def run(stop: int | None) -> list[Tensor]:
        model = tiny_model()
        options = {"lr": 1e-2, "rank": 4, "update_proj_gap": 3, "weight_bits": 4}
        optimizer = build(NAME, model, **options)
        for step in range(8):
            if step == stop:
                states = copy.deepcopy((model.state_dict(), optimizer.state_dict()))
                model = tiny_model(seed=9)
                optimizer = build(NAME, model, **options)
                model.load_state_dict(states[0])
                optimizer.load_state_dict(states[1])
            set_gradients(model, step)
            optimizer.step()
        return [p for q in model.parameters() for p in getattr(q, "parts", lambda: [])()]

    whole = run(None)
    assert whole
    assert all(torch.equal(a, b) for a, b in zip(whole, run(4), strict=True))


def test_the_seed_of_four_bits_is_the_weights_own() -> None:
    four, eight = parameter(2, 32), nn.Parameter(Int8Weight.quantize(matrix(2, 32, 0).float()))
    assert rounding_seed(four, 1, "a", 5) == (rounding_seed(four, 1, "a", 0)[0], 5)
    assert rounding_seed(eight, 1, "a", 5)[1] == 0
    assert rounding_seed(eight, 1, "a", 5) != rounding_seed(eight, 1, "a", 6)


@pytest.mark.parametrize("include", [(), ("embeddings", "head")], ids=["projected", "all"])
def test_no_temporary_of_the_weights_size(include: tuple[str, ...]) -> None:
    torch.manual_seed(0)
    model = nn.ModuleDict({"mlp": nn.Linear(1536, 768, bias=False)}).to(torch.bfloat16)
    if include:
        model["mlp"], model["wte"] = nn.Linear(8, 8), nn.Embedding(768, 1536)
        model["head"] = nn.Linear(8, 8)
        model = model.to(torch.bfloat16)
    options = {"rank": 8, "weight_bits": 4, "weight_include": include}
    optimizer = build("apollo_adamw", model, **options)
    for param in model.parameters():
        param.grad = torch.randn(param.shape, dtype=torch.bfloat16)
    optimizer.step()
    with torch.profiler.profile(profile_memory=True) as profile:
        optimizer.step()
    largest = max(event.self_cpu_memory_usage for event in profile.events())
    assert largest <= 4 * (1 << 18) + 4 * 1536  # one fp32 chunk
    assert largest < 768 * 1536


def test_bytes_of_both_widths() -> None:
    model = nn.ModuleDict({"mlp": nn.Linear(100, 60, bias=False)}).to(torch.bfloat16)
    for bits, layout in ((4, Format4), (8, Format8)):
        twin = convert(NAME, copy.deepcopy(model), weight_bits=bits)
        size = {4: int4_update.GROUP_SIZE, 8: 256}[bits]
        (weight,) = twin.parameters()
        stored = sum(part.untyped_storage().nbytes() for part in weight.parts())
        groups = -(-6000 // size)
        assert weight.nbytes == stored == 6000 * bits // 8 + 2 * (bits // 4) * groups
        assert layout.bytes(6000, size, 2) == stored
