import math
from collections.abc import Iterator

import pytest
import torch
import torch.nn.functional as functional

from lowrank.trainers.config import ModelConfig
from lowrank.trainers.data import Batch
from lowrank.trainers.distributed import World
from lowrank.trainers.evaluation import (
    Evaluation,
    count_targets,
    evaluate,
    perplexity,
    unigram_loss,
)
from lowrank.trainers.models import build_model
from lowrank.trainers.state import TrainState, random_state, restore_random_state

CPU = torch.device("cpu")
ALONE = World(0, 1, CPU)


class Few:
    """Two batches of different numbers of targets."""

    tokens = 11
    bytes = 44

    def __iter__(self) -> Iterator[Batch]:
        generator = torch.Generator().manual_seed(0)
        for length, kept in ((5, 8), (3, 3)):
            tokens = torch.randint(31, (2, length + 1), generator=generator)
            targets = tokens[:, 1:].flatten().clone()
            targets[kept:] = -100
            yield Batch(tokens[:, :-1], targets.view(2, length))


class Empty(Few):
    tokens = 0
    bytes = 0

    def __iter__(self) -> Iterator[Batch]:
        return iter(())


def small() -> ModelConfig:
    return ModelConfig(
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=1,
        num_attention_heads=2,
        vocab_size=31,
    )


def test_loss_is_summed_over_tokens_not_averaged_over_batches() -> None:
    model = build_model(small(), 8, 0, CPU)
    result = evaluate(model, Few(), ALONE)
    total = 0.0
    for batch in Few():
        logits = model.network(input_ids=batch.inputs).logits.detach().flatten(0, 1)
        total += float(functional.cross_entropy(logits, batch.targets.flatten(), reduction="sum"))
    assert result.tokens == 11
    assert result.loss == pytest.approx(total / 11, rel=1e-6)
    assert result.perplexity == pytest.approx(math.exp(total / 11), rel=1e-6)
    assert result.bits_per_byte == pytest.approx(total / math.log(2) / 44, rel=1e-6)


def test_evaluation_leaves_mode_and_gradients() -> None:
    model = build_model(small(), 8, 0, CPU)
    evaluate(model, Few(), ALONE)
    assert model.training
    assert all(parameter.grad is None for parameter in model.parameters())


def test_nothing_to_evaluate_is_an_error() -> None:
    with pytest.raises(ValueError, match="validation set holds no text"):
        evaluate(build_model(small(), 8, 0, CPU), Empty(), ALONE)


def test_perplexity_does_not_overflow() -> None:
    assert perplexity(1e6) == math.inf
    assert perplexity(0.0) == 1.0


def test_targets_are_counted_by_number() -> None:
    counts = torch.zeros(4, dtype=torch.int64)
    assert count_targets(counts, torch.tensor([[1, 1, -100], [3, -100, 1]])) == 4
    assert counts.tolist() == [0, 3, 0, 1]


def test_unigram_loss_by_hand() -> None:
    trained, validated = torch.tensor([7, 0, 1]), torch.tensor([2, 1, 0])
    # With one added to each: 8/11, 1/11, 2/11.
    expected = -(2 * math.log(8 / 11) + math.log(1 / 11)) / 3
    assert unigram_loss(trained, validated) == pytest.approx(expected)


def test_unigram_loss_of_much_text_is_its_entropy() -> None:
    counts = torch.tensor([500_000, 250_000, 250_000])
    assert unigram_loss(counts, counts) == pytest.approx(1.5 * math.log(2), rel=1e-4)


def test_state_survives_a_checkpoint() -> None:
    state = TrainState(step=3, first=Evaluation(1.0, 2.0, 3, 4.0), best=0.5)
    state.add_loss(4.0)
    assert TrainState.from_dict(state.to_dict()) == state
    assert state.mean_loss is None
    for _ in range(30):
        state.add_loss(4.0)
    assert state.mean_loss == pytest.approx(4.0)


def test_random_numbers_go_on_where_they_stopped() -> None:
    import random

    import numpy

    def draw() -> tuple[float, float, float, float]:
        gauss = random.gauss(0, 1), float(numpy.random.standard_normal())
        return float(torch.rand(())), random.random(), float(numpy.random.random()), sum(gauss)

    draw()
    state = random_state(CPU)
    first = [draw() for _ in range(3)]
    restore_random_state(state, CPU)
    assert [draw() for _ in range(3)] == first
