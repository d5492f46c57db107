"""INT8 weights in copies, files and state dicts, converted models, and several processes."""

from __future__ import annotations

import copy
import io
import os
import pickle
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from forked import start
from support import set_gradients, tiny_model
from test_int8_weights import DTYPES, NAME, same
from torch import Tensor, nn
from torch.nn import functional

from lowrank.optimizers import (
    Int8Weight,
    QuantizedWeight,
    build,
    convert,
    dense_state_dict,
    merge,
)


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
            [f"{name}.{part}" for part in ("codes", "scales", "zeros", "group_size")]
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
def test_other_groups_are_refused_even_where_they_would_fit(assign: bool) -> None:
    """24 x 16 entries are two groups of 256, and of 200, whose bounds differ."""
    model = convert(NAME, tiny_model(), patterns=("up_proj",), weight_group_size=256)
    other = convert(NAME, tiny_model(seed=1), patterns=("up_proj",), weight_group_size=200)
    with pytest.raises(RuntimeError, match=r"in groups of 256, and the layer has groups of 200"):
        other.load_state_dict(model.state_dict(), assign=assign)


def test_a_state_dict_of_an_earlier_version_loads() -> None:
    model, other = convert(NAME, tiny_model()), convert(NAME, tiny_model(seed=1))
    state = {k: v for k, v in model.state_dict().items() if not k.endswith("group_size")}
    other.load_state_dict(state)
    assert same(model.mlp["up_proj"].weight, other.mlp["up_proj"].weight)


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
        convert("relora_adamw", tiny_model(), weight_bits=8)


# Several processes


def _worker(rank: int, world: int, folder: str) -> None:
    os.environ.update(MASTER_ADDR="127.0.0.1", GLOO_SOCKET_IFNAME="lo")
    torch.set_num_threads(1)
    store = f"file://{folder}/store-{world}"
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=world)
    for bits in (8, 4):
        torch.save(_trained(rank, world, bits), f"{folder}/{world}-{rank}-{bits}.pt")
    dist.destroy_process_group()


def _trained(rank: int, world: int, bits: int) -> dict[str, Any]:
    include = ("embeddings", "head") if bits == 4 else ()
    model = convert(NAME, tiny_model(), weight_bits=bits, weight_include=include)
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
    return {
        "parameters": [param.detach().clone() for param in model.parameters()],
        "moved": [not torch.equal(a, b) for a, b in zip(start, model.parameters(), strict=True)],
        "norms": torch.stack(norms),
        "kept": kept,
        "refused": refused or world == 1,
    }


@pytest.fixture(scope="module")
def processes() -> Iterator[Path]:
    """A folder with what two processes and one came to."""
    with tempfile.TemporaryDirectory() as folder:
        for world in (2, 1):
            start(_worker, (world, folder), world)
        yield Path(folder)


@pytest.mark.slow
@pytest.mark.parametrize(("bits", "step"), [(8, 2e-2), (4, 0.2)])
def test_two_processes_agree_to_the_bit_and_with_one(
    bits: int, step: float, processes: Path
) -> None:
    first, second, single = (
        torch.load(processes / f"{which}-{bits}.pt") for which in ("2-0", "2-1", "1-0")
    )
    for run in (first, second, single):
        assert run["kept"]
        assert run["refused"]
        assert all(run["moved"])
    torch.testing.assert_close(first["norms"], single["norms"], rtol=2e-2, atol=0)
    for a, b, c in zip(
        first["parameters"], second["parameters"], single["parameters"], strict=True
    ):
        assert type(a) is type(c)
        if isinstance(a, QuantizedWeight):
            assert same(a, b)
        assert torch.equal(a, b)
        torch.testing.assert_close(a + 0, c + 0, rtol=0, atol=step)
