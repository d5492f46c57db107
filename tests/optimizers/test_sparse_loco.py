"""SparseLoCo: its messages, and two to four workers that follow a reference of the rule."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from sharded import Block, Recorder, block, run, tokens
from support import hashed
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.parallel import DistributedDataParallel

from lowrank.optimizers import SparseLoCo, build, convert
from lowrank.optimizers.outer.messages import Format
from lowrank.optimizers.outer.sparse_loco import HEADER_BYTES

OPTIONS: dict[str, Any] = {"inner_steps": 3, "density": 0.1, "chunk": 50, "error_decay": 0.9}
EXCHANGES = 3


# Messages


def quantised(chunk: Tensor, count: int, bits: int) -> Tensor:
    """The largest entries of a chunk, their magnitudes one of two means."""
    made = torch.zeros_like(chunk)
    at = sorted(range(len(chunk)), key=lambda i: -abs(float(chunk[i])))[:count]
    sizes = {i: abs(float(chunk[i])) for i in at}
    middle = sum(sizes.values()) / count
    for i in at:
        alike = [size for size in sizes.values() if (size > middle) == (sizes[i] > middle)]
        mean = sum(alike) / len(alike)
        value = mean if chunk[i] > 0 else -mean
        made[i] = torch.tensor(value if bits == 2 else float(chunk[i])).float()
    return made


def compressed(values: Tensor, density: float, chunk: int, bits: int) -> Tensor:
    flat = values.flatten()
    width = min(chunk, len(flat))
    count = max(1, round(density * width))
    parts = []
    for start in range(0, len(flat), width):
        part = functional.pad(flat[start : start + width], (0, max(start + width - len(flat), 0)))
        parts.append(quantised(part, count, bits))
    return torch.cat(parts)[: len(flat)].view_as(values)


@pytest.mark.parametrize("entries", [1, 7, 50, 130])
@pytest.mark.parametrize("bits", [2, 32])
def test_messages_hold_the_largest_entries(entries: int, bits: int) -> None:
    values = hashed(entries, 3)
    made = Format.of(entries, 0.1, 50, bits)
    message = made.encode(values)
    assert message.dtype == torch.uint8
    assert len(message) == made.message_bytes
    found = made.decode(message, torch.float64)
    torch.testing.assert_close(found, compressed(values, 0.1, 50, bits), rtol=1e-6, atol=1e-9)
    if bits == 2:
        assert len(found.abs().unique()) <= 1 + 2 * made.chunks


def test_bytes_of_a_message() -> None:
    assert Format.of(4096 * 3, 1 / 64, 4096, 2).message_bytes == 3 * (64 * 2 + 64 // 4 + 8)
    assert Format.of(4096 * 3, 1 / 64, 4096, 32).message_bytes == 3 * 64 * (2 + 4)
    assert Format.of(10, 1 / 64, 4096, 2).message_bytes == 2 + 1 + 8  # one of ten
    assert Format.of(4097, 1 / 64, 4096, 2).message_bytes == 2 * (64 * 2 + 64 // 4 + 8)


def test_equal_magnitudes_and_zeros() -> None:
    for values in (torch.zeros(20), torch.tensor([2.0, -2.0] * 10)):
        made = Format.of(20, 1.0, 20, 2)
        assert torch.equal(made.decode(made.encode(values), torch.float32), values)


def test_without_processes_and_bad_options() -> None:
    model = block()
    inner = build("adamw", model)
    with pytest.raises(RuntimeError, match="accepted is the inner optimizer itself"):
        SparseLoCo(inner)
    for options, message in (
        ({"inner_steps": 0}, "inner_steps=0"),
        ({"density": 0.0}, "density=0"),
        ({"chunk": 1 << 16}, "chunk=65536: accepted is at most 32768"),
        ({"bits": 4}, "bits=4"),
        ({"error_decay": 1.5}, "error_decay=1.5"),
        ({"outer_lr": -1.0}, "outer_lr=-1"),
    ):
        with pytest.raises(ValueError, match=message):
            SparseLoCo(inner, **options)


@pytest.fixture
def single() -> Iterator[None]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.usefixtures("single")
def test_methods_that_change_frozen_weights_are_refused() -> None:
    for name in ("relora_adamw", "switchlora_adamw", "sst_adamw", "loqt_adamw"):
        with pytest.raises(ValueError, match="whose events change frozen weights"):
            SparseLoCo(build(name, convert(name, block(), rank=4), rank=4))
    for name in ("sltrain_adamw", "low_rank_adamw", "dlrt_adamw"):
        SparseLoCo(build(name, convert(name, block(), rank=4), rank=4))


# Workers


def double_block(seed: int = 0) -> Block:
    return block(seed).double()


def backward(model: nn.Module, step: int, rank: int) -> None:
    batch = tokens(step, rank)
    logits = model(batch[:, :-1])
    functional.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten()).backward()


def adamw(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters(), lr=1e-2)


def reference(world: int, bits: int, outer_lr: float) -> list[Tensor]:
    """All workers in one process, by the formulas."""
    models = [double_block() for _ in range(world)]
    inners = [adamw(model) for model in models]
    shared = [param.detach().clone() for param in models[0].parameters()]
    errors = [[torch.zeros_like(own) for own in shared] for _ in models]
    for exchange in range(EXCHANGES):
        for rank, (model, inner) in enumerate(zip(models, inners, strict=True)):
            for k in range(OPTIONS["inner_steps"]):
                backward(model, exchange * OPTIONS["inner_steps"] + k, rank)
                inner.step()
                inner.zero_grad()
        for i, own in enumerate(shared):
            sent = []
            for rank, model in enumerate(models):
                drift = own - list(model.parameters())[i].detach()
                total = OPTIONS["error_decay"] * errors[rank][i] + drift
                sent.append(compressed(total, OPTIONS["density"], OPTIONS["chunk"], bits))
                errors[rank][i] = total - sent[-1]
            own.sub_(outer_lr * sum(sent) / world)
            for model in models:
                list(model.parameters())[i].data.copy_(own)
    return shared


def worker(model: nn.Module, rank: int, outer: SparseLoCo, steps: range) -> None:
    for step in steps:
        backward(model, step, rank)
        outer.step()
        outer.zero_grad()


def follow(rank: int, world: int, folder: Path) -> dict[str, Any]:
    """Groups of two, three and four; a resumed one; and what goes wrong."""
    groups = {size: dist.new_group(list(range(size))) for size in (2, 3, 4)}
    steps = EXCHANGES * OPTIONS["inner_steps"]
    made: dict[str, Any] = {}
    for size, bits, outer_lr in ((2, 2, 1.0), (3, 2, 0.7), (4, 2, 1.0), (4, 32, 1.0)):
        if rank >= size:
            continue
        options = {**OPTIONS, "bits": bits, "outer_lr": outer_lr, "process_group": groups[size]}
        model = double_block()
        outer = SparseLoCo(adamw(model), **options)
        worker(model, rank, outer, range(2))
        assert not outer.exchanged
        recorder = Recorder()
        with recorder.recording():
            worker(model, rank, outer, range(2, 3))
        assert outer.exchanged
        bytes_sent = sum(size for _, _, size in recorder.calls), outer.message_bytes
        worker(model, rank, outer, range(3, steps))
        key = f"{size} {bits} {outer_lr}"
        made[key] = [p.detach().clone() for p in model.parameters()], bytes_sent
    made["resumed"] = resumed(rank, steps)
    made["faults"] = faults(rank, groups)
    return made


def resumed(rank: int, steps: int) -> list[Tensor]:
    """Workers that stop in the middle of a period, and go on in new objects."""
    model = double_block()
    outer = SparseLoCo(adamw(model), **OPTIONS)
    worker(model, rank, outer, range(4))
    saved = copy.deepcopy((model.state_dict(), outer.state_dict()))
    again = double_block()
    other = SparseLoCo(adamw(again), **OPTIONS)
    again.load_state_dict(saved[0])
    other.load_state_dict(saved[1])
    with pytest.raises(ValueError, match="accepted is each worker's own"):
        other.load_state_dict({**saved[1], "worker": [rank + 1, 4]})
    with pytest.raises(ValueError, match="accepted is a state of the same model"):
        other.load_state_dict({**saved[1], "errors": saved[1]["errors"][1:]})
    worker(again, rank, other, range(4, steps))
    return [p.detach().clone() for p in again.parameters()]


def said(call: Any, *arguments: Any) -> str:
    try:
        call(*arguments)
    except (RuntimeError, ValueError) as error:
        return f"{type(error).__name__}: {error}"
    return "nothing"


def faults(rank: int, groups: dict[int, Any]) -> dict[str, str]:
    found = {}
    found["models"] = said(lambda: SparseLoCo(adamw(double_block(rank)), **OPTIONS))
    model = double_block()
    parallel = DistributedDataParallel(model)
    found["wrapped"] = said(lambda: SparseLoCo(adamw(model), **OPTIONS))
    del parallel
    model = double_block()
    outer = SparseLoCo(adamw(model), **{**OPTIONS, "density": 0.1 if rank else 0.2})
    found["options"] = said(worker, model, rank, outer, range(3))
    model = double_block()
    outer = SparseLoCo(adamw(model), **{**OPTIONS, "outer_lr": 0.7 if rank else 0.8})
    found["rates"] = said(worker, model, rank, outer, range(3))
    model = double_block()
    outer = SparseLoCo(adamw(model), **OPTIONS)
    if rank == 2:
        next(model.parameters()).data[0, 0] = float("nan")
    before = [p.detach().clone() for p in model.parameters()]
    found["nan"] = said(worker, model, rank, outer, range(3))
    outer.inner.param_groups[0]["params"].pop()
    found["changed"] = said(outer.step)
    assert len(before) == len(list(model.parameters()))
    model = double_block()
    if rank < 2:
        own = {**OPTIONS, "process_group": groups[2], "timeout": 1.0}
        outer = SparseLoCo(adamw(model), **own)
        found["missing"] = said(worker, model, rank, outer, range(3 if rank == 0 else 2))
    return found


@pytest.mark.slow
def test_two_to_four_workers(tmp_path: Path) -> None:
    made = run(follow, 4, tmp_path)
    for key in ("2 2 1.0", "3 2 0.7", "4 2 1.0", "4 32 1.0"):
        size, bits, outer_lr = int(key.split()[0]), int(key.split()[1]), float(key.split()[2])
        expected = reference(size, bits, outer_lr)
        for rank in range(size):
            weights, (sent, formula) = made[rank][key]
            assert sent == formula
            assert formula == HEADER_BYTES + sum(
                Format.of(own.numel(), 0.1, 50, bits).message_bytes for own in expected
            )
            for own, first, wanted in zip(weights, made[0][key][0], expected, strict=True):
                assert torch.equal(own, first)
                torch.testing.assert_close(own, wanted, rtol=1e-6, atol=1e-8)
    for rank in range(4):
        for own, straight in zip(made[rank]["resumed"], made[0]["4 2 1.0"][0], strict=True):
            assert torch.equal(own, straight)
        faults = made[rank]["faults"]
        assert faults["models"].startswith("ValueError: SparseLoCo: parameters of the workers")
        assert "DistributedDataParallel, which averages" in faults["wrapped"]
        for key in ("options", "rates"):
            assert faults[key].startswith("RuntimeError: SparseLoCo: steps and options of the work")
        assert "workers [2] are not finite at step 3" in faults["nan"]
        assert "parameters have changed" in faults["changed"]
    assert "not all 2 workers came to an exchange (step 3 here)" in made[0]["faults"]["missing"]
    assert made[1]["faults"]["missing"] == "nothing"
