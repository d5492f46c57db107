"""Validation: the loss per token, perplexity and bits per byte over a fixed set of text."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from .data import Batch
from .distributed import World
from .loss import IGNORED
from .models import LanguageModel
from .sharding import reshard


class EvaluationSet(Protocol):
    """The part of `lowrank.trainers.data.ValidationSet` that an evaluation needs."""

    @property
    def tokens(self) -> int:
        """Targets of this process."""

    @property
    def bytes(self) -> int:
        """UTF-8 bytes of the text that these targets cover."""

    def __iter__(self) -> Iterator[Batch]:
        """The same batches every time."""


@dataclass(frozen=True)
class Evaluation:
    """One evaluation's result.

    Attributes:
        loss: nats per token.
        bits_per_byte: bits per UTF-8 byte of the text; unlike the loss, it can be compared between
            tokenizers.
        tokens: targets predicted, over all processes.
        seconds: wall-clock time taken.
    """

    loss: float
    bits_per_byte: float
    tokens: int
    seconds: float

    @property
    def perplexity(self) -> float:
        """exp(loss); infinite where that overflows."""
        return perplexity(self.loss)


def perplexity(loss: float) -> float:
    """exp of a loss in nats per token; infinite where that overflows."""
    try:
        return math.exp(loss)
    except OverflowError:
        return math.inf


def evaluate(model: LanguageModel, batches: EvaluationSet, world: World) -> Evaluation:
    """Predicts every target of the set, over all processes; the model's mode and gradients stay.

    Raises:
        ValueError: the set is empty.
    """
    start = time.perf_counter()
    trained = model.training
    model.eval()
    nats = torch.zeros((), dtype=torch.float64)
    try:
        with torch.no_grad():
            for batch in batches:
                loss = model(batch.inputs.to(world.device), batch.targets.to(world.device))
                nats += loss.double().cpu()
    finally:
        reshard(model)
        model.train(trained)
    told = torch.tensor([batches.tokens, batches.bytes], dtype=torch.float64)
    sums = world.sum(torch.cat([nats.unsqueeze(0), told]))
    tokens, covered = int(sums[1].item()), int(sums[2].item())
    if tokens == 0 or covered == 0:
        raise ValueError(
            "the validation set holds no text to predict; raise eval.tokens or add text"
        )
    total = float(sums[0].item())
    return Evaluation(
        loss=total / tokens,
        bits_per_byte=total / math.log(2) / covered,
        tokens=tokens,
        seconds=time.perf_counter() - start,
    )


def count_targets(counts_v: Tensor, targets: Tensor) -> int:
    """Adds a batch's targets to counts per token number, in place.

    Args:
        counts_v: (V,) int64 on the CPU.
        targets: int64 token numbers of any shape; -100 doesn't count.

    Returns:
        How many targets count.
    """
    kept = targets[targets != IGNORED].flatten()
    counts_v += torch.bincount(kept, minlength=counts_v.shape[0])
    return kept.numel()


def unigram_loss(training_counts_v: Tensor, validation_counts_v: Tensor) -> float:
    """Nats per validation token under the training tokens' frequencies, one added to each count.

    A model that only knows the token frequencies reaches this loss.
    """
    log_share_v = torch.log(training_counts_v.double() + 1)
    log_share_v -= torch.log(training_counts_v.double().sum() + training_counts_v.shape[0])
    counts_v = validation_counts_v.double()
    return float(-(counts_v * log_share_v).sum() / counts_v.sum())
