"""The training loop: steps, evaluations, checkpoints, and a graceful end."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch

from lowrank.optimizers import LayerEvent, RefreshEvent

from .checkpoint import CheckpointStore
from .data import Batch
from .evaluation import Evaluation, count_targets, evaluate
from .in_backward import Reason, take_step
from .measured_steps import MeasuredSteps
from .memory import MemoryMeter, peak_bytes
from .parts import Parts, rank_state, write_parts, write_shared, written_by_all
from .recorder import Recorder
from .schedules import run_multiplier
from .step import Gradient, clip, compute_gradient, reason_to_skip
from .termination import Terminated, Wish


class TrainingError(RuntimeError):
    """The run cannot go on; the message says why and where the last good state is."""


class Loop:
    """Runs the training from its current state to the last step.

    Args:
        parts: model, optimizer, data and counters.
        recorder: writes the metrics.
        store: writes the checkpoints.
        wish: whether the run was asked to end.
    """

    def __init__(
        self, parts: Parts, recorder: Recorder, store: CheckpointStore, wish: Wish
    ) -> None:
        self._parts = parts
        self._recorder = recorder
        self._store = store
        self._wish = wish
        self._events: list[RefreshEvent] = []
        self._layer_events: list[LayerEvent] = []
        self._meter = MemoryMeter(parts.model, parts.optimizer, parts.world.device, parts.engine)
        self._measured = MeasuredSteps(parts)
        self._asked = False
        # A counter that isn't saved with the optimizer restarts in every process.
        self._uncounted = parts.state.skipped_updates - _skipped_updates(parts.optimizer)
        self._warned = False
        self._started = time.perf_counter() - parts.state.wall_seconds

    def run(self) -> None:
        """Evaluates once before the first step, then takes all remaining steps.

        Raises:
            Terminated: SIGTERM came; the state is saved.
            TrainingError: too many steps in a row had to be skipped.
            CheckpointError: a checkpoint can't be written.
        """
        parts, steps = self._parts, self._parts.config.train.steps
        handles = [parts.optimizer.register_refresh_hook(self._events.append)]  # type: ignore[attr-defined]
        register = getattr(parts.optimizer, "register_event_hook", None)
        if register is not None:
            handles.append(register(self._layer_events.append))
        try:
            if parts.state.first is None:
                parts.state.first = self._evaluate()
            while parts.state.step < steps:
                self._step()
                improved = self._evaluate_if_due()
                saved = self._save_if_due(improved)
                if self._asked or (parts.world.size == 1 and self._wish.came):
                    raise Terminated(parts.state.step, saved or self._save())
            if parts.state.last_step != parts.state.step:
                # A shortened run may end at a step without an evaluation.
                self._evaluate()
        finally:
            for handle in handles:
                handle.remove()
            self._measured.close()

    def _step(self) -> None:
        parts, state = self._parts, self._parts.state
        start = time.perf_counter()
        factor = run_multiplier(parts.config, state.step)
        for group, rate in zip(parts.optimizer.param_groups, parts.base_rates, strict=True):
            group["lr"] = rate * factor
        batches = parts.stream.step()
        for batch in batches:
            count_targets(parts.counts, batch.targets)
        parts.model.begin_step(state.step)
        self._events.clear()
        self._layer_events.clear()
        gradient, reason, kept, own_seconds = self._take(batches)
        # Processes end together: a later request takes effect in the next step.
        self._asked = gradient.flags > 0
        memory = self._meter.read(self._renewed(), kept)
        parts.optimizer.zero_grad(set_to_none=True)
        found = self._measured.after_step()
        seconds = time.perf_counter() - start

        state.step += 1
        state.tokens += gradient.tokens
        state.epoch = parts.stream.epoch
        state.train_seconds += seconds
        state.peak_bytes = max(state.peak_bytes, memory["peak"])
        state.skipped_updates = self._uncounted + _skipped_updates(parts.optimizer)
        self._recorder.train(
            state,
            loss=gradient.loss,
            learning_rate=parts.base_rates[0] * factor,
            grad_norm=gradient.norm,
            seconds=seconds,
            optimizer_seconds=own_seconds,
            tokens=gradient.tokens,
            memory=memory,
        )
        if found is not None:
            state.peak_bytes = max(state.peak_bytes, found.peak)
            self._recorder.memory(state.step, found)
        if reason is None:
            state.add_loss(gradient.loss)
            state.skipped_in_row = 0
            self._recorder.refresh(state.step, self._events)
            self._recorder.layers(state.step, self._layer_events)
        else:
            self._skip(*reason)
        if state.skipped_updates > 0 and not self._warned:
            self._warned = True
            self._recorder.message(
                f"warning: by step {state.step} the optimizer has passed over"
                f" {state.skipped_updates} parameter update(s) whose gradient was not finite;"
                " metrics.jsonl counts them on as skipped"
            )

    def _take(self, batches: Sequence[Batch]) -> tuple[Gradient, Reason, int | None, float | None]:
        """The step itself.

        Returns:
            Its gradient, why it was skipped, and, where measured, the bytes of gradients and the
            optimizer's seconds.
        """
        parts, config = self._parts, self._parts.config.train
        packed, flag = parts.config.data.packing == "pack", self._wish.came

        def skip(gradient: Gradient) -> Reason:
            return reason_to_skip(gradient, parts.state.mean_loss, config)

        if parts.handle is not None:
            optimizer, handle = parts.optimizer, parts.handle
            taken = take_step(
                *(parts.module, batches, parts.world, optimizer, handle, skip),
                as_one=config.clip > 0 and config.clip_norm != "previous",
                packed=packed,
                flag=flag,
                phase=self._measured.phase,
                update=self._measured.update(self._renewed),
            )
            return *taken, None
        gradient = compute_gradient(
            *(parts.module, batches, parts.world),
            packed=packed,
            flag=flag,
            engine=parts.engine,
            phase=self._measured.phase,
        )
        reason, own_seconds = skip(gradient), None
        if parts.engine is not None:
            # The norm is known only after the step, which the engine leaves out if it isn't finite.
            gradient = replace(gradient, norm=parts.engine.step(take=reason is None))
            reason = reason or skip(gradient)
        elif reason is None:
            clip(parts.model.parameters(), gradient.norm, config.clip)
            with self._measured.update(self._renewed):
                own_seconds = self._step_optimizer()
        return gradient, reason, None, own_seconds

    def _step_optimizer(self) -> float | None:
        """Steps the optimizer; its own time where `log.optimizer_time` asks for it."""
        parts, device = self._parts, self._parts.world.device
        if not parts.config.log.optimizer_time:
            parts.optimizer.step()
            return None
        wait_for(device)
        start = time.perf_counter()
        parts.optimizer.step()
        wait_for(device)
        return time.perf_counter() - start

    def _renewed(self) -> bool:
        return bool(self._events or self._layer_events)

    def _skip(self, reason: str, value: float) -> None:
        state, limit = self._parts.state, self._parts.config.train.max_skips
        state.skipped += 1
        state.skipped_in_row += 1
        self._recorder.skip(state.step, reason, value)
        if state.skipped_in_row >= limit:
            newest = next(iter(self._store.folders()), None)
            saved = (
                f"the last checkpoint is {newest}" if newest else "no checkpoint was written yet"
            )
            raise TrainingError(
                f"{state.skipped_in_row} steps in a row up to step {state.step} were skipped"
                f" ({reason.replace('_', ' ')}, {value:.4g}); try a lower optimizer.lr or"
                f" train.clip; {saved}"
            )

    def _evaluate(self) -> Evaluation:
        parts = self._parts
        result = evaluate(parts.model, parts.validation, parts.world)
        parts.state.last = result
        parts.state.last_step = parts.state.step
        self._recorder.evaluation(parts.state.step, result)
        return result

    def _evaluate_if_due(self) -> bool:
        """Evaluates if it is due; returns whether the result is the best so far."""
        parts, state = self._parts, self._parts.state
        every, last = parts.config.eval.every, state.step == parts.config.train.steps
        if not last and (every == 0 or state.step % every):
            return False
        result = self._evaluate()
        if not result.loss < state.best:
            return False
        state.best, state.best_step = result.loss, state.step
        return True

    def _save_if_due(self, improved: bool) -> Path | None:
        parts, step = self._parts, self._parts.state.step
        settings = parts.config.checkpoint
        due = step == parts.config.train.steps or (
            settings.every > 0 and step % settings.every == 0
        )
        return self._save() if due or (improved and settings.best) else None

    def _save(self) -> Path:
        """Writes a checkpoint of all processes; metrics reach the disk before it does."""
        parts, state = self._parts, self._parts.state
        state.wall_seconds = time.perf_counter() - self._started
        state.peak_bytes = max(state.peak_bytes, peak_bytes(parts.world.device))
        ranks = parts.world.gather(rank_state(parts))
        saved: Path | OSError | None = None
        if parts.world.leads:
            measured = state.last.loss if state.last and state.last_step == state.step else None
            begun = False

            def write(folder: Path) -> None:
                nonlocal begun
                begun = True
                write_parts(folder, parts, ranks)

            try:
                self._recorder.sync()
                saved = self._store.save(state.step, measured, write)
            except OSError as error:
                saved = error
                if not begun and written_by_all(parts):
                    parts.world.broadcast(None)
        elif written_by_all(parts):
            self._write_shared()
        saved = parts.world.broadcast(saved)
        if isinstance(saved, OSError):
            raise saved
        assert saved is not None
        return saved

    def _write_shared(self) -> None:
        """Takes part in rank 0's writing of a checkpoint, which tells of errors itself."""
        folder = self._parts.world.broadcast(None)
        if folder is not None:
            with contextlib.suppress(OSError):
                write_shared(folder, self._parts)


def wait_for(device: torch.device) -> None:
    """Waits until a CUDA device has done all that was given to it."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _skipped_updates(optimizer: torch.optim.Optimizer) -> int:
    """The optimizer's count of updates that it left out because a gradient was not finite."""
    return int(getattr(optimizer, "skipped", 0))
