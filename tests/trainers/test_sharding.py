"""Sharded models start with the weights of whole ones, and their checkpoints are anyone's."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.tensor import DTensor, Shard

from lowrank.trainers.config import ModelConfig
from lowrank.trainers.dense_weights import dense_weights
from lowrank.trainers.distributed import World
from lowrank.trainers.first_weights import FirstWeights
from lowrank.trainers.models import build_model
from lowrank.trainers.sharded_checkpoint import (
    check_replicas,
    read_weights,
    without_shards,
)
from lowrank.trainers.sharding import build_sharded, local, shard_placement
from lowrank.trainers.stored import write_weights
from lowrank.trainers.weights import weights_sha256

CPU = torch.device("cpu")
SHAPE = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "vocab_size": 31,
}


@pytest.fixture(scope="module")
def world() -> Iterator[World]:
    """A process group of this process alone: FSDP2 works on it as on any."""
    store = dist.HashStore()
    dist.init_process_group("gloo", store=store, rank=0, world_size=1)
    yield World(0, 1, CPU)
    dist.destroy_process_group()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_first_weights_are_those_of_a_whole_model(world: World, dtype: str) -> None:
    config = ModelConfig(**SHAPE, dtype=dtype)
    whole = build_model(config, 8, 3, CPU)
    after = torch.rand(4)
    sharded = build_sharded(config, 8, 3, world)
    torch.testing.assert_close(torch.rand(4), after, rtol=0, atol=0)
    assert all(isinstance(item, DTensor) for item in sharded.parameters())
    assert weights_sha256(sharded.network) == weights_sha256(whole.network)
    buffers = dict(sharded.named_buffers())
    assert buffers
    for name, buffer in whole.named_buffers():
        assert buffers[name].dtype == buffer.dtype
        torch.testing.assert_close(buffers[name], buffer, rtol=0, atol=0)
    tokens = torch.randint(31, (2, 8))
    expected = whole(tokens, tokens)
    torch.testing.assert_close(sharded(tokens, tokens), expected, rtol=1e-6, atol=0)


def test_parameters_have_no_memory_while_the_model_is_built() -> None:
    with FirstWeights() as first:
        layer = nn.Linear(5, 7)
        layer.register_buffer("scale", torch.tensor([2.0]))
    assert layer.weight.is_meta
    assert float(layer.scale) == 2
    assert not nn.Linear(2, 2).weight.is_meta
    first.name(layer)


def _moved(layer: nn.Linear) -> None:
    layer.weight.mul_(2).add_(1)


def _without_autograd(layer: nn.Linear) -> None:
    layer.weight.data.normal_(std=0.5)


def _once_more(layer: nn.Linear) -> None:
    nn.init.xavier_normal_(layer.weight)


@pytest.mark.parametrize("written", [_moved, _without_autograd, _once_more])
def test_whatever_writes_a_whole_parameter_is_repeated(written: Callable[..., None]) -> None:
    def made() -> nn.Linear:
        torch.manual_seed(0)
        layer = nn.Linear(5, 7)
        with torch.no_grad():
            written(layer)
        return layer

    whole = made()
    with FirstWeights() as first:
        layer = made()
    assert layer.weight.is_meta
    first.name(layer)
    after = torch.get_rng_state()
    found = {name: value.clone() for name, _, value in first.values(layer)}
    assert torch.equal(torch.get_rng_state(), after)
    for name, value in whole.named_parameters():
        assert torch.equal(found[name], value), name


def _a_row(layer: nn.Linear) -> None:
    layer.weight[0].zero_()


def _another(layer: nn.Linear) -> None:
    layer.weight.copy_(torch.ones(7, 5))


def _no_parameter(layer: nn.Linear) -> None:
    torch.empty(3, device="meta").normal_()


@pytest.mark.parametrize("written", [_a_row, _another, _no_parameter])
def test_an_initialisation_that_cannot_be_repeated_is_refused(
    written: Callable[..., None],
) -> None:
    with (
        pytest.raises(RuntimeError, match=r"uses aten::\w+_ in a way that can't be repeated"),
        FirstWeights(),
        torch.no_grad(),
    ):
        written(nn.Linear(5, 7))
    assert not nn.Linear(2, 2).weight.is_meta


def test_a_parameter_without_values_is_named() -> None:
    with FirstWeights() as first:
        bare = nn.Module()
        bare.register_parameter("weight", nn.Parameter(torch.empty(3)))
    with pytest.raises(RuntimeError, match="gives weight no values"):
        first.name(bare)


def test_wide_weights_of_linear_layers_are_divided_by_columns() -> None:
    model = nn.Module()
    model.wide, model.tall, model.odd = nn.Linear(24, 16), nn.Linear(16, 24), nn.Linear(25, 16)
    model.table, model.square = nn.Embedding(4, 24), nn.Linear(16, 16)
    placement = shard_placement(model, 4)
    assert placement(model.wide.weight) == Shard(1)
    others = (model.tall, model.odd, model.table, model.square)
    assert [placement(item.weight) for item in others] == [None] * 4
    assert placement(model.wide.bias) is None


def test_weights_are_written_as_safetensors_writes_them(world: World, tmp_path: Path) -> None:
    from safetensors.torch import load_file

    config = ModelConfig(**SHAPE, dtype="bfloat16")
    sharded, path = build_sharded(config, 8, 3, world), tmp_path / "model.safetensors"
    write_weights(dense_weights(sharded.network), path)
    read = load_file(path)
    whole = build_model(config, 8, 3, CPU).network.state_dict()
    assert read.keys() == whole.keys()
    assert all(torch.equal(read[name], whole[name]) for name in whole)
    other = build_sharded(config, 8, 4, world)
    read_weights(other.network, path)
    assert weights_sha256(other.network) == weights_sha256(sharded.network)


def test_weights_of_another_model_change_nothing(world: World, tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    larger = build_model(ModelConfig(**{**SHAPE, "vocab_size": 40}), 8, 3, CPU)
    write_weights(dense_weights(larger.network), path)
    sharded = build_sharded(ModelConfig(**SHAPE), 8, 3, world)
    before = weights_sha256(sharded.network)
    with pytest.raises(RuntimeError, match=r"is \[40, 16\] in the file and \[31, 16\] in the net"):
        read_weights(sharded.network, path)
    deeper = build_model(ModelConfig(**{**SHAPE, "num_hidden_layers": 3}), 8, 3, CPU)
    write_weights(dense_weights(deeper.network), path)
    with pytest.raises(RuntimeError, match=r"model\.layers\.2\.\S+ is only in the file"):
        read_weights(sharded.network, path)
    assert weights_sha256(sharded.network) == before


def test_states_are_saved_with_marks_for_what_is_sharded(world: World) -> None:
    parameter = next(build_sharded(ModelConfig(**SHAPE), 8, 3, world).parameters())
    step = torch.tensor(3.0)
    state = {"state": {0: {"exp_avg": parameter, "step": step}}, "param_groups": [{"lr": 1.0}]}
    plain, shards = without_shards(state)
    assert plain["state"][0]["step"] is step
    assert plain["param_groups"] == [{"lr": 1.0}]
    mark = plain["state"][0]["exp_avg"]
    assert mark["shape"] == list(parameter.shape)
    assert shards == {mark["sharded tensor"]: parameter}


def test_state_that_differs_between_processes_is_not_saved_as_if_it_were_equal() -> None:
    class Two(World):
        def gather(self, value: object) -> list[object]:
            return [{"optimizer.state.0.step": 4.0}, value]

    state = {"state": {0: {"step": torch.tensor(4.0)}}}
    check_replicas(state, Two(1, 2, CPU))
    with pytest.raises(RuntimeError, match=r"^optimizer\.state\.0\.step .* differs between"):
        check_replicas({"state": {0: {"step": torch.tensor(5.0)}}}, Two(1, 2, CPU))
    with pytest.raises(RuntimeError, match=r"^optimizer\.state\.1\.step .* differs between"):
        check_replicas({"state": {**state["state"], 1: {"step": step_of(2)}}}, Two(1, 2, CPU))


def step_of(value: float) -> torch.Tensor:
    return torch.tensor(float(value))


def test_a_plain_tensor_is_its_own_part() -> None:
    plain = torch.ones(3)
    assert local(plain) is plain
