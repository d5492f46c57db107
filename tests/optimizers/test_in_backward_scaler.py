"""Updates that wait for a GradScaler are those of the ordinary loop with it."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from in_backward_runs import batch, distance, loss_of, row_of, unchanged, unexamined
from support import tiny_model
from table import Row, every, representative
from torch import nn

from lowrank.optimizers import update_in_backward

STEPS = 5  # with a refit in the first, the third and the fifth


@pytest.fixture(autouse=True)
def quick() -> Iterator[None]:
    with unexamined(), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="norm='exact' with accumulation")
        yield


class Scaled:
    """A loop with a scaler."""

    def __init__(self, row: Row, max_norm: float, norm: Any, parts: int, *, on: bool) -> None:
        self.model = row.prepare(tiny_model())
        given = {} if "update_proj_gap" in row.options else {"update_proj_gap": 2}
        self.optimizer = row.build(self.model, **given)
        self.scaler = torch.amp.GradScaler("cpu", init_scale=256.0, growth_interval=2)
        self.parts, self.max_norm, self.norms = parts, max_norm, []
        self.handle = update_in_backward(self.optimizer, parts, max_norm, norm) if on else None

    def step(self, number: int, spoilt: str | None = None, value: float = math.inf) -> None:
        """A step; the gradient of the spoilt parameter has an entry that is not finite."""
        hook = None
        if spoilt is not None:
            param = self.model.get_parameter(spoilt)

            def spoil(grad: torch.Tensor) -> torch.Tensor:
                grad = grad.clone()
                grad.view(-1)[0] = value
                return grad

            hook = param.register_hook(spoil)
        for part in range(self.parts):
            loss = loss_of(self.model, batch(number, part)) / self.parts
            self.scaler.scale(loss).backward()
        if hook is not None:
            hook.remove()
        params = [param for group in self.optimizer.param_groups for param in group["params"]]
        if self.handle is None:
            self.scaler.unscale_(self.optimizer)
            self.norms.append(float(nn.utils.clip_grad_norm_(params, self.max_norm)))
        self.scaler.step(self.optimizer)
        if self.handle is not None:
            self.norms.append(self.handle.norm)
            assert all(param.grad is None for param in params)
        self.scaler.update()
        self.optimizer.zero_grad()


def pair(row: Row, max_norm: float, norm: str, parts: int) -> list[Scaled]:
    return [Scaled(row, max_norm, norm, parts, on=on) for on in (True, False)]


def compare(row: Row, max_norm: float, norm: str, parts: int) -> None:
    own, other = pair(row, max_norm, norm, parts)
    for step in range(STEPS):
        for run in (own, other):
            run.step(step)
    slack = row.slack if row.bits8 or row.int8 else 1e-6
    assert distance(own.model, other.model) <= slack
    assert own.scaler.get_scale() == other.scaler.get_scale() > 256
    if norm == "exact":
        assert own.norms == pytest.approx(other.norms, rel=1e-5)
        assert max_norm == math.inf or min(other.norms) > max_norm


@pytest.mark.parametrize("name", ["adamw", "galore_adamw", "relora_adamw"])
@pytest.mark.parametrize(("parts", "norm"), [(1, "exact"), (2, "projected")])
def test_the_steps_of_the_ordinary_loop(name: str, parts: int, norm: str) -> None:
    compare(row_of(name), math.inf, norm, parts)


@pytest.mark.slow
@representative
@pytest.mark.parametrize("parts", [1, 2])
def test_clipped(row: Row, parts: int) -> None:
    compare(row, 0.3, "exact", parts)


@pytest.mark.exhaustive
@every
@pytest.mark.parametrize("parts", [1, 2])
def test_every_method_clipped(row: Row, parts: int) -> None:
    compare(row, 0.3, "exact", parts)


@pytest.mark.parametrize("spoilt", ["self_attn.q_proj.weight", "norm.weight", "lm_head.weight"])
@pytest.mark.parametrize("norm", ["exact", "projected"])
def test_skipped_steps(spoilt: str, norm: str) -> None:
    """Nothing changes, no step is counted, and the scaler backs off."""
    own, other = pair(row_of("galore_adamw"), math.inf, norm, 1)
    for step, value in enumerate((None, math.nan, None, math.inf, None)):
        for run in (own, other):
            check = unchanged(run.model)
            run.step(step, None if value is None else spoilt, value or 0.0)
            if value is not None:
                check()
                assert not math.isfinite(run.norms[-1])
        assert own.scaler.get_scale() == other.scaler.get_scale(), step
    assert distance(own.model, other.model) < 1e-6
    assert own.optimizer.skipped == other.optimizer.skipped == 0
    for first, second in zip(own.model.parameters(), other.model.parameters(), strict=True):
        own_steps, steps = (
            run.optimizer.state[param]["step"] for run, param in ((own, first), (other, second))
        )
        assert float(own_steps) == float(steps) == 3


def test_the_first_step_is_skipped_before_the_scaler_is_known() -> None:
    """Nothing changes; only the scaler learns of it later."""
    own = Scaled(row_of("galore_adamw"), 1.0, "exact", 1, on=True)
    own.step(0)
    own.optimizer._in_backward._scaled = False
    check = unchanged(own.model)
    own.step(1, "self_attn.q_proj.weight")
    check()
    assert own.scaler.get_scale() == 512
    own.step(2, "self_attn.q_proj.weight")
    check()
    assert own.scaler.get_scale() == 256
