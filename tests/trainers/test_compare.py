"""A comparison's methods, settings, runs and statistics, without training anything."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from lowrank.optimizers import available, expected_state_bytes
from lowrank.trainers.compare.decide import Asked, decide
from lowrank.trainers.compare.entries import parse_methods, parse_seeds
from lowrank.trainers.compare.memory import held, predicted
from lowrank.trainers.compare.plan import Run, make_run, steps_of
from lowrank.trainers.compare.prepare import prepare
from lowrank.trainers.compare.setting import (
    Setting,
    joined,
    read_setting,
    versions,
    write_setting,
)
from lowrank.trainers.compare.statistics import Spread, paired, pareto, spread
from lowrank.trainers.config_io import read_layer, to_mapping, write_config
from lowrank.trainers.models import build_model
from lowrank.trainers.official import PACKAGES
from lowrank.trainers.pretrain import resolve

BASE = Setting(
    methods=("adamw", "galore_adamw"), seeds=(0, 1), model="llama_1m", steps=40, data_sha256="d"
)


def run(setting: Setting, text: str, seed: int = 0, **choice: Any) -> Run:
    (entry,) = parse_methods(text)
    return make_run(setting, entry, seed, choice)


def test_methods_are_read_with_options_of_their_own() -> None:
    text = "adamw+betas=[0.9,0.95]+plain_rule=adafactor, official:GaLoreAdamW,fira_adamw"
    first, second, third = parse_methods(text)
    assert first.label == "adamw+betas=[0.9,0.95]+plain_rule=adafactor"
    assert first.settings == {"optimizer": {"betas": [0.9, 0.95], "plain_rule": "adafactor"}}
    assert (second.optimizer, second.method) == ("official:galore_adamw", "galore_adamw")
    assert third.settings == {}
    larger = parse_methods("adamw+train.batch_size=16")[0]
    assert larger.settings == {"train": {"batch_size": 16}}


def test_a_plus_may_be_of_a_value() -> None:
    (entry,) = parse_methods("adamw+lr=1e+2+model.initial=/runs/a+b+betas=[0.9,0.99]")
    assert entry.settings == {
        "optimizer": {"lr": 100.0, "betas": [0.9, 0.99]},
        "model": {"initial": "/runs/a+b"},
    }
    assert parse_methods(entry.label) == (entry,)


def test_all_methods_come_after_the_named_ones() -> None:
    found = parse_methods("galore_adamw,all,official:all")
    assert [entry.label for entry in found[:2]] == ["galore_adamw", available()[0]]
    assert len(found) == len(available()) + len(PACKAGES)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("galore_adam", "did you mean 'galore_adamw'"),
        ("official:fira_adam", "did you mean 'fira_adamw'"),
        ("official:muon", "unknown official package 'muon'"),
        ("adamw,galore_adamw,adamw", "adamw twice"),
        ("official:fira,official:FiraAdamW", "official:fira_adamw twice"),
        ("", "accepted: names"),
        ("adamw,,muon", "names no method"),
        ("adamw+rank", "'rank' is not of the form key=value"),
        ("adamw+rank+lr=1", "'rank' is not of the form key=value"),
        ("+lr=1", "names no method"),
        ("adamw+lr=1+lr=2", "lr twice"),
        ("adamw+lr=1+optimizer.lr=2", "optimizer.lr twice"),
        ("fira_adamw+alpha=1+scale=2", "two names of one thing"),
        (
            "muon+lr=1+rank=2,muon+rank=2+lr=1",
            r"has muon\+lr=1\+rank=2 and muon\+rank=2\+lr=1, which are the same",
        ),
        ("muon+lr=0.001,muon+lr=1e-3", "which are the same"),
        ("fira_adamw+alpha=1,fira_adamw+scale=1", "which are the same"),
        ("adamw+train.seed=1", "the same for all methods"),
        ("adamw+data.source=x", "the same for all methods"),
        ("adamw+optimizer.name=muon", "the same for all methods"),
    ],
)
def test_wrong_methods(text: str, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        parse_methods(text)


@pytest.mark.parametrize("text", ["0,0", "0,,1", "-1", "a", "1.5", str(2**32)])
def test_wrong_seeds(text: str) -> None:
    with pytest.raises(ValueError, match="--seeds has"):
        parse_seeds(text)


def test_a_setting_is_checked() -> None:
    for changes, said in (
        ({"steps": 3}, "--steps is 3; accepted: 4 or more"),
        ({"equal": "time"}, "--equal is 'time'"),
        ({"tune": True, "seeds": (0, 100)}, "on which rates are tuned"),
        ({"methods": ()}, "--methods is not given"),
    ):
        with pytest.raises(ValueError, match=said):
            replace(BASE, **changes)


def test_a_key_names_all_that_determines_a_run() -> None:
    plain = run(BASE, "galore_adamw")
    others = [
        run(BASE, "galore_adamw", seed=1),
        run(BASE, "galore_adamw", lr=0.5),
        run(BASE, "galore_adamw+rank=7"),
        run(BASE, "galore_adamw+plain_rule=adafactor"),
        run(replace(BASE, steps=41), "galore_adamw"),
        run(replace(BASE, data_sha256="other"), "galore_adamw"),
        run(replace(BASE, versions={"torch": "1"}), "galore_adamw"),
        run(replace(BASE, settings={"train": {"clip": 2.0}}), "galore_adamw"),
        run(BASE, "fira_adamw"),
    ]
    assert len({plain.key, *(other.key for other in others)}) == 10
    moved = replace(BASE, data="/elsewhere", settings={"checkpoint": {"every": 7}})
    assert run(moved, "galore_adamw").key == plain.key
    # The same by another way: what tuning chose, or what the entry says.
    entry = run(BASE, "galore_adamw+lr=0.5", plain_lr=0.1)
    assert entry.key == run(BASE, "galore_adamw", lr=0.5, plain_lr=0.1).key


def test_a_key_is_of_the_first_weights_and_not_of_their_place(tmp_path: Path) -> None:
    for name, content in (("a", b"1"), ("moved", b"1"), ("b", b"2")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "model.safetensors").write_bytes(content)
    a, moved, b = (
        run(BASE, f"adamw+model.initial={tmp_path / name}").key for name in ("a", "moved", "b")
    )
    assert a == moved
    assert len({a, b, run(BASE, "adamw").key}) == 3
    (tmp_path / "a" / "model.safetensors").write_bytes(b"22")
    assert run(BASE, f"adamw+model.initial={tmp_path / 'a'}").key not in (a, b)
    setting = replace(BASE, settings={"model": {"initial": str(tmp_path)}})
    with pytest.raises(ValueError, match=r"adamw: model.initial=.*there is no model.safetensors"):
        prepare(setting)


def test_versions_are_of_all_that_computes(monkeypatch: pytest.MonkeyPatch) -> None:
    found = versions("cpu")
    assert set(found) == {"lowrank", "torch", "transformers", "python", "device"}
    assert found["device"] == "cpu"
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert versions("auto") == found
    with pytest.raises(ValueError, match="torch sees no CUDA device here"):
        versions("cuda")


def test_runs_differ_in_the_optimizer_alone() -> None:
    setting = replace(BASE, model="llama_60m", steps=40)
    configs = [run(setting, name).config for name in available()]
    for config in configs:
        first = configs[0]
        assert (config.model, config.data, config.train, config.eval) == (
            first.model,
            first.data,
            first.train,
            first.eval,
        )
    assert {config.train.threads for config in configs} == {1}


def test_an_entry_stands_above_what_tuning_chose() -> None:
    found = run(BASE, "adamw+lr=0.02", lr=0.001, plain_lr=0.5).config.optimizer
    assert (found.lr, found.options["plain_lr"]) == (0.02, 0.5)


def test_rates_that_were_chosen_leave_nothing_of_the_presets() -> None:
    setting = replace(BASE, model="llama_9m")
    preset = run(setting, "adamw").config.optimizer
    assert preset.options["head_lr"] == 0.005
    found = run(setting, "adamw", lr=0.003, plain_lr=0.01, weight_decay=0.1)
    assert found.config.optimizer.options == {
        **{"plain_lr": 0.01, "embedding_lr": None, "head_lr": None, "betas": None},
        "weight_decay": 0.1,
    }
    # What is no rate stays the preset's, and what the entry or the setting gives is theirs.
    ranked = run(setting, "galore_adamw", lr=0.003, plain_lr=0.01).config.optimizer.options
    assert ranked["rank"] == preset_options(setting, "galore_adamw")["rank"] == 128
    own = run(setting, "adamw+head_lr=0.02", lr=0.003, plain_lr=0.01).config.optimizer.options
    assert (own["head_lr"], own["embedding_lr"]) == (0.02, None)
    all_runs = replace(setting, settings={"optimizer": {"betas": [0.9, 0.9]}})
    assert run(all_runs, "adamw", lr=0.003).config.optimizer.options["betas"] == [0.9, 0.9]


def test_a_worker_trains_what_was_recorded(tmp_path: Path) -> None:
    made = run(replace(BASE, model="llama_9m"), "adamw", lr=0.003, plain_lr=0.01).config
    # As the worker gets it, and as `lowrank pretrain --config` reads what the run has left.
    assert resolve(to_mapping(made)) == made
    write_config(made, tmp_path / "config.yaml")
    assert resolve(read_layer(tmp_path / "config.yaml")) == made


def preset_options(setting: Setting, text: str) -> dict[str, Any]:
    return dict(run(setting, text).config.optimizer.options)


def test_a_schedule_of_its_own_is_told() -> None:
    setting = replace(BASE, model="llama_9m", methods=("adamw", "relora_adamw"))
    assert prepare(setting).remarks == {
        "adamw": [],
        "relora_adamw": ["its own schedule: cosine_restarts"],
    }


def test_equal_tokens_change_the_steps() -> None:
    first, larger = parse_methods("adamw,galore_adamw+train.batch_size=16")
    setting = replace(BASE, equal="tokens")
    assert steps_of(BASE, larger, first) == 40
    assert steps_of(setting, larger, first) == 20
    assert steps_of(setting, first, larger) == 80
    uneven = parse_methods("adamw+train.batch_size=7")[0]
    with pytest.raises(ValueError, match="a batch that divides them"):
        steps_of(setting, uneven, first)


def test_equal_memory_changes_the_ranks() -> None:
    methods = ("galore_adamw", "apollo_adamw", "adafactor", "sltrain_adamw", "adamw")
    setting = replace(BASE, model="llama_9m", methods=methods, equal="memory")
    plan = prepare(setting)
    most = held(plan.run(plan.entries[0], 0, {}).config)
    assert set(plan.ranks) == {"apollo_adamw", "sltrain_adamw"}
    for entry in plan.entries[1:]:
        config = plan.run(entry, 0, {}).config
        if entry.label not in plan.ranks:
            assert plan.remarks[entry.label], entry.label
            continue
        assert config.optimizer.options["rank"] == plan.ranks[entry.label]
        assert held(config) <= most
        more = {**config.optimizer.options, "rank": plan.ranks[entry.label] + 1}
        above = replace(config, optimizer=replace(config.optimizer, options=more))
        assert held(above) > most


@pytest.mark.parametrize("name", ["galore_adamw", "sltrain_adamw", "qgalore_adamw_8bit"])
def test_predicted_memory_is_the_formulas(name: str) -> None:
    config = run(BASE, name).config
    sizes = predicted(config)
    network = build_model(config.model, config.data.sequence_length, 0, _cpu()).network
    options = dict(config.optimizer.options)
    state = expected_state_bytes(name, network, lr=config.optimizer.lr, **options)
    assert sizes["moments"] + sizes["basis"] + sizes["other_state"] == state


def _cpu() -> Any:
    import torch

    return torch.device("cpu")


def test_wrong_options_are_found_before_the_first_run() -> None:
    for text, said in (
        ("galore_adamw+rnk=8", "did you mean 'rank'"),
        ("galore_adamw+rank=0", "rank"),
        ("galore_adamw+plain_rule=sgd", "optimizer.plain_rule is 'sgd'"),
    ):
        with pytest.raises(ValueError, match=said):
            prepare(replace(BASE, methods=(text,)))
    with pytest.raises(ValueError, match="--rates has nothing of galore_adamw"):
        prepare(replace(BASE, rates={"adamw": {"lr": 0.1}}))


def test_packages_that_are_missing_are_left_out_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    plan = prepare(replace(BASE, methods=("adamw", "official:fira_adamw")))
    assert [entry.label for entry in plan.entries] == ["adamw"]
    assert "fira is not installed" in plan.skipped["official:fira_adamw"]
    with pytest.raises(ValueError, match="none can be had here"):
        prepare(replace(BASE, methods=("official:fira_adamw",)))


def test_a_folder_takes_more_methods_and_seeds_but_no_other_setting(tmp_path: Path) -> None:
    folder = tmp_path / "c"
    assert read_setting(folder) is None
    folder.mkdir()
    write_setting(BASE, folder)
    assert read_setting(folder) == BASE
    more = joined(BASE, replace(BASE, methods=("muon", "adamw"), seeds=(2,)), folder)
    assert (more.methods, more.seeds) == (("adamw", "galore_adamw", "muon"), (0, 1, 2))
    assert joined(BASE, replace(BASE, data="/moved"), folder).data == "/moved"
    other = replace(BASE, steps=50, settings={"train": {"clip": 2.0}})
    with pytest.raises(ValueError, match=r"steps 40, not 50; settings.train.clip None, not 2.0"):
        joined(BASE, other, folder)
    with pytest.raises(ValueError, match="data_sha256"):
        joined(BASE, replace(BASE, data_sha256="e"), folder)


def test_a_folder_of_something_else_is_refused(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(ValueError, match=r"holds something else than a comparison \(notes.txt\)"):
        read_setting(tmp_path)
    with pytest.raises(ValueError, match="is a file"):
        read_setting(tmp_path / "notes.txt")
    (tmp_path / "comparison.json").write_text('{"format": 1')
    with pytest.raises(ValueError, match="can't be read"):
        read_setting(tmp_path)


def test_what_is_not_asked_for_is_the_folders(tmp_path: Path, corpus: Path) -> None:
    asked = Asked(tmp_path / "c", "adamw,muon", (3,), "llama_1m", str(corpus), 12, equal="tokens")
    made = decide(asked)
    (tmp_path / "c").mkdir()
    write_setting(made, tmp_path / "c")
    assert decide(Asked(tmp_path / "c")) == made
    with pytest.raises(ValueError, match="steps 12, not 13"):
        decide(replace(asked, steps=13))
    with pytest.raises(ValueError, match="accepted: --seeds"):
        decide(replace(asked, settings={"train": {"seed": 1}}))
    with pytest.raises(ValueError, match=r"train.device is 'gpu'"):
        decide(replace(asked, settings={"train": {"device": "gpu"}}))
    other = replace(made, versions={**made.versions, "device": "cuda (H100)"})
    (tmp_path / "e").mkdir()
    write_setting(other, tmp_path / "e")
    with pytest.raises(ValueError, match=r"versions.device 'cuda \(H100\)', not 'cpu'"):
        decide(replace(asked, output=tmp_path / "e", settings={"train": {"device": "cpu"}}))
    with pytest.raises(ValueError, match="--methods is not given"):
        decide(Asked(tmp_path / "d"))


def test_statistics() -> None:
    assert spread([]) is None
    assert spread([2.0]) == Spread(2.0, None, 1)
    two = spread([1.0, 3.0])
    assert two == Spread(2.0, pytest.approx(1.0), 2)
    broken = spread([1.0, math.inf])
    assert broken == Spread(math.inf, None, 2)
    # What all seeds share falls out of the difference.
    gap = paired({0: 5.1, 1: 4.1, 2: 9.0}, {0: 5.0, 1: 4.0, 3: 1.0})
    assert gap is not None
    assert (gap.mean, gap.error, gap.count) == (
        pytest.approx(0.1),
        pytest.approx(0.0, abs=1e-12),
        2,
    )
    assert paired({0: math.inf}, {0: 1.0}) is None
    points = {"a": (1.0, 9.0), "b": (2.0, 5.0), "c": (3.0, 5.0), "d": (4.0, 1.0), "e": (5.0, 2.0)}
    assert pareto(points | {"f": (0.5, math.inf), "b2": (2.0, 5.0)}) == ["a", "b", "b2", "d"]
