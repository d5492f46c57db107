"""Runs with INT8 weights: exact resume, plain Hugging Face checkpoints, true byte counts."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from test_pretrain import crash
from tiny_runs import comparable_metrics, summary

from lowrank.optimizers import Int8Weight, build
from lowrank.trainers.checkpoint import DamagedCheckpointError, verify
from lowrank.trainers.config import ModelConfig
from lowrank.trainers.config_io import from_mapping
from lowrank.trainers.memory import sizes, weight_bytes
from lowrank.trainers.models import build_model
from lowrank.trainers.parts import LAYERS, load_network, save_network
from lowrank.trainers.strategies import method_options, strategy_of
from lowrank.trainers.weights import weights_sha256

Run = Callable[[list[str]], tuple[int, str, str]]
Tiny = Callable[..., list[str]]
NAME = "qgalore_adamw_8bit"
#: Linear layers of the tiny model: four of 32 x 32 and three of 32 x 48.
PROJECTED = 4 * 32 * 32 + 3 * 32 * 48
GROUPS = 4 * 4 + 3 * 6


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_run_counts_and_resumes_exactly(dtype: str, tiny: Tiny, run: Run, tmp_path: Path) -> None:
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    settings = (f"model.dtype={dtype}", "optimizer.queue_size=1", "train.clip=0.5")
    run(tiny(whole, 10, *settings, optimizer=NAME))
    arguments = tiny(broken, 10, "--resume=auto", *settings, optimizer=NAME)
    crash(run, arguments, 5)
    crash(run, arguments, 7)
    status, _, errors = run(arguments)
    assert (status, errors) == (0, "")
    assert comparable_metrics(broken) == comparable_metrics(whole)
    content = summary(whole)
    assert content["weights_sha256"] == summary(broken)["weights_sha256"]
    size = 4 if dtype == "float32" else 2
    plain = int(str(content["parameters"])) - PROJECTED
    assert content["weight_bytes"] == PROJECTED + 2 * size * GROUPS + size * plain


def test_a_checkpoint_is_dense_for_others_and_exact_for_us(
    tiny: Tiny, run: Run, tmp_path: Path
) -> None:
    from transformers import AutoModelForCausalLM

    run(tiny(tmp_path / "run", 3, optimizer=NAME))
    saved = tmp_path / "run" / "checkpoints" / "step-00000003"
    assert LAYERS in json.loads((saved / "manifest.json").read_text())["files"]
    model = AutoModelForCausalLM.from_pretrained(saved)
    assert weights_sha256(model) == summary(tmp_path / "run")["weights_sha256"]
    assert not any(isinstance(param, Int8Weight) for param in model.parameters())
    (saved / LAYERS).write_bytes((saved / LAYERS).read_bytes()[:-1])
    with pytest.raises(DamagedCheckpointError, match=LAYERS):
        verify(saved)


def test_dense_runs_write_no_such_file_and_can_be_asked_for(
    tiny: Tiny, run: Run, tmp_path: Path
) -> None:
    run(tiny(tmp_path / "run", 3, "optimizer.weight_bits=null", optimizer=NAME))
    content = summary(tmp_path / "run")
    assert content["weight_bytes"] == 4 * int(str(content["parameters"]))
    assert not (tmp_path / "run" / "checkpoints" / "step-00000003" / LAYERS).exists()


def test_four_bits_everywhere_and_exact_resume(tiny: Tiny, run: Run, tmp_path: Path) -> None:
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    settings = ("model.weight_bits=4", "optimizer.weight_include=[embeddings, head]")
    settings = ("model.dtype=bfloat16", *settings)
    run(tiny(whole, 6, *settings, optimizer="apollo_mini_adamw"))
    arguments = tiny(broken, 6, "--resume=auto", *settings, optimizer="apollo_mini_adamw")
    crash(run, arguments, 5)
    status, _, errors = run(arguments)
    assert (status, errors) == (0, "")
    content = summary(whole)
    assert content["weights_sha256"] == summary(broken)["weights_sha256"]
    assert float(str(content["val_loss"])) < float(str(content["initial_val_loss"]))
    matrices = PROJECTED + 2 * 257 * 32
    groups = -(-32 * 32 // 64) * 4 + -(-32 * 48 // 64) * 3 + 2 * -(-257 * 32 // 64)
    plain = int(str(content["parameters"])) - matrices
    assert content["weight_bytes"] == matrices // 2 + 2 * groups + 2 * plain


@pytest.mark.parametrize(
    ("model", "optimizer", "expected"),
    [
        ({}, {}, {}),
        ({"weight_bits": 16}, {}, {"weight_bits": None}),
        ({"weight_bits": 4}, {}, {"weight_bits": 4}),
        ({"weight_bits": 8}, {"weight_bits": 8}, {"weight_bits": 8}),
        ({"weight_bits": 16}, {"weight_bits": None}, {"weight_bits": None}),
        ({"weight_bits": 16}, {"weight_bits": 8}, "contradict"),
        ({"weight_bits": 8}, {"weight_bits": 4}, "contradict"),
        ({"weight_bits": 16}, {"name": "relora_adamw"}, {}),
        ({"weight_bits": 8}, {"name": "relora_adamw"}, "replaces the layers"),
        ({"weight_bits": 5}, {}, "model.weight_bits is 5; accepted: 16, 8, 4 or null"),
    ],
)
def test_the_models_bits_are_the_optimizers(
    model: dict[str, object], optimizer: dict[str, object], expected: dict[str, object] | str
) -> None:
    settings = {"model": model, "optimizer": {"name": NAME, **optimizer}}
    if isinstance(expected, str):
        with pytest.raises(ValueError, match=expected):
            method_options(from_mapping(settings))
        return
    found = method_options(from_mapping(settings))
    assert {key: found[key] for key in found if key == "weight_bits"} == expected


@pytest.mark.parametrize("bits", [8, 4])
def test_quantised_weights_are_refused_where_they_would_be_sharded(bits: int) -> None:
    for strategy in ("fsdp2", "deepspeed"):
        settings = {
            "model": {"weight_bits": bits},
            "optimizer": {"name": "galore_adamw"},
            "distributed": {"strategy": strategy},
        }
        with pytest.raises(ValueError, match=rf"weights in {bits} bits"):
            strategy_of(from_mapping(settings), 2)


def test_save_and_load_to_the_bit_after_steps(tmp_path: Path) -> None:
    shape = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1}
    config = ModelConfig(**shape, num_attention_heads=2, vocab_size=31)
    models = [build_model(config, 8, seed, torch.device("cpu")) for seed in (0, 1)]
    optimizers = [build(NAME, model.network, lr=1e-2, rank=4) for model in models]
    tokens = torch.randint(31, (2, 8))
    models[0](tokens, tokens).backward()
    memory = sizes(models[0], optimizers[0])
    assert memory["weights"] == weight_bytes(models[0].network)
    assert memory["gradients"] == 4 * sum(p.numel() for p in models[0].parameters())
    optimizers[0].step()
    save_network(models[0].network, tmp_path)
    load_network(models[1].network, tmp_path)
    first, second = (dict(model.network.named_parameters()) for model in models)
    assert sum(isinstance(param, Int8Weight) for param in second.values()) == 7
    for name, param in first.items():
        assert torch.equal(param, second[name])
        if isinstance(param, Int8Weight):
            parts = zip(param.parts(), second[name].parts(), strict=True)
            assert all(torch.equal(a, b) for a, b in parts)
