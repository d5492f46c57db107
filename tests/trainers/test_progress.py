"""The progress line: at each width, in a log, on a terminal and after an interrupt."""

from __future__ import annotations

import io
import math
import re

import pytest
from rich.console import Console

from lowrank.trainers.progress import (
    DebiasedMean,
    Status,
    TrainingProgress,
    fit_fields,
    status_fields,
)

HIDE_CURSOR, SHOW_CURSOR = "\x1b[?25l", "\x1b[?25h"


class Clock:
    """Seconds that pass only when told to."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def log_console(width: int = 80) -> Console:
    return Console(file=io.StringIO(), force_terminal=False, width=width)


def terminal(width: int = 80) -> Console:
    return Console(file=io.StringIO(), force_terminal=True, width=width, _environ={"TERM": "xterm"})


def written(console: Console) -> str:
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def visible(text: str) -> str:
    return re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", text).replace("\r", "\n")


def advance(progress: TrainingProgress, step: int, *, loss: float = 5.0) -> None:
    progress.update(
        step, loss=loss, learning_rate=0.01, tokens_per_second=7421.0, memory_bytes=955 * 2**20
    )


STATUS = Status(
    step=120,
    total_steps=600,
    loss=5.1234,
    learning_rate=9.8e-3,
    tokens_per_second=7421.0,
    memory_bytes=955 * 2**20,
    elapsed=80.0,
    remaining=310.0,
)


def test_mean_is_debiased_and_skips_what_is_not_finite() -> None:
    mean = DebiasedMean(0.9)
    assert mean.value is None
    mean.add(math.nan)
    assert mean.value is None
    mean.add(4.0)
    assert mean.value == pytest.approx(4.0)
    mean.add(math.inf)
    mean.add(2.0)
    assert mean.value == pytest.approx((0.9 * 0.1 * 4.0 + 0.1 * 2.0) / (1 - 0.81))


@pytest.mark.parametrize("smoothing", [-0.1, 1.0, 2.0])
def test_mean_rejects_a_smoothing_outside_its_range(smoothing: float) -> None:
    with pytest.raises(ValueError, match=r"smoothing is .*\[0, 1\)"):
        DebiasedMean(smoothing)


def test_wide_line_shows_everything() -> None:
    texts, bar = fit_fields(status_fields(STATUS), 120)
    assert texts == [
        "120/600",
        "loss 5.123",
        "ppl 167.9",
        "lr 0.0098",
        "7.42k tok/s",
        "955 MiB",
        "1:20",
        "ETA 5:10",
    ]
    assert bar >= 20


@pytest.mark.parametrize("width", [20, 40, 60, 80, 100, 120, 200])
@pytest.mark.parametrize("steps", [600, 150_000])
def test_line_fits_its_width(width: int, steps: int) -> None:
    status = Status(steps, steps, 10.51234, 1e-3, 123_456.0, 78.5 * 2**30, 1e5, 2e5)
    texts, bar = fit_fields(status_fields(status), width)
    assert texts[0] == f"{steps}/{steps}"
    assert any(text.startswith("loss") for text in texts)
    assert any(text.startswith("ETA") for text in texts)
    if width >= 60:
        assert bar + sum(len(text) + 2 for text in texts) <= width + 2


def test_eighty_columns_keep_everything_but_the_time_passed() -> None:
    texts, bar = fit_fields(status_fields(STATUS), 80)
    shown = " ".join(texts)
    assert bar >= 4
    assert all(word in shown for word in ("120/600", "loss", "ppl", "lr", "tok/s", "MiB", "ETA"))


def test_bar_goes_before_the_learning_rate() -> None:
    texts, bar = fit_fields(status_fields(STATUS), 75)
    assert bar == 0
    assert "lr 0.0098" in texts


def test_log_has_a_line_at_most_every_ten_seconds_and_one_at_the_end() -> None:
    clock, console = Clock(), log_console()
    with TrainingProgress(40, console=console, clock=clock) as progress:
        for step in range(1, 36):
            clock.now += 1.0
            advance(progress, step)
    lines = written(console).splitlines()
    steps = [int(line.split("/")[0].removeprefix("step ")) for line in lines]
    assert steps == [1, 11, 21, 31, 35]
    assert "\x1b" not in written(console)
    assert "loss 5.000  ppl 148.4  lr 0.01  7.42k tok/s  955 MiB" in lines[-1]


def test_log_lines_are_not_wrapped_in_a_narrow_console() -> None:
    console = log_console(width=30)
    with TrainingProgress(10, console=console) as progress:
        advance(progress, 1)
        progress.message("a message of more than thirty columns stays on one line")
    assert len(written(console).splitlines()) == 2


def test_last_line_is_not_written_twice() -> None:
    clock, console = Clock(), log_console()
    with TrainingProgress(1, console=console, clock=clock) as progress:
        advance(progress, 1)
    assert len(written(console).splitlines()) == 1


def test_time_left_follows_the_pace_of_a_resumed_run() -> None:
    clock = Clock()
    with TrainingProgress(600, start_step=500, console=log_console(), clock=clock) as progress:
        assert progress.status().step == 500
        assert progress.status().remaining is None
        for step in range(501, 511):
            clock.now += 2.0
            advance(progress, step)
        assert progress.status().remaining == pytest.approx(180.0)
        clock.now += 5.0
        assert progress.status().remaining == pytest.approx(175.0)
        assert progress.status().elapsed == pytest.approx(25.0)


def test_finished_run_has_no_time_left() -> None:
    with TrainingProgress(2, console=log_console()) as progress:
        advance(progress, 2)
        assert progress.status().remaining == 0.0


def test_loss_that_is_not_finite_leaves_the_average() -> None:
    with TrainingProgress(5, console=log_console()) as progress:
        advance(progress, 1, loss=3.0)
        advance(progress, 2, loss=math.nan)
        assert progress.status().loss == pytest.approx(3.0)


def test_not_enabled_is_silent() -> None:
    console = terminal()
    with TrainingProgress(5, enabled=False, console=console) as progress:
        advance(progress, 1)
        progress.message("hidden")
    assert written(console) == ""


def test_terminal_shows_one_live_line_within_its_width() -> None:
    console = terminal(80)
    with TrainingProgress(600, console=console) as progress:
        advance(progress, 120)
    lines = [line.rstrip() for line in visible(written(console)).splitlines()]
    assert max(map(len, lines)) <= 80
    final = [line for line in lines if "120/600" in line][-1]
    assert "loss 5.000" in final
    assert "7.42k tok/s" in final


def test_message_stands_above_the_line_without_markup() -> None:
    console = terminal()
    with TrainingProgress(600, console=console) as progress:
        advance(progress, 7)
        progress.message("saved [bold]step-7[/bold]")
    text = visible(written(console))
    assert "saved [bold]step-7[/bold]" in text
    assert text.rindex("7/600") > text.index("saved")


def test_interrupt_gives_the_cursor_back() -> None:
    console = terminal()
    progress = TrainingProgress(600, console=console)

    def interrupted() -> None:
        with progress:
            advance(progress, 3)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    text = written(console)
    assert text.rindex(SHOW_CURSOR) > text.rindex(HIDE_CURSOR)
    assert visible(text).endswith("\n")


def test_dumb_terminal_gets_plain_lines() -> None:
    console = Console(file=io.StringIO(), force_terminal=True, _environ={"TERM": "dumb"})
    with TrainingProgress(600, console=console) as progress:
        advance(progress, 3)
    assert HIDE_CURSOR not in written(console)
    assert "step 3/600" in written(console)


@pytest.mark.parametrize(("total", "start"), [(-1, 0), (10, 11), (10, -1)])
def test_impossible_steps_are_named(total: int, start: int) -> None:
    with pytest.raises(ValueError, match=r"(total_steps|start_step) is -?\d+"):
        TrainingProgress(total, start_step=start)
