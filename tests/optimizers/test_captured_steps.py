"""Captured steps draw new numbers at each replay, those that steps outside of a graph draw."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from recorded import Recorded
from support import capturing, matrix
from torch import Tensor, nn

from lowrank.cuda import status
from lowrank.cuda.noise import mix, random_bits, signed_seed, step_seeds, uniform
from lowrank.optimizers import LowRankOptimizer, build
from lowrank.optimizers.engine import devices
from lowrank.optimizers.weights import QuantizedWeight

pytestmark = pytest.mark.skipif(
    status("host").library is None, reason="the host's library is not compiled"
)

#: Directions of the same bits, whether the device or the host knows the step.
EXACT: dict[str, Any] = {"correct_bias": False}
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "bf16": ("galore_adamw", {"stochastic_rounding": True, **EXACT}),
    "bf16, residual": ("fira_adamw", {"stochastic_rounding": True}),
    "bf16, edit": ("frugal_adamw", {"stochastic_rounding": True, "moments": "keep"}),
    "bf16, plain": ("adamw", {"stochastic_rounding": True}),
    "eight bits": ("galore_adamw", {"weight_bits": 8, **EXACT}),
    "eight bits, 8-bit moments": ("qgalore_adamw_8bit", {"min_8bit_size": 256}),
    "four bits": ("galore_adamw", {"weight_bits": 4, **EXACT}),
}


class Layers(nn.Module):
    """Matrices of two shapes, and a plain one."""

    def __init__(self) -> None:
        super().__init__()
        for number in range(2):
            for place, (m, n) in enumerate(((64, 48), (48, 64))):
                layer = nn.Linear(n, m, bias=False, dtype=torch.bfloat16)
                setattr(self, f"mlp_{number}_{place}", layer)
        self.head = nn.Linear(48, 32, bias=False, dtype=torch.bfloat16)
        for index, weight in enumerate(self.parameters()):
            weight.data.copy_(matrix(*weight.shape, index) * 0.05)


def gradients(model: nn.Module, step: int) -> None:
    """Into the memory where the last ones were."""
    for index, weight in enumerate(model.parameters()):
        grad = matrix(*weight.shape, 100 * step + index).to(torch.bfloat16)
        if weight.grad is None:
            weight.grad = grad
        else:
            weight.grad.copy_(grad)


def made(name: str, *, capturable: bool, **options: Any) -> tuple[nn.Module, LowRankOptimizer]:
    model = Layers()
    rank = {} if name == "adamw" else {"rank": 8, "update_proj_gap": 50}
    given = {"lr": 1e-3, "weight_decay": 0.1, **rank, **options}
    return model, build(name, model, capturable=capturable, **given)


def entries(model: nn.Module) -> list[Tensor]:
    weights = [weight.detach() for weight in model.parameters()]
    return [w.dequantize() if isinstance(w, QuantizedWeight) else w.clone() for w in weights]


def trained(name: str, steps: int, *, capturable: bool, **options: Any) -> list[list[Tensor]]:
    """The weights after each step outside of a graph."""
    model, optimizer = made(name, capturable=capturable, **options)
    found = []
    for step in range(steps):
        gradients(model, step)
        optimizer.step()
        found.append(entries(model))
    return found


def replayed(name: str, steps: int, **options: Any) -> list[list[Tensor]]:
    """The same with all steps but the first replayed."""
    model, optimizer = made(name, capturable=True, **options)
    gradients(model, 0)
    optimizer.step()
    found = [entries(model)]
    gradients(model, 1)
    # Recording runs the step once, which capturing doesn't.
    with capturing(), Recorded() as graph:
        optimizer.step()
    found.append(entries(model))
    for step in range(2, steps):
        gradients(model, step)
        graph.replay()
        found.append(entries(model))
    return found


@pytest.mark.parametrize("rate", [1e-3, torch.tensor(1e-3)], ids=["number", "tensor"])
@pytest.mark.parametrize("case", CASES)
def test_replays_go_where_steps_go(case: str, rate: float | Tensor) -> None:
    name, options = CASES[case]
    with devices.as_on_gpu():
        ours = replayed(name, 4, lr=rate, **options)
        outside = trained(name, 4, capturable=True, lr=rate, **options)
        host = trained(name, 4, capturable=False, lr=1e-3, **options)
    for captured, plain, known in zip(ours, outside, host, strict=True):
        for a, b, c in zip(captured, plain, known, strict=True):
            assert torch.equal(a, b)
            # Other noise turns six of ten entries and more; a step size that is rounded turns few.
            assert float((a != c).float().mean()) < 0.2
    if "correct_bias" in options and not isinstance(rate, Tensor):
        for captured, known in zip(ours, host, strict=True):
            assert all(map(torch.equal, captured[:-1], known[:-1]))


def test_seeds_by_step_counts_on_a_device_are_those_of_the_host() -> None:
    names, steps = ["a", "layers.3.weight", "b"] * 200, [0, 1, 2, 77, 1 << 23] * 120
    counts = [torch.tensor(float(step)) for step in steps]
    found = step_seeds([mix(11, name) for name in names], counts, "rounding")
    wanted = [signed_seed(mix(11, n, s, "rounding")) for n, s in zip(names, steps, strict=True)]
    assert found.tolist() == wanted


@pytest.mark.parametrize("number", [0, 5, (1 << 63) + 12345, (1 << 64) - 1])
def test_a_seed_in_a_tensor_is_the_same_seed(number: int) -> None:
    held = torch.tensor(signed_seed(number))
    for first in (0, 7, 1 << 33):
        assert torch.equal(random_bits(500, held, first), random_bits(500, number, first))
    turn = torch.tensor(123_456)
    assert torch.equal(uniform(500, held, 3, turn=turn), uniform(500, number, 3, turn=123_456))


def test_a_capture_without_the_option_speaks() -> None:
    model, optimizer = made("galore_adamw", capturable=False)
    gradients(model, 0)
    optimizer.step()
    before = entries(model)
    with capturing(), pytest.raises(ValueError, match=r"group 0 with capturable=False"):
        optimizer.step()
    assert all(map(torch.equal, before, entries(model)))


@pytest.mark.parametrize("name", ["galore_adamw", "fira_adamw", "galore_adamw_8bit", "adamw"])
def test_on_a_cpu_gradients_are_checked_with_the_option(name: str) -> None:
    model, optimizer = made(name, capturable=True)
    gradients(model, 0)
    optimizer.step()
    before = entries(model)
    gradients(model, 1)
    for param in model.parameters():
        param.grad.view(-1)[0] = torch.nan
    with pytest.warns(UserWarning, match="non-finite gradient of"):
        optimizer.step()
    assert all(map(torch.equal, before, entries(model)))
    assert optimizer.skipped == len(list(model.parameters()))


def test_the_rate_of_what_is_not_projected_stays_a_tensor() -> None:
    rate = torch.tensor(1e-3)
    model, _ = made("galore_adamw", capturable=True)
    optimizer = build("galore_adamw", model, lr=1e-2, plain_lr=rate, capturable=True)
    assert optimizer.param_groups[-1]["lr"] is rate


def test_the_recording_refuses_what_reads() -> None:
    flags = torch.tensor([True, False])
    for reading in (lambda: flags.any().item(), lambda: flags.nonzero(), lambda: flags[flags]):
        with Recorded(), pytest.raises(AssertionError):
            reading()
