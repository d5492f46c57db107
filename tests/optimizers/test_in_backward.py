"""Updates in the backward pass give the weights of the ordinary loop, with every optimizer."""

from __future__ import annotations

import io
import warnings
from collections.abc import Iterator

import pytest
import torch
from in_backward_runs import Run, backward, batch, distance, loss_of, make, row_of, unexamined
from support import tiny_model
from table import TABLE, Row, assert_same, every, representative
from torch import nn

from lowrank.optimizers import available, build, param_groups, update_in_backward

STEPS = 5  # with a refit in the first, the third and the fifth
FEW = 3


@pytest.fixture(autouse=True)
def quick() -> Iterator[None]:
    with unexamined(), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="norm='exact' with accumulation")
        yield


def test_the_table_has_every_method() -> None:
    assert {row.name for row in TABLE} == set(available())


@every
def test_weights_of_the_ordinary_loop(row: Row) -> None:
    own, other = Run(row).steps(range(STEPS)), Run(row, on=False).steps(range(STEPS))
    assert_same(own.model, other.model)


@representative
def test_with_accumulation(row: Row) -> None:
    compare(row, 4, None, FEW)


@representative
def test_with_clipping(row: Row) -> None:
    compare(row, 1, 0.3, FEW)


@representative
def test_with_clipping_and_accumulation(row: Row) -> None:
    compare(row, 4, 0.3, FEW)


@pytest.mark.slow
@every
@pytest.mark.parametrize("parts", [1, 4])
@pytest.mark.parametrize("clip", [None, 0.3])
def test_longer(row: Row, parts: int, clip: float | None) -> None:
    compare(row, parts, clip, 9)


def compare(row: Row, parts: int, clip: float | None, steps: int) -> None:
    own = Run(row, parts, clip).steps(range(steps))
    other = Run(row, parts, clip, on=False).steps(range(steps))
    assert distance(own.model, other.model) <= close(row)
    assert own.moved > 1e-3
    assert own.norms == pytest.approx(other.norms, rel=1e-5)
    assert clip is None or min(other.norms) > clip


def close(row: Row) -> float:
    """Roundings of the last bit may move a code of quantised moments or weights."""
    return row.slack if row.bits8 or row.int8 else 1e-6


# Other norms


@pytest.mark.parametrize("name", ["galore_adamw", "relora_adamw"])
@pytest.mark.parametrize("parts", [1, 3])
def test_clipping_by_the_last_norm(name: str, parts: int) -> None:
    """The first step isn't clipped; each other one by the norm of the step before it."""
    row, clip = row_of(name), 0.3
    own = Run(row, parts, clip, "previous").steps(range(STEPS))
    other, previous = Run(row, parts, on=False), None
    for step, norm in enumerate(own.norms):
        backward(other.model, step, parts)
        if parts == 1 or not row.projects:
            total = nn.utils.get_total_norm([param.grad for param in other.params])
            assert norm == pytest.approx(float(total), rel=1e-5)
        for param in other.params if previous is not None else ():
            param.grad.mul_(min(1.0, clip / (previous + 1e-6)))
        other.end_step()
        previous = norm
    assert distance(own.model, other.model) <= close(row)


@pytest.mark.parametrize("parts", [1, 3])
def test_clipping_by_the_projected_norm(parts: int) -> None:
    """Of the projections of what is not refitted, and of all other gradients."""
    row, clip = row_of("galore_adamw"), 0.3
    own = Run(row, parts, clip, "projected", gap=3).steps(range(STEPS))
    other = Run(row, parts, on=False, gap=3)
    for step, norm in enumerate(own.norms):
        backward(other.model, step, parts)
        used = []
        for group in other.optimizer.param_groups:
            for param in group["params"]:
                state = other.optimizer.state[param]
                fitted = group.get("rank") and step % 3
                basis = state["basis"] if fitted else None
                if basis is None:
                    used.append(param.grad)
                else:
                    left = basis.shape[0] == param.shape[0] and param.shape[0] < param.shape[1]
                    used.append(basis.mT @ param.grad if left else param.grad @ basis)
        total = float(nn.utils.get_total_norm(used))
        assert norm == pytest.approx(total, rel=1e-5)
        for param in other.params:
            param.grad.mul_(min(1.0, clip / (total + 1e-6)))
        other.end_step()
    assert distance(own.model, other.model) < 1e-6


@pytest.mark.parametrize("norm", ["exact", "projected", "previous"])
def test_an_infinite_bound_measures_and_clips_nothing(norm: str) -> None:
    row = row_of("galore_adamw")
    own = Run(row, 1, torch.inf, norm).steps(range(STEPS))
    assert distance(own.model, Run(row, on=False).steps(range(STEPS)).model) < 1e-6
    assert all(value is not None and value > 0.3 for value in own.norms)


@pytest.mark.parametrize("norm", ["exact", "projected"])
def test_a_norm_that_is_not_finite_skips_the_step(norm: str) -> None:
    """All of it, as `clip_grad_norm_` would have it for NaN; infinite norms are alike here."""
    own = Run(row_of("galore_adamw"), 1, 1.0, norm).steps(range(2))
    before = [param.detach().clone() for param in own.params]
    loss = loss_of(own.model, batch(2, 0))
    own.model.norm.weight.register_hook(lambda grad: torch.full_like(grad, torch.inf))
    loss.backward()
    with pytest.warns(UserWarning, match="non-finite gradient of"):
        own.end_step()
    assert all(map(torch.equal, before, own.params))
    assert own.optimizer.skipped == len(own.params)
    own.steps(range(3, 4))
    assert own.norms[2] == torch.inf


def test_one_gradient_that_is_not_finite_skips_its_parameter() -> None:
    own = Run(row_of("galore_adamw")).steps(range(2))
    before = [param.detach().clone() for param in own.params]
    loss = loss_of(own.model, batch(2, 0))
    hook = own.model.lm_head.weight.register_hook(lambda grad: grad * torch.nan)
    with pytest.warns(UserWarning, match=r"non-finite gradient of lm_head\.weight"):
        loss.backward()
    hook.remove()
    own.end_step()
    same = [torch.equal(a, b) for a, b in zip(before, own.params, strict=True)]
    assert sum(same) == own.optimizer.skipped == 1


# Other states of weights and groups


@pytest.mark.parametrize("name", ["adamw", "galore_adamw", "qgalore_adamw_8bit"])
@pytest.mark.parametrize("parts", [1, 2])
def test_half_precision_weights(name: str, parts: int) -> None:
    """Sums of projections are in fp32, so that accumulated ones differ by bf16's roundings."""
    runs = []
    for on in (True, False):
        model, made = make(name, torch.bfloat16, stochastic_rounding=name != "qgalore_adamw_8bit")
        handle = update_in_backward(made, parts) if on else None
        for step in range(STEPS):
            backward(model, step, parts)
            made.step()
            made.zero_grad()
        runs.append(model)
        assert handle is None or handle.norm is None
    assert distance(*runs) <= (0.0 if parts == 1 else 0.02)


def test_rates_of_groups_tensors_and_maximize() -> None:
    runs = []
    for on in (True, False):
        model = tiny_model()
        first, *rest = param_groups(model, rank=4, update_proj_gap=3)
        groups = [{**first, "lr": torch.tensor(3e-3), "maximize": True}]
        groups += [{**group, "lr": 1e-3 * (i + 1)} for i, group in enumerate(rest)]
        made = build("galore_adamw", model).__class__(groups)
        if on:
            update_in_backward(made, 2)
        for step in range(STEPS):
            made.param_groups[0]["lr"].mul_(0.9)
            made.param_groups[-1]["lr"] *= 0.8
            made.param_groups[-1]["weight_decay"] = 0.1 * step
            backward(model, step, 2)
            made.step()
            made.zero_grad()
        runs.append(model)
    assert distance(*runs) < 1e-6


def test_staggered_refits_with_experts_in_front() -> None:
    """What is due counts matrices, of which a parameter with experts has several."""
    runs = []
    for on in (True, False):
        torch.manual_seed(0)
        model = nn.ModuleDict({"experts": nn.Linear(8, 8), "attn": nn.Linear(16, 24, bias=False)})
        experts = nn.Parameter(torch.randn(3, 12, 16) * 0.1)
        params = [experts, model["attn"].weight]
        made = build("galore_adamw", model).__class__(
            [{"params": params, "rank": 4, "update_proj_gap": 4, "stagger": True}], lr=1e-2
        )
        if on:
            update_in_backward(made, 2)
        for step in range(9):
            for part in range(2):
                x = torch.randn(5, 16, generator=torch.Generator().manual_seed(2 * step + part))
                y = torch.einsum("bi,emi->bem", x, experts).square().sum()
                (y + model["attn"](x).pow(4).sum()).backward()
            made.step()
            made.zero_grad()
        runs.append(params)
    for own, other in zip(*runs, strict=True):
        torch.testing.assert_close(own, other, rtol=0, atol=1e-6)


# Saving and resuming


def saved(states: dict[str, object]) -> dict[str, object]:
    """As from a file."""
    buffer = io.BytesIO()
    torch.save(states, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=True)


KINDS = ("adamw", "galore_adamw", "coap_adafactor_8bit", "fira_adamw", "switchlora_adamw")


@pytest.mark.parametrize("name", KINDS)
def test_resuming_in_the_middle_of_an_accumulation(name: str) -> None:
    resume(row_of(name))


@pytest.mark.slow
@every
def test_every_method_resumes_in_the_middle_of_an_accumulation(row: Row) -> None:
    resume(row)


def resume(row: Row) -> None:
    def half(run: Run) -> None:
        for part in range(2):
            (loss_of(run.model, batch(3, part)) / 3).backward()

    def rest(run: Run) -> None:
        (loss_of(run.model, batch(3, 2)) / 3).backward()
        run.end_step()
        run.steps(range(4, 6))

    own = Run(row, 3, gap=5).steps(range(3))
    half(own)
    states = saved(own.states())
    other = Run(row, 3, gap=5)
    other.load(states)
    rest(own)
    rest(other)
    assert_same(own.model, other.model)


@pytest.mark.parametrize("norm", ["exact", "projected", "previous"])
@pytest.mark.parametrize("parts", [1, 2])
def test_resuming_with_clipping(norm: str, parts: int) -> None:
    row = row_of("galore_adamw")
    own = Run(row, parts, 0.3, norm, gap=5).steps(range(3))
    if norm == "previous":
        (loss_of(own.model, batch(3, 0)) / parts).backward() if parts > 1 else None
    else:
        backward(own.model, 3, parts)  # all that is left is the step
    states = saved(own.states())
    other = Run(row, parts, 0.3, norm, gap=5)
    other.load(states)
    for run in (own, other):
        if norm == "previous":
            for part in range(parts - 1, parts):
                (loss_of(run.model, batch(3, part)) / parts).backward()
        run.end_step()
        run.steps(range(4, 6))
    assert_same(own.model, other.model)
    assert own.norms[3:] == other.norms


def test_a_state_between_steps_is_the_ordinary_one() -> None:
    row = row_of("galore_adamw")
    own, other = Run(row).steps(range(3)), Run(row, on=False)
    other.load(saved(own.states()))
    assert_same(own.steps(range(3, 6)).model, other.steps(range(3, 6)).model)
