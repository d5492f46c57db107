import re
from pathlib import Path
from typing import Any

import pytest

from lowrank.optimizers import available
from lowrank.trainers.config import RunConfig, ScheduleConfig
from lowrank.trainers.config_io import (
    changed_keys,
    from_mapping,
    merge,
    parse_override,
    read_layer,
    to_mapping,
    write_config,
)
from lowrank.trainers.preset import preset_layer, preset_names, read_preset
from lowrank.trainers.pretrain import resolve


def test_layers_replace_single_keys() -> None:
    assert merge({"a": {"x": 1, "y": 2}}, {"a": {"y": 3}, "b": {"z": 4}}) == {
        "a": {"x": 1, "y": 3},
        "b": {"z": 4},
    }


def test_explicit_settings_beat_method_beats_size_beats_default() -> None:
    config = resolve({"model": {"name": "llama_60m"}, "optimizer": {"lr": 0.5}})
    assert config.optimizer.lr == 0.5
    assert config.optimizer.options["rank"] == 128
    assert config.model.hidden_size == 512
    assert config.train.steps == 10000
    assert config.data.source == "stdlib"


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"trian": {}}, "unknown section 'trian' in the configuration; did you mean 'train'?"),
        ({"train": {"stepz": 3}}, "unknown key train.stepz; did you mean 'steps'?"),
        ({"train": {"steps": "many"}}, "train.steps is 'many'; accepted: a whole number"),
        ({"train": {"steps": 2.5}}, "train.steps is 2.5; accepted: a whole number"),
        ({"train": {"steps": True}}, "train.steps is True; accepted: a whole number"),
        ({"train": {"steps": 0}}, "train.steps is 0; accepted: a whole number of at least 1"),
        ({"train": {"clip": float("nan")}}, "train.clip is nan; accepted: a number"),
        ({"train": 3}, "train is 3; accepted: a mapping"),
        ({"model": {"compile": 1}}, "model.compile is 1; accepted: true or false"),
        ({"model": {"dtype": "float16"}}, "model.dtype is 'float16'; accepted: float32 or bf"),
        (
            {"model": {"autocast": True, "dtype": "bfloat16"}},
            "model.autocast is True; accepted: false with model.dtype=bfloat16",
        ),
        ({"model": {"num_attention_heads": 7}}, "model.num_attention_heads is 7"),
        (
            {"schedule": {"name": "cos"}},
            "schedule.name is 'cos'; accepted: cosine, cosine_restarts",
        ),
        ({"schedule": {"warmup_ratio": 1.5}}, "schedule.warmup_ratio is 1.5; accepted"),
        ({"optimizer": {"lr": -1}}, "optimizer.lr is -1.0; accepted: a positive number"),
        ({"optimizer": {"betas": {"a": 1}}}, "optimizer.betas is {'a': 1}; accepted"),
        ({"data": {"packing": "tight"}}, "data.packing must be 'pack' or 'pad'"),
        (
            {"distributed": {"strategy": "fsdp"}},
            "distributed.strategy is 'fsdp'; accepted: auto, ddp, fsdp2, deepspeed",
        ),
        (
            {"distributed": {"zero_stage": 2}},
            "distributed.zero_stage is 2; accepted: 1, 2 or 3 with distributed.strategy=deepspeed",
        ),
        (
            {"distributed": {"strategy": "deepspeed", "zero_stage": 4}},
            "distributed.zero_stage is 4",
        ),
        (
            {"distributed": {"strategy": "fsdp2", "low_rank_gradients": True}},
            "distributed.low_rank_gradients is True; accepted: false with"
            " distributed.strategy=fsdp2, or true with ddp",
        ),
        ({"distributed": {"timeout": 0}}, "distributed.timeout is 0.0; accepted: a number of sec"),
        ({"distributed": {"data_shards": -1}}, "distributed.data_shards is -1; accepted: 0"),
    ],
)
def test_what_is_wrong_is_named(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        from_mapping(values)


def test_wsd_parts_must_fit() -> None:
    with pytest.raises(ValueError, match="decay_ratio"):
        ScheduleConfig(name="wsd", warmup_ratio=0.6, decay_ratio=0.5)


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("optimizer.lr=1e-3", 0.001),
        ("optimizer.lr=.5", 0.5),
        ("optimizer.betas=[0.9, 0.95]", [0.9, 0.95]),
        ("optimizer.rank=64", 64),
        ("optimizer.proj_type=std", "std"),
        ("optimizer.scale_parameter=false", False),
        ("optimizer.beta1=null", None),
    ],
)
def test_overrides_are_read_as_yaml(text: str, value: object) -> None:
    key = text.split("=")[0].split(".")[1]
    assert parse_override(text) == {"optimizer": {key: value}}


@pytest.mark.parametrize("text", ["steps=3", "train.steps", "train.=3", ".steps=3", "a.b.c=3"])
def test_overrides_of_another_form_are_refused(text: str) -> None:
    with pytest.raises(ValueError, match=r"section\.key=value"):
        parse_override(text)


def test_override_that_is_no_yaml() -> None:
    with pytest.raises(ValueError, match=r"--set train\.steps is not valid YAML"):
        parse_override("train.steps=[1")


def test_saved_configuration_reads_back_equal(tmp_path: Path) -> None:
    config = resolve({"optimizer": {"betas": [0.9, 0.95], "lr": 1e-7}, "train": {"clip": 0.5}})
    write_config(config, tmp_path / "config.yaml")
    assert from_mapping(read_layer(tmp_path / "config.yaml")) == config
    assert from_mapping(to_mapping(RunConfig())) == RunConfig()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("train: [", "not valid YAML"),
        ("- 1", "holds list; accepted: a mapping"),
        ("train: {steps: 1, steps: 2}", "the key 'steps' is given twice"),
    ],
)
def test_bad_configuration_files(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "bad.yaml"
    path.write_text(text)
    with pytest.raises(ValueError, match=message):
        read_layer(path)


def test_missing_configuration_file(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="cannot read the configuration"):
        read_layer(tmp_path / "none.yaml")


def test_changed_keys_are_those_that_make_another_run() -> None:
    before = resolve({})
    same = resolve(
        {
            "checkpoint": {"every": 7},
            "train": {"device": "cpu"},
            "distributed": {"strategy": "fsdp2", "timeout": 5},
        }
    )
    other = resolve({"train": {"steps": 7}, "optimizer": {"rank": 3}})
    assert changed_keys(before, same) == []
    assert {key for key, _, _ in changed_keys(before, other)} == {"train.steps", "optimizer.rank"}


# Sizes as in the papers' released configurations, with untied embedding and head.
PARAMETERS = {
    "llama_1m": 1_053_824,
    "llama_9m": 8_820_160,
    "llama_60m": 58_073_600,
    "llama_130m": 134_105_856,
    "llama_350m": 367_969_280,
    "llama_1b": 1_339_082_752,
    "llama_7b": 6_738_415_616,
}


def test_presets_are_ordered_by_size() -> None:
    assert preset_names() == list(PARAMETERS)


@pytest.mark.parametrize("model", PARAMETERS)
def test_presets_are_whole_and_sourced(model: str) -> None:
    preset = read_preset(model)
    assert preset["source"]
    for method, content in preset["methods"].items():
        assert method in available()
        assert content["source"]
    for optimizer in available():
        config = resolve({"model": {"name": model}, "optimizer": {"name": optimizer}})
        shape = config.model
        embedding = 2 * shape.vocab_size * shape.hidden_size
        block = (
            4 * shape.hidden_size**2
            + 3 * shape.hidden_size * shape.intermediate_size
            + 2 * shape.hidden_size
        )
        count = embedding + shape.num_hidden_layers * block + shape.hidden_size
        assert count == PARAMETERS[model]
        if model not in ("llama_1m", "llama_9m"):  # not of a paper
            assert config.train.batch_size * config.train.accumulation == 512
            assert config.schedule.warmup_ratio == 0.1
            assert config.schedule.min_ratio == 0.1


def test_unknown_model_names_the_nearest() -> None:
    with pytest.raises(ValueError, match="did you mean 'llama_60m'"):
        preset_layer("llama_60", "adamw")
