"""First weights made one parameter at a time: the same values, and no more memory than training."""

from __future__ import annotations

import copy
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import nn

from lowrank.optimizers import QuantizedWeight, convert, state_bytes
from lowrank.trainers.config import ModelConfig
from lowrank.trainers.config_io import from_mapping
from lowrank.trainers.distributed import World
from lowrank.trainers.memory import weight_bytes
from lowrank.trainers.models import build_model, new_network
from lowrank.trainers.parts import save_network
from lowrank.trainers.phases import PhaseMeter
from lowrank.trainers.strategies import build_training
from lowrank.trainers.weights import weights_sha256

CPU = torch.device("cpu")
SHAPE = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "vocab_size": 130,
}


def parts_of(network: nn.Module) -> dict[str, torch.Tensor]:
    return dict(network.state_dict())


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_values_and_random_numbers_are_those_of_transformers(dtype: str) -> None:
    config = ModelConfig(**SHAPE, dtype=dtype)
    usual = new_network(config, 16, 5)
    after = torch.rand(3)
    for parameter in usual.parameters():
        parameter.data = parameter.data.to(getattr(torch, dtype))
    model = build_model(config, 16, 5, CPU)
    assert torch.equal(torch.rand(3), after)
    assert weights_sha256(model.network) == weights_sha256(usual)
    buffers = dict(usual.named_buffers())
    assert buffers
    for name, buffer in model.network.named_buffers():
        assert torch.equal(buffer, buffers[name])
        assert buffer.dtype == buffers[name].dtype
    assert all(parameter.is_leaf and parameter.requires_grad for parameter in model.parameters())


@pytest.mark.parametrize("include", [(), ("embeddings", "head")])
@pytest.mark.parametrize("bits", [8, 4])
def test_weights_quantised_one_by_one_are_those_of_a_dense_model(
    bits: int, include: tuple[str, ...]
) -> None:
    config = ModelConfig(**SHAPE, dtype="bfloat16")
    quantise = partial(
        convert, "apollo_mini_adamw", weight_bits=bits, weight_include=include, rank=1
    )
    dense = build_model(config, 16, 5, CPU).network
    quantise(dense)
    made = build_model(config, 16, 5, CPU, quantise).network
    wanted = parts_of(dense)
    found = parts_of(made)
    assert found.keys() == wanted.keys()
    assert any(name.endswith(".codes") for name in found)
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)


def run_settings(**model: object) -> dict[str, object]:
    return {
        "model": {**SHAPE, "dtype": "bfloat16", **model},
        "data": {"sequence_length": 16},
        "optimizer": {"name": "apollo_mini_adamw", "rank": 1, "lr": 0.01},
    }


@pytest.mark.parametrize("bits", [16, 8, 4])
def test_a_run_begins_with_the_weights_of_a_checkpoint(tmp_path: Path, bits: int) -> None:
    saved = build_model(ModelConfig(**SHAPE, dtype="bfloat16"), 16, 9, CPU).network
    save_network(saved, tmp_path)
    settings = run_settings(weight_bits=bits, initial=str(tmp_path))
    network = build_training(from_mapping(settings), World(0, 1, CPU)).model.network
    wanted = copy.deepcopy(saved)
    if bits < 16:
        convert("apollo_mini_adamw", wanted, weight_bits=bits)
    found = parts_of(network)
    assert all(torch.equal(found[name], value) for name, value in parts_of(wanted).items())
    assert (bits == 16) is not any(isinstance(p, QuantizedWeight) for p in network.parameters())


def test_a_checkpoint_of_another_shape_is_named(tmp_path: Path) -> None:
    for changed, said in (
        ({"vocab_size": 99}, r"is \[99, 64\] in the file and \[130, 64\] in the network"),
        ({"num_hidden_layers": 4}, "is only in the file"),
        ({"num_hidden_layers": 2}, "is only in the network"),
    ):
        save_network(build_model(ModelConfig(**{**SHAPE, **changed}), 16, 9, CPU).network, tmp_path)
        settings = run_settings(initial=str(tmp_path))
        with pytest.raises(ValueError, match=rf"model\.initial=.* is of another shape: .* {said}"):
            build_training(from_mapping(settings), World(0, 1, CPU))


@pytest.mark.parametrize("bits", [16, 8, 4])
def test_building_takes_little_more_than_the_weights(bits: int) -> None:
    """One dense parameter beside what is ready, not a whole dense model of 32 bits."""
    settings = run_settings(weight_bits=bits, hidden_size=128, num_hidden_layers=8)
    with PhaseMeter(CPU) as meter, meter.phase("building"):
        training = build_training(from_mapping(settings), World(0, 1, CPU))
    held = weight_bytes(training.model.network) + state_bytes(training.optimizer)
    largest = max(parameter.numel() for parameter in training.model.parameters())
    assert held <= meter.ends["building"] < held + 4096  # rotary frequencies
    # Values in float32 twice, in bfloat16 once, and what quantising them takes.
    assert meter.peaks["building"] < held + 24 * largest
    dense = 4 * sum(parameter.numel() for parameter in training.model.parameters())
    assert meter.peaks["building"] < dense * 0.8
