"""One run: a method, its learning rates and a seed, to a final validation loss."""

from __future__ import annotations

import math
import statistics
import time
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch

from lowrank.optimizers import state_bytes
from lowrank.trainers.data import TrainingStream, ValidationSet, build_tokenizer, data_fingerprint
from lowrank.trainers.data.config import Batch
from lowrank.trainers.distributed import World
from lowrank.trainers.evaluation import evaluate
from lowrank.trainers.models import build_model
from lowrank.trainers.schedules import multiplier
from lowrank.trainers.step import clip, compute_gradient

from .entrants import entrants
from .setting import Setting


@dataclass(frozen=True)
class Job:
    """What is to be run.

    Attributes:
        name: an entrant.
        lr: peak learning rate of projected (or hidden) matrices.
        plain_lr: that of embeddings, head and norms.
        seed: of weights and data order.
    """

    name: str
    lr: float
    plain_lr: float
    seed: int


@lru_cache(maxsize=8)
def _training(setting: Setting, seed: int) -> tuple[Batch, ...]:
    tokenizer = build_tokenizer(setting.text, setting.vocabulary)
    stream = TrainingStream(setting.text, tokenizer, batch_size=setting.batch_size, seed=seed)
    try:
        return tuple(next(stream) for _ in range(setting.steps))
    finally:
        stream.close()


@lru_cache(maxsize=1)
def _validation(setting: Setting) -> ValidationSet:
    tokenizer = build_tokenizer(setting.text, setting.vocabulary)
    return ValidationSet(setting.text, tokenizer, batch_size=32, tokens=setting.validation_tokens)


@lru_cache(maxsize=1)
def data_hash(setting: Setting) -> str:
    """The hash of the data that runs of this setting see."""
    return str(data_fingerprint(setting.text)["sha256"])


def run(setting: Setting, job: Job) -> dict[str, Any]:
    """Trains from scratch and evaluates once.

    Returns:
        The job's fields, `val_loss` (nats per token; infinite if it diverged), `ms_per_step`
        (median of the optimizer's own time), `state_bytes` and `seconds` of the whole run.
    """
    begin = time.perf_counter()
    torch.set_num_threads(1)
    world = World(0, 1, torch.device("cpu"))
    model = build_model(setting.model, setting.sequence_length, job.seed, torch.device("cpu"))
    optimizer = entrants()[job.name].make(model.network, job.lr, job.plain_lr, setting)
    peaks = [float(group["lr"]) for group in optimizer.param_groups]
    warmup = round(setting.schedule.warmup_ratio * setting.steps)
    times = []
    diverged = False
    for step, batch in enumerate(_training(setting, job.seed)):
        factor = multiplier(setting.schedule, step, setting.steps, warmup)
        for group, peak in zip(optimizer.param_groups, peaks, strict=True):
            group["lr"] = peak * factor
        optimizer.zero_grad()
        gradient = compute_gradient(model, [batch], world)
        if not torch.isfinite(torch.tensor([gradient.loss, gradient.norm])).all():
            diverged = True
            break
        clip(model.parameters(), gradient.norm, setting.clip)
        start = time.perf_counter()
        optimizer.step()
        times.append(time.perf_counter() - start)
    loss = math.inf if diverged else evaluate(model, _validation(setting), world).loss
    loss = loss if math.isfinite(loss) else math.inf
    return {
        "name": job.name,
        "lr": job.lr,
        "plain_lr": job.plain_lr,
        "seed": job.seed,
        "val_loss": loss,
        "ms_per_step": 1e3 * statistics.median(times) if times else 0.0,
        "state_bytes": state_bytes(optimizer),
        "seconds": time.perf_counter() - begin,
    }
