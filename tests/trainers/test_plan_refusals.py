"""What can't be planned or measured, and reasons that are told whole."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import LlamaConfig

from lowrank.trainers.config_io import from_mapping
from lowrank.trainers.plan import measure
from lowrank.trainers.plan.fakes import faking, made
from lowrank.trainers.plan.measure import Measured
from lowrank.trainers.plan.network import Source, new_network, read_source
from lowrank.trainers.plan.options import method_options
from lowrank.trainers.plan.planner import plan_run
from lowrank.trainers.plan.record import Record
from lowrank.trainers.plan.sharded import check_divisible
from lowrank.trainers.plan.truth import measured
from lowrank.trainers.plan.update import empty_gradients, simulate


def test_two_widths_of_weights() -> None:
    with pytest.raises(ValueError, match=r"weight_bits=8 with option weight_bits=4: accepted is"):
        method_options("llama_9m", "galore_adamw", {"weight_bits": 4}, 8)
    assert method_options("llama_9m", "galore_adamw", {"weight_bits": 4}, 4)["weight_bits"] == 4
    assert method_options("llama_9m", "galore_adamw", {}, 16)["weight_bits"] is None
    with pytest.raises(ValueError, match=r"weight_bits=8 with optimizer='relora_adamw': accepted"):
        method_options("llama_9m", "relora_adamw", {}, 8)


@pytest.mark.parametrize(
    ("optimizer", "options", "said"),
    [
        ("qgalore_adamw_8bit", {}, "strategy='fsdp2' with weight_bits=8 of"),
        ("galore_adamw", {"weight_bits": 4}, "strategy='fsdp2' with weight_bits=4 of"),
        ("sltrain_adamw", {}, "sltrain_adamw"),
    ],
)
def test_what_fsdp2_does_not_divide(optimizer: str, options: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        check_divisible(optimizer, options)
    check_divisible("qgalore_adamw_8bit", {"weight_bits": None})


def test_measuring_where_there_is_no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ValueError, match="device='cuda': there is no GPU to measure on"):
        measure("llama_9m", "adamw", sequence=8, device="cuda")


def test_measuring_several_processes() -> None:
    several: Any = SimpleNamespace(setting={"world": 2})
    with pytest.raises(ValueError, match="measuring with world=2: accepted is one process"):
        measured(several)


@pytest.mark.parametrize(
    ("model", "said"),
    [
        ({"compile": True}, "model.compile=True: planned are runs without it"),
        ({"compressed_activations": 4}, "model.compressed_activations=4: planned is 0"),
    ],
)
def test_runs(model: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        plan_run(from_mapping({"model": model}), 1, "cpu")


@pytest.mark.parametrize(("norm", "passes"), [("exact", 1), ("projected", 1), ("projected", 2)])
def test_runs_whose_updates_wait_for_a_norm(norm: str, passes: int) -> None:
    train = {"update_in_backward": True, "clip": 1.0, "clip_norm": norm, "accumulation": passes}
    with pytest.raises(ValueError, match=f"train.clip=1 and train.clip_norm='{norm}' with"):
        plan_run(from_mapping({"train": train}), 1, "cpu")


def test_reasons_of_a_bad_configuration_are_told_whole(tmp_path: Path) -> None:
    file = tmp_path / "config.json"
    file.write_text('{"model_type": "nothing"}')
    with pytest.raises(ValueError, match="is no configuration") as caught:
        read_source(str(file), 16)
    said = str(caught.value)
    assert said.count("\n") == 0
    reason = said[said.index(" knows (") :]
    assert reason.endswith(("...)", ".)"))


@pytest.mark.parametrize("optimizer", ["galore_adamw", "qgalore_adamw_8bit"])
def test_a_second_simulation_finds_the_same_refreshes_due(optimizer: str) -> None:
    """Updates in the backward pass are simulated one by one after the step of all of them."""
    shape = {"hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 2}
    config = LlamaConfig(**shape, vocab_size=32, num_hidden_layers=1)
    source = Source("tiny", config, torch.float32, checkpointing=False)
    with faking(FakeTensorMode()):
        whole = new_network(source, torch.device("meta"))
        fake = made(whole, source, optimizer, {"rank": 4, "lr": 1e-3}, "cpu", 1)

        def differentiate() -> None:
            empty_gradients(fake.model, None, replace=False)

        first, second, third = (
            simulate(fake.optimizer, fake.model, differentiate, granularity=1) for _ in range(3)
        )
    assert first == second == third
    assert [step.renews for step in first] == [True, False, True]
    assert first[2].peak > first[1].peak


@pytest.mark.parametrize(
    ("lines", "said"),
    [
        ("{}\n", "line 1 is no measurement"),
        ("nothing\n", "line 1 is no measurement"),
        ('{"setting": {}, "measured": {"weights": 1.5}}\n', "line 1 is no measurement"),
    ],
)
def test_records_that_are_none(tmp_path: Path, lines: str, said: str) -> None:
    file = tmp_path / "record"
    file.write_text(lines)
    with pytest.raises(ValueError, match=said):
        Record(file)
    assert file.read_text() == lines
    with pytest.raises(ValueError, match="accepted is a file that can be written"):
        Record(tmp_path)


def test_what_is_recorded_is_not_measured_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    taken: list[str] = []

    def measure(model: str, optimizer: str, **_: Any) -> Measured:
        taken.append(optimizer)
        return Measured(1, 2, 3, {"forward": 4, "backward": 5, "step": 6})

    monkeypatch.setattr("lowrank.trainers.plan.truth.measure", measure)
    setting = dict.fromkeys(
        (
            "sequence",
            "batch",
            "accumulation",
            "dtype",
            "checkpointing",
            "autocast",
            "refit",
            "options",
            "device",
        ),
        None,
    )
    setting |= {"world": 1, "update_in_backward": False}
    made: Any = SimpleNamespace(model="m", optimizer="muon", parameters=9, setting=setting)
    other: Any = SimpleNamespace(**vars(made) | {"setting": {**setting, "sequence": 64}})
    file = tmp_path / "record"
    first = measured(made, Record(file))
    with file.open("a") as cut:
        cut.write('{"setting"')
    again = Record(file)
    assert measured(made, again) == first
    assert taken == ["muon"]
    measured(other, again)
    assert taken == ["muon", "muon"]
    assert Record(file).find(other) == first
    assert len(file.read_text().splitlines()) == 2
