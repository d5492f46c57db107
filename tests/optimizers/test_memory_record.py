"""No step makes a temporary of the weight's size: read off the profiler's memory record."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from support import matrix
from table import PROJECTING, Row, every_with
from torch import nn
from torch.profiler import ProfilerActivity, profile

from lowrank.optimizers import build

SHAPES = ((1024, 768), (768, 1024))
RANK = 32


class Single(nn.Module):
    """One projected matrix, nothing else."""

    def __init__(self, rows: int, columns: int, dtype: torch.dtype) -> None:
        super().__init__()
        # a query matrix, so that what is meant for attention takes it
        self.self_attn = nn.ModuleDict({"q_proj": nn.Linear(columns, rows, bias=False)}).to(dtype)

    @property
    def weight(self) -> nn.Parameter:
        return self.self_attn["q_proj"].weight  # type: ignore[return-value]


def largest_allocation(call: Callable[[], Any]) -> int:
    """Bytes of the largest single allocation while `call` runs."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as record:
        call()
    events = record.profiler.kineto_results.events()
    sizes = [event.nbytes() for event in events if event.name() == "[memory]"]
    return max(sizes, default=0)


def after_first_steps(row: Row, shape: tuple[int, int], dtype: torch.dtype) -> Callable[[], Any]:
    """A step that refreshes nothing, of an optimizer that has its bases."""
    torch.manual_seed(0)
    model = Single(*shape, dtype)
    options = {**row.options, "rank": RANK, "update_proj_gap": 1000}
    optimizer = build(row.name, model, lr=1e-3, **options)
    (weight,) = model.parameters()
    grad = (1e-2 * matrix(*shape, 1)).to(dtype)
    weight.grad = grad if weight.dtype == grad.dtype else grad.to(weight.dtype)
    for _ in range(3):
        optimizer.step()
    return optimizer.step


@every_with("shape", SHAPES, PROJECTING)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_step_allocates_nothing_of_the_weights_size(
    row: Row, shape: tuple[int, int], dtype: torch.dtype
) -> None:
    step = after_first_steps(row, shape, dtype)
    # Chunks of rows have at most 2^18 entries, in fp32 whatever the weight's precision.
    bound = (1 << 18) * 4
    assert bound < shape[0] * shape[1] * torch.float32.itemsize // 2
    assert largest_allocation(step) <= max(bound, shape[0] * shape[1] * dtype.itemsize // 2)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    "name", ["coap_adamw", "coap_adamw_8bit", "coap_adafactor", "coap_adafactor_8bit"]
)
def test_a_step_of_coaps_basis_allocates_nothing_of_the_weights_size(
    name: str, shape: tuple[int, int], dtype: torch.dtype
) -> None:
    model = Single(*shape, dtype)
    # Normalised, so that the basis moves in bf16 too.
    options = {"update_interval": 3, "reproject_factor": 1000, "normalize_gradient": True}
    optimizer = build(name, model, lr=1e-3, rank=RANK, **options)
    model.weight.grad = (1e-2 * matrix(*shape, 1)).to(dtype)
    for _ in range(3):
        optimizer.step()
    state = optimizer.state[model.weight]
    former = {key: basis.clone() for key, basis in state.items() if key.startswith("basis")}
    assert largest_allocation(optimizer.step) <= (1 << 18) * 4
    assert former
    assert not any(torch.equal(state[key], basis) for key, basis in former.items())


class Embedded(nn.Module):
    """A matrix that is not projected, and a small one that is."""

    def __init__(self, rows: int, columns: int, dtype: torch.dtype) -> None:
        super().__init__()
        self.embed = nn.Embedding(rows, columns, dtype=dtype)
        self.self_attn = nn.ModuleDict({"q_proj": nn.Linear(8, 8, bias=False, dtype=dtype)})


#: Full-rank baselines round to nearest.
BASELINES = ("adamw", "adamw_8bit", "adafactor")
ROUNDED = (
    "galore_adamw",
    "galore_adamw_8bit",
    "galore_adafactor",
    "coap_adafactor_8bit",
    "online_subspace_lion",
    "flora_adafactor",
)


@pytest.mark.parametrize("shape", [(1024, 768), (1031, 769)], ids=str)
@pytest.mark.parametrize(
    ("name", "dtype", "stochastic"),
    [
        *((n, d, False) for n in BASELINES + ROUNDED for d in (torch.float32, torch.bfloat16)),
        *((n, torch.bfloat16, True) for n in ROUNDED),
    ],
    ids=str,
)
def test_plain_parameters_need_no_temporary(
    name: str, shape: tuple[int, int], dtype: torch.dtype, stochastic: bool
) -> None:
    model = Embedded(*shape, dtype)
    options: dict[str, Any] = {"rank": 4}
    if stochastic:
        options["stochastic_rounding"] = True
    if "adafactor" in name:
        options["scale_parameter"] = True
    optimizer = build(name, model, lr=1e-3, **options)
    for param in model.parameters():
        param.grad = (1e-2 * matrix(*param.shape, 1)).to(dtype)
    optimizer.step()
    # A chunk and what its rule makes of it: fp32 entries whatever the weight's precision.
    assert largest_allocation(optimizer.step) <= (1 << 18) * 4


@pytest.mark.parametrize("name", ["galore_adafactor", "coap_adafactor"])
def test_the_weights_size_is_measured_in_chunks(name: str) -> None:
    model = Single(1024, 768, torch.bfloat16)
    optimizer = build(name, model, lr=1e-3, rank=RANK, scale_parameter=True)
    model.weight.grad = (1e-2 * matrix(1024, 768, 1)).bfloat16()
    optimizer.step()
    assert largest_allocation(optimizer.step) <= (1 << 18) * 4


def test_the_record_sees_temporaries() -> None:
    weight = torch.zeros(1024, 768)
    grad = torch.ones(1024, 768)

    def careless() -> None:
        weight.sub_(1e-3 * grad)

    assert largest_allocation(careless) >= weight.nbytes
    assert largest_allocation(lambda: weight.sub_(grad, alpha=1e-3)) < 1024
