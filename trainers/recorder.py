"""Where a run's numbers go: metrics.jsonl, the progress bar and, when asked, Weights & Biases."""

from __future__ import annotations

import secrets
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol, Self

from rich.console import Console

from .config import RunConfig
from .config_io import to_mapping
from .evaluation import Evaluation
from .measured_steps import Found
from .metrics import MetricsWriter
from .missing import require
from .progress import TrainingProgress
from .state import TrainState
from .units import format_bytes


class LayerEvent(Protocol):
    """An optimizer's event of its layers."""

    @property
    def kind(self) -> str:
        """Its name: "merge", "switch", "resample", ..."""

    @property
    def layers(self) -> int:
        """Number of layers."""


class RefreshEvent(Protocol):
    """An optimizer's refresh of one matrix's basis."""

    @property
    def seconds(self) -> float:
        """Time it took."""

    @property
    def captured_energy(self) -> float:
        """Share of the gradient's squared norm inside the new subspace."""

    @property
    def overlap(self) -> float | None:
        """Mean squared cosine between the new and the previous basis; None at first."""


class Recorder:
    """Writes records; only the leading process does anything.

    Args:
        folder: the run's folder.
        config: the run's settings.
        state: the run's counters at its start or resumption.
        leads: whether this process writes at all.
        console: shows progress.
    """

    def __init__(
        self, folder: Path, config: RunConfig, state: TrainState, *, leads: bool, console: Console
    ) -> None:
        self._stack = ExitStack()
        self._leads = leads
        self._bar = config.log.progress
        self._console = console
        self._metrics: MetricsWriter | None = None
        self._wandb: Any = None
        self._progress = TrainingProgress(
            config.train.steps,
            start_step=state.step,
            enabled=leads and config.log.progress,
            console=console,
        )
        if leads:
            self._metrics = self._stack.enter_context(MetricsWriter(folder / "metrics.jsonl"))
            if config.log.wandb:
                self._wandb = _start_wandb(folder, config, state)

    def __enter__(self) -> Self:
        self._stack.enter_context(self._progress)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._stack.close()
        if self._wandb is not None:
            self._wandb.finish(exit_code=0 if error is None else 1)

    def train(
        self,
        state: TrainState,
        *,
        loss: float,
        learning_rate: float,
        grad_norm: float,
        seconds: float,
        tokens: int,
        memory: Mapping[str, int],
        optimizer_seconds: float | None = None,
    ) -> None:
        """Records one step.

        `tokens` are those of the step, `seconds` the time it took, `optimizer_seconds` the
        optimizer's share of it where it was measured.
        """
        speed = tokens / seconds if seconds > 0 else 0.0
        own = {} if optimizer_seconds is None else {"optimizer_seconds": optimizer_seconds}
        self._write(
            "train",
            state.step,
            loss=loss,
            lr=learning_rate,
            grad_norm=grad_norm,
            tokens=state.tokens,
            epoch=state.epoch,
            skipped=state.skipped_updates,
            time={"seconds": seconds, "tokens_per_second": speed, **own},
            memory=dict(memory),
        )
        self._progress.update(
            state.step,
            loss=loss,
            learning_rate=learning_rate,
            tokens_per_second=speed,
            memory_bytes=memory["process"],
        )

    def evaluation(self, step: int, result: Evaluation) -> None:
        """Records one evaluation."""
        self._write(
            "eval",
            step,
            val_loss=result.loss,
            val_perplexity=result.perplexity,
            bits_per_byte=result.bits_per_byte,
            tokens=result.tokens,
            time={"seconds": result.seconds},
        )
        self.message(
            f"step {step}: validation loss {result.loss:.4f}, perplexity {result.perplexity:.1f},"
            f" {result.bits_per_byte:.3f} bits per byte"
        )

    def refresh(self, step: int, events: Sequence[RefreshEvent]) -> None:
        """Records the refreshes of one step, all matrices together."""
        if not events:
            return
        energies = [event.captured_energy for event in events]
        overlaps = [event.overlap for event in events if event.overlap is not None]
        self._write(
            "refresh",
            step,
            matrices=len(events),
            captured_energy=sum(energies) / len(energies),
            captured_energy_min=min(energies),
            overlap=sum(overlaps) / len(overlaps) if overlaps else None,
            time={"seconds": sum(event.seconds for event in events)},
        )

    def layers(self, step: int, events: Sequence[LayerEvent]) -> None:
        """Records the layer events of one step: merges, switches, draws."""
        for event in events:
            detail = f"{event.layers} layer" + ("s" if event.layers != 1 else "")
            self._write("event", step, name=event.kind, detail=detail, layers=event.layers)

    def memory(self, step: int, found: Found) -> None:
        """Records the peaks of measured steps beside the plan's, and says so."""
        planned = None if found.planned is None else dict(found.planned)
        self._write(
            "memory", step, steps=found.steps, measured=dict(found.measured), planned=planned
        )
        if found.planned is None:
            self.message(f"memory: measured, but not planned: {found.why}")
            return
        said = ", ".join(
            f"{name} {format_bytes(peak)} ({format_bytes(found.planned[name])} planned)"
            for name, peak in found.measured.items()
        )
        self.message(f"memory of {found.steps} steps: {said}")

    def skip(self, step: int, reason: str, value: float) -> None:
        """Records that a step was not taken, and says so."""
        self._write("skip", step, reason=reason, value=value)
        self.message(f"step {step} skipped: {reason.replace('_', ' ')} ({value:.4g})")

    def message(self, text: str) -> None:
        """Shows a line: above the progress bar, or alone where there is none."""
        if self._leads and self._bar:
            self._progress.message(text)
        elif self._leads:
            self._console.print(text, markup=False, highlight=False, soft_wrap=True)

    def sync(self) -> None:
        """Flushes metrics.jsonl to the disk."""
        if self._metrics is not None:
            self._metrics.sync()

    def _write(self, kind: str, step: int, **values: Any) -> None:
        if self._metrics is not None:
            self._metrics.write(kind, step, **values)
        if self._wandb is not None:
            self._wandb.log({f"{kind}/{key}": value for key, value in _flat(values)}, step=step)


def _flat(values: Mapping[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
    pairs: list[tuple[str, Any]] = []
    for key, value in values.items():
        if isinstance(value, Mapping):
            pairs.extend(_flat(value, f"{prefix}{key}/"))
        elif value is not None:
            pairs.append((f"{prefix}{key}", value))
    return pairs


def _start_wandb(folder: Path, config: RunConfig, state: TrainState) -> Any:
    wandb = require("wandb", "wandb")
    state.wandb_id = state.wandb_id or secrets.token_hex(4)
    try:
        return wandb.init(
            project=config.log.wandb_project,
            name=folder.name,
            id=state.wandb_id,
            resume="allow",
            dir=str(folder),
            config=to_mapping(config),
        )
    except wandb.errors.Error as error:
        raise ValueError(
            f"log.wandb is true, but wandb cannot start ({error}); without an account or a network"
            " set WANDB_MODE=offline"
        ) from None
