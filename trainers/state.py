"""A run's state besides weights and optimizer: counters, averages, random numbers."""

from __future__ import annotations

import dataclasses
import random
from dataclasses import dataclass, field
from typing import Any

import torch

from .evaluation import Evaluation

EMA_DECAY = 0.95
EMA_STEPS = 20  # finite losses before the running mean is trusted


@dataclass
class TrainState:
    """The run's counters, the same on every process; plain values, saved in checkpoints.

    Attributes:
        step: optimizer steps done, skipped ones included.
        tokens: training targets consumed, over all processes.
        epoch: completed passes over the data, on rank 0.
        skipped: skipped steps in all.
        skipped_updates: updates of single parameters that the optimizer skipped.
        skipped_in_row: consecutive skipped steps up to now.
        ema_sum: exponentially weighted sum of the losses of steps that were not skipped.
        ema_weight: the weight in that sum.
        ema_count: how many losses went in.
        first: the evaluation before the first step.
        last: the latest evaluation.
        last_step: the step it was made at.
        best: the lowest validation loss so far.
        best_step: the step it was reached at.
        train_seconds: time spent in training steps, in all processes that carried the run on.
        wall_seconds: time from start to the checkpoint, evaluation and set-up included.
        peak_bytes: the most memory in use.
        wandb_id: the run's name at Weights & Biases, empty when not used.
    """

    step: int = 0
    tokens: int = 0
    epoch: int = 0
    skipped: int = 0
    skipped_updates: int = 0
    skipped_in_row: int = 0
    ema_sum: float = 0.0
    ema_weight: float = 0.0
    ema_count: int = 0
    first: Evaluation | None = None
    last: Evaluation | None = None
    last_step: int = 0
    best: float = field(default=float("inf"))
    best_step: int = 0
    train_seconds: float = 0.0
    wall_seconds: float = 0.0
    peak_bytes: int = 0
    wandb_id: str = ""

    def add_loss(self, loss: float) -> None:
        """Takes a step's loss into the running mean."""
        self.ema_sum = EMA_DECAY * self.ema_sum + (1 - EMA_DECAY) * loss
        self.ema_weight = EMA_DECAY * self.ema_weight + (1 - EMA_DECAY)
        self.ema_count += 1

    @property
    def mean_loss(self) -> float | None:
        """The running mean of the losses, None until enough were seen to judge others by it."""
        return self.ema_sum / self.ema_weight if self.ema_count >= EMA_STEPS else None

    def to_dict(self) -> dict[str, Any]:
        """Plain values that `torch.load` accepts with ``weights_only=True``."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> TrainState:
        """The state that `to_dict` wrote."""
        restored = dict(values)
        for key in ("first", "last"):
            if restored[key] is not None:
                restored[key] = Evaluation(**restored[key])
        return cls(**restored)


def random_state(device: torch.device) -> dict[str, Any]:
    """The state of every random number generator that this process may draw from."""
    import numpy

    name, keys, position, has_gauss, gauss = numpy.random.get_state(legacy=True)
    version, words, next_gauss = random.getstate()
    state: dict[str, Any] = {
        "torch": torch.get_rng_state(),
        "python": [version, list(words), next_gauss],
        "numpy": [
            str(name),
            [int(key) for key in keys],
            int(position),
            int(has_gauss),
            float(gauss),
        ],
    }
    if device.type == "cuda":
        state["cuda"] = torch.cuda.get_rng_state(device)
    return state


def restore_random_state(state: dict[str, Any], device: torch.device) -> None:
    """Restores the generators from `random_state`."""
    import numpy

    torch.set_rng_state(state["torch"])
    version, words, next_gauss = state["python"]
    random.setstate((version, tuple(words), next_gauss))
    name, keys, position, has_gauss, gauss = state["numpy"]
    numpy.random.set_state(
        (name, numpy.array(keys, dtype=numpy.uint32), position, has_gauss, gauss)
    )
    if device.type == "cuda" and "cuda" in state:
        torch.cuda.set_rng_state(state["cuda"], device)


def seed_everything(seed: int) -> None:
    """Seeds torch, numpy and Python's random."""
    import numpy

    torch.manual_seed(seed)
    numpy.random.seed(seed)
    random.seed(seed)
