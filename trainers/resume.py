"""Which settings a run may take on when it goes on, and what to do about those it may not."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from .choice import follows_length
from .config import DistributedConfig, RunConfig, warmup_steps
from .config_io import Layer, changed_keys, from_mapping, merge
from .schedules import run_multiplier

# Keys whose change alone would make other weights, or ids of another meaning: a new run can't start
# from the old one's weights.
_SHAPE = ("model.", "data.tokenizer")
_NAMED = 3


def resumed_config(saved: Layer, settings: Layer) -> RunConfig:
    """The settings of a run that goes on: its own, and over them those given now.

    A run that is given another length keeps its warmup's steps: `schedule.warmup_ratio`, which
    counts them in shares of the length, follows unless it is given, too. With another strategy than
    DeepSpeed's the stage of ZeRO goes back to its default.

    Args:
        saved: the run's configuration.
        settings: what was given explicitly.

    Raises:
        ValueError: a key or a value is not accepted.
    """
    divided = settings.get("distributed")
    if isinstance(divided, dict) and divided.get("strategy", "deepspeed") != "deepspeed":
        settings = merge({"distributed": {"zero_stage": DistributedConfig().zero_stage}}, settings)
    before, now = from_mapping(saved), from_mapping(merge(saved, settings))
    schedule = settings.get("schedule") or {}
    if now.train.steps == before.train.steps or "warmup_ratio" in schedule:
        return now
    share = min(1.0, warmup_steps(before) / now.train.steps)
    return from_mapping(merge(saved, settings, {"schedule": {"warmup_ratio": share}}))


def check_unchanged(saved: RunConfig, now: RunConfig, checkpoint: Path, step: int) -> None:
    """Refuses to resume with settings that would change the run.

    The length and the schedule may change where that gives every step so far the learning rate
    that it had.

    Args:
        saved: the run's settings.
        now: those it is to go on with.
        checkpoint: where it is to go on from.
        step: optimizer steps done there.

    Raises:
        ValueError: one line that names what differs, and what to do.
    """
    changed = changed_keys(saved, now)
    if not changed:
        return
    others = [item for item in changed if not _of_length(item[0])]
    reason = _why_not(saved, now, step)
    if reason is None:
        if not others:
            return
        changed = others  # what could have changed alone is nothing to undo
    if others:
        reason = ""
    if warmup_steps(saved) == warmup_steps(now):
        # A ratio that only follows the length is nothing that anyone gave.
        changed = [item for item in changed if item[0] != "schedule.warmup_ratio"] or changed
    keys = [key for key, _, _ in changed]
    raise ValueError(f"{_differences(changed)}{reason}; {advice(keys, checkpoint)}")


def _of_length(key: str) -> bool:
    """Whether a setting is the run's length, or of its schedule."""
    return key == "train.steps" or key.startswith("schedule.")


def advice(keys: list[str], checkpoint: Path) -> str:
    """What to do about settings, or data, that aren't the run's."""
    several = "them as they were" if len(keys) > 1 else "it as it was"
    again = f"leave {several}, or start a new run with another --output"
    if any(key.startswith(_SHAPE) for key in keys):
        return again
    return f"{again}, from these weights with --set model.initial={checkpoint}"


def _differences(changed: list[tuple[str, Any, Any]]) -> str:
    key, before, after = changed[0]
    first = f"{key} is {after!r}, but the run to resume has {before!r}"
    more = [f"{key} ({after!r}, not {before!r})" for key, before, after in changed[1:_NAMED]]
    left = len(changed) - _NAMED
    return first + "".join(f", {text}" for text in more) + (f", and {left} more" * (left > 0))


def _why_not(saved: RunConfig, now: RunConfig, step: int) -> str | None:
    """Why a run of `step` steps can't take on another length or schedule; None if it can."""
    name, steps = now.optimizer.name, now.train.steps
    if steps < step:
        return f", and {step} steps are done"
    if steps != saved.train.steps and follows_length(now):
        return (
            f"; {name} lays its own schedule out over the steps, unless optimizer.total_steps says"
            " otherwise from the start"
        )
    for done in range(step):
        then, given = run_multiplier(saved, done), run_multiplier(now, done)
        if then != given:
            earlier = f"; checkpoints up to step {done} can go on so" if done else ""
            return (
                f"; under the {now.schedule.name} schedule step {done + 1} would have had"
                f" {given:.4g} of optimizer.lr, not {then:.4g}{earlier} (constant can always be"
                " made longer, wsd before it falls)"
            )
    return None
