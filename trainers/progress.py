"""The line a person watches while a model trains.

On a terminal it is one live line that redraws itself; in a log file, a plain line now and then.
"""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from types import TracebackType
from typing import Self

from rich.cells import cell_len
from rich.console import Console, ConsoleOptions, RenderResult
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from .units import (
    MISSING,
    format_bytes,
    format_count,
    format_duration,
    format_loss,
    format_perplexity,
    perplexity,
)

PLAIN_INTERVAL = 10.0  # seconds between two lines of a log
_REFRESHES_PER_SECOND = 4  # enough to look alive, too few to take time from training
_SPEED_WINDOW = 100  # updates over which the time left is judged
_SMOOTHING = 0.95
_GAP = 2  # columns between two fields
_MIN_BAR, _MAX_BAR = 4, 40
_FINAL_FIELDS = 3  # fields that are never dropped, however narrow the terminal


class DebiasedMean:
    """Exponential moving average whose first values are not pulled towards zero.

    Args:
        smoothing: Weight of the past in each update, in [0, 1).
    """

    def __init__(self, smoothing: float = _SMOOTHING) -> None:
        if not 0 <= smoothing < 1:
            raise ValueError(f"smoothing is {smoothing}; a number in [0, 1) is accepted")
        self._smoothing = smoothing
        self._sum = 0.0
        self._weight = 0.0

    def add(self, value: float) -> None:
        """Takes one value in; a value that is not finite (a skipped step) is left out."""
        if not math.isfinite(value):
            return
        self._sum = self._smoothing * self._sum + (1 - self._smoothing) * value
        self._weight = self._smoothing * self._weight + (1 - self._smoothing)

    @property
    def value(self) -> float | None:
        """The average so far, None before the first finite value."""
        return self._sum / self._weight if self._weight else None


@dataclass(frozen=True)
class Status:
    """Everything the line shows, at one moment.

    Attributes:
        step: Completed optimizer steps.
        total_steps: Steps of the whole run.
        loss: Smoothed training loss in nats per token, None before the first.
        learning_rate: Of the step just done.
        tokens_per_second: Smoothed like the loss, None before the first.
        memory_bytes: In use, as the caller measures it.
        elapsed: Seconds since this process began to train.
        remaining: Expected seconds to the end, None while unknown.
    """

    step: int
    total_steps: int
    loss: float | None
    learning_rate: float | None
    tokens_per_second: float | None
    memory_bytes: float | None
    elapsed: float
    remaining: float | None


def status_fields(status: Status) -> list[tuple[str, int]]:
    """Lists the line's fields in display order, each with a rank: high ranks are dropped first."""
    shown_perplexity = None if status.loss is None else perplexity(status.loss)
    rate = MISSING if status.learning_rate is None else f"{status.learning_rate:.2g}"
    return [
        (f"{status.step}/{status.total_steps}", 0),
        (f"loss {format_loss(status.loss)}", 1),
        (f"ppl {format_perplexity(shown_perplexity)}", 4),
        (f"lr {rate}", 6),
        (f"{format_count(status.tokens_per_second)} tok/s", 3),
        (format_bytes(status.memory_bytes), 5),
        (format_duration(status.elapsed), 7),
        (f"ETA {format_duration(status.remaining)}", 2),
    ]


def fit_fields(fields: list[tuple[str, int]], width: int) -> tuple[list[str], int]:
    """Chooses what fits on one line.

    Args:
        fields: As from `status_fields`.
        width: Columns of the terminal.

    Returns:
        The texts to show in order, and the bar's width in columns (0: no bar).
    """
    kept = list(fields)
    while True:
        texts = [text for text, _ in kept]
        room = width - sum(cell_len(text) + _GAP for text in texts)
        if room >= _MIN_BAR:
            return texts, min(room, _MAX_BAR)
        # The least of the fields goes before the bar, the bar before any other field.
        if len(kept) < len(fields) and room + _GAP >= 0:
            return texts, 0
        if len(kept) <= _FINAL_FIELDS:
            return texts, 0
        kept.remove(max(kept, key=lambda field: field[1]))


class _Line:
    """Renders a status to the width it is given."""

    def __init__(self, status: Callable[[], Status]) -> None:
        self._status = status

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        status = self._status()
        texts, bar_width = fit_fields(status_fields(status), options.max_width)
        line = Table.grid(padding=(0, _GAP, 0, 0))
        cells: list[Text | ProgressBar] = []
        if bar_width:
            cells.append(
                ProgressBar(
                    total=max(status.total_steps, 1), completed=status.step, width=bar_width
                )
            )
            line.add_column(width=bar_width, no_wrap=True)
        for index, text in enumerate(texts):
            line.add_column(no_wrap=True)
            cells.append(Text(text, style="bold" if index <= 1 else ""))
        line.add_row(*cells)
        yield line


class TrainingProgress:
    """Shows how training goes; a context manager.

    Args:
        total_steps: Optimizer steps of the whole run.
        start_step: Steps already done when this process began (a resumed run).
        enabled: False shows nothing at all, for the processes that are not the first.
        console: Where to write; standard error when None.
        clock: Monotonic seconds, for tests.

    Raises:
        ValueError: A step count is negative, or `start_step` lies past `total_steps`.
    """

    def __init__(
        self,
        total_steps: int,
        *,
        start_step: int = 0,
        enabled: bool = True,
        console: Console | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        if total_steps < 0:
            raise ValueError(f"total_steps is {total_steps}; 0 or more is accepted")
        if not 0 <= start_step <= total_steps:
            raise ValueError(f"start_step is {start_step}; 0 to {total_steps} is accepted")
        self._total_steps = total_steps
        self._enabled = enabled
        self._console = console if console is not None else Console(stderr=True)
        self._clock = clock
        self._loss = DebiasedMean()
        self._step = start_step
        self._learning_rate: float | None = None
        self._tokens_per_second = DebiasedMean()
        self._memory_bytes: float | None = None
        self._began = clock()
        self._recent: deque[tuple[int, float]] = deque(maxlen=_SPEED_WINDOW)
        self._last_line_at = -math.inf
        self._unwritten = False
        self._live: Live | None = None

    def __enter__(self) -> Self:
        self._began = self._clock()
        self._recent.append((self._step, self._began))
        if self._enabled and self._console.is_terminal and not self._console.is_dumb_terminal:
            self._live = Live(
                _Line(self.status),
                console=self._console,
                refresh_per_second=_REFRESHES_PER_SECOND,
                # The library's own wrapping of stdout and stderr would outlive an interrupt.
                redirect_stdout=False,
                redirect_stderr=False,
            )
            self._live.start(refresh=True)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._live is not None:
            # stop() draws the last state once more and gives the cursor back, interrupted or not.
            self._live.stop()
            self._live = None
        elif self._unwritten:
            self._write_plain()

    def update(
        self,
        step: int,
        *,
        loss: float,
        learning_rate: float,
        tokens_per_second: float,
        memory_bytes: int,
    ) -> None:
        """Takes in one completed step.

        Args:
            step: Completed optimizer steps, counted from the start of the run.
            loss: Training loss of this step in nats per token; NaN is left out of the average.
            learning_rate: Of this step.
            tokens_per_second: Throughput of this step; shown smoothed, like the loss.
            memory_bytes: Memory in use.
        """
        if not self._enabled:
            return
        now = self._clock()
        self._step = step
        self._loss.add(loss)
        self._learning_rate = learning_rate
        self._tokens_per_second.add(tokens_per_second)
        self._memory_bytes = memory_bytes
        self._recent.append((step, now))
        self._unwritten = True
        if self._live is None and now - self._last_line_at >= PLAIN_INTERVAL:
            self._write_plain()

    def message(self, text: str) -> None:
        """Prints a line above the bar, as it stands (no markup)."""
        if self._enabled:
            self._console.print(text, markup=False, highlight=False, soft_wrap=True)

    def status(self) -> Status:
        """Returns what the line shows now."""
        return Status(
            step=self._step,
            total_steps=self._total_steps,
            loss=self._loss.value,
            learning_rate=self._learning_rate,
            tokens_per_second=self._tokens_per_second.value,
            memory_bytes=self._memory_bytes,
            elapsed=self._clock() - self._began,
            remaining=self._remaining(),
        )

    def _remaining(self) -> float | None:
        """Expected seconds to the end, from the pace of the last steps, evaluations included."""
        if self._step >= self._total_steps:
            return 0.0
        if len(self._recent) < 2:
            return None
        (first_step, first_time), (last_step, last_time) = self._recent[0], self._recent[-1]
        if last_step <= first_step:
            return None
        pace = (last_time - first_time) / (last_step - first_step)
        # Counting down between two steps keeps a slow step from looking like a hang.
        spent = self._clock() - last_time
        return max(pace * (self._total_steps - last_step) - spent, 0.0)

    def _write_plain(self) -> None:
        texts = [text for text, _ in status_fields(self.status())]
        line = "step " + "  ".join(texts)
        self._console.print(line, markup=False, highlight=False, soft_wrap=True)
        self._last_line_at = self._clock()
        self._unwritten = False
