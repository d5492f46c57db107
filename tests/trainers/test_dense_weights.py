"""Checkpoints' weights are dense and are written one at a time."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from lowrank.optimizers import convert, dense_state_dict
from lowrank.trainers.config import ModelConfig
from lowrank.trainers.dense_weights import dense_weights
from lowrank.trainers.files import WEIGHTS
from lowrank.trainers.models import build_model
from lowrank.trainers.parts import LAYERS, load_network, save_network
from lowrank.trainers.phases import PhaseMeter

CPU = torch.device("cpu")
KINDS: list[tuple[str, dict[str, Any]]] = [
    ("adamw", {}),
    ("qgalore_adamw_8bit", {"rank": 4}),
    ("apollo_mini_adamw", {"weight_bits": 4, "weight_include": ("embeddings", "head"), "rank": 1}),
    ("sltrain_adamw", {"rank": 4}),
    ("relora_adamw", {"rank": 4}),
    ("loqt_adamw", {"rank": 4}),
]


def network_of(name: str, options: dict[str, Any], seed: int = 0) -> Any:
    config = ModelConfig(
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=6,
        num_attention_heads=2,
        vocab_size=130,
        dtype="bfloat16",
    )
    network = build_model(config, 16, seed, CPU).network
    convert(name, network, **options)
    return network


@pytest.mark.parametrize(("name", "options"), KINDS, ids=[name for name, _ in KINDS])
def test_the_file_has_the_dense_state_dict(
    name: str, options: dict[str, Any], tmp_path: Path
) -> None:
    network = network_of(name, options)
    save_network(network, tmp_path)
    wanted, read = dense_state_dict(network), load_file(tmp_path / WEIGHTS)
    assert list(dense_weights(network)) == list(wanted)
    assert read.keys() == wanted.keys()
    for key, value in wanted.items():
        assert read[key].dtype == value.dtype, key
        assert torch.equal(read[key], value), key
    assert (tmp_path / LAYERS).is_file() is (name != "adamw")
    other = network_of(name, options, seed=1)
    load_network(other, tmp_path)
    own = other.state_dict()
    assert all(torch.equal(own[key], value) for key, value in network.state_dict().items())


@pytest.mark.parametrize(("name", "options"), KINDS, ids=[name for name, _ in KINDS])
def test_saving_makes_one_dense_weight_at_a_time(
    name: str, options: dict[str, Any], tmp_path: Path
) -> None:
    network = network_of(name, options)
    entries = max(value.shape.numel() for value in dense_weights(network).values())
    with PhaseMeter(CPU) as meter, meter.phase("saving"):
        save_network(network, tmp_path)
    assert (
        meter.peaks["saving"] <= 16 * entries
    )  # copies in 32 bits, their product and its rounding
    assert meter.ends["saving"] < 1024
