import math

import pytest
import torch

from lowrank.trainers.config import RunConfig, ScheduleConfig, TrainConfig, warmup_steps
from lowrank.trainers.schedules import (
    constant,
    cosine,
    cosine_restarts,
    lambda_lr,
    linear,
    multiplier,
    run_multiplier,
    warmup,
    wsd,
)

NAMES = ["cosine", "linear", "wsd", "constant"]


def test_warmup_starts_above_zero_and_reaches_one() -> None:
    assert [warmup(step, 4) for step in range(6)] == [0.2, 0.4, 0.6, 0.8, 1.0, 1.0]
    assert warmup(0, 0) == 1.0


@pytest.mark.parametrize("name", NAMES)
def test_peak_is_reached_at_the_end_of_warmup_and_never_passed(name: str) -> None:
    config = ScheduleConfig(name=name, min_ratio=0.1)
    values = [multiplier(config, step, 100, 10) for step in range(101)]
    assert values[10] == 1.0
    assert max(values) == 1.0
    assert values[:11] == sorted(values[:11])
    assert values[10:] == sorted(values[10:], reverse=True)


@pytest.mark.parametrize("name", ["cosine", "linear", "wsd"])
@pytest.mark.parametrize("least", [0.0, 0.1, 1.0])
def test_falling_schedules_end_at_the_ratio_and_stay(name: str, least: float) -> None:
    config = ScheduleConfig(name=name, min_ratio=least)
    assert multiplier(config, 100, 100, 10) == pytest.approx(least, abs=1e-12)
    assert multiplier(config, 150, 100, 10) == pytest.approx(least, abs=1e-12)
    if least < 1:
        assert multiplier(config, 99, 100, 10) > least


def test_half_way_values() -> None:
    assert cosine(60, 110, 10, 0.1) == pytest.approx(0.55)
    assert linear(60, 110, 10, 0.1) == pytest.approx(0.55)
    assert cosine(35, 110, 10, 0.0) == pytest.approx(0.5 * (1 + math.cos(math.pi / 4)))
    assert constant(5, 9) == 0.6


def test_wsd_is_flat_until_the_decay() -> None:
    assert [wsd(step, 100, 10, 20, 0.0) for step in (10, 50, 80)] == [1.0, 1.0, 1.0]
    assert wsd(90, 100, 10, 20, 0.0) == pytest.approx(0.5)
    assert wsd(81, 100, 10, 20, 0.0) == pytest.approx(0.95)


@pytest.mark.parametrize("name", NAMES)
def test_degenerate_lengths(name: str) -> None:
    config = ScheduleConfig(name=name, warmup_ratio=0.0, decay_ratio=0.0)
    assert multiplier(config, 0, 1, 0) == 1.0
    assert 0 < multiplier(config, 0, 1, 1) <= 1.0


def test_run_multiplier_takes_warmup_as_a_share_of_the_steps() -> None:
    config = RunConfig(train=TrainConfig(steps=50), schedule=ScheduleConfig(warmup_ratio=0.1))
    assert warmup_steps(config) == 5
    assert run_multiplier(config, 0) == pytest.approx(1 / 6)
    assert run_multiplier(config, 5) == 1.0


def test_lambda_lr_follows_the_same_course() -> None:
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=0.5)
    config = ScheduleConfig(name="linear", min_ratio=0.0)
    scheduler = lambda_lr(optimizer, config, 10, 2)
    for step in range(10):
        expected = 0.5 * multiplier(config, step, 10, 2)
        assert optimizer.param_groups[0]["lr"] == pytest.approx(expected)
        optimizer.step()
        scheduler.step()


def test_cosine_restarts_rises_back_to_one_envelope() -> None:
    total, first, cycle, again = 100, 10, 25, 5

    def value(step: int) -> float:
        return cosine_restarts(step, total, first, 0.1, cycle, again)

    for step in range(total):
        since, envelope = step % cycle, cosine(step, total, first, 0.1)
        if step < cycle or since >= again:
            assert value(step) == envelope
        else:
            top = cosine(step - since + again, total, first, 0.1)
            assert value(step) == pytest.approx(top * (since + 1) / (again + 1))
    assert value(24) > 4 * value(25)
    # the released code's formula, where no warmup is in progress
    for step in range(30, 50):
        angle = math.pi * (step - first) / (total - first)
        assert value(step) == pytest.approx(0.1 + 0.9 * 0.5 * (1 + math.cos(angle)))


@pytest.mark.parametrize(
    ("settings", "key"),
    [({"cycle": 0}, "schedule.cycle"), ({"cycle": 5, "restart_warmup": 5}, "restart_warmup")],
)
def test_cosine_restarts_needs_a_cycle(settings: dict[str, int], key: str) -> None:
    with pytest.raises(ValueError, match=key):
        ScheduleConfig(name="cosine_restarts", **settings)
