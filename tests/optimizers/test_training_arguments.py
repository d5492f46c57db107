"""Optimizers from the Hugging Face Trainer's settings; the examples run them in the Trainer."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
from support import tiny_model

from lowrank.optimizers import (
    ApolloAdamW,
    CoapAdamW,
    GaLoreAdafactor,
    GaLoreAdamW,
    GaLoreAdamW8bit,
    QGaLoreAdamW8bit,
    SwitchLoRAAdamW,
    optimizer_from_arguments,
)


def arguments(**changes: Any) -> SimpleNamespace:
    """The fields of `TrainingArguments` that are read, with transformers' defaults."""
    fields = {
        "optim": "adamw_torch_fused",
        "optim_args": None,
        "optim_target_modules": None,
        "learning_rate": 5e-5,
        "adam_beta1": 0.9,
        "adam_beta2": 0.999,
        "adam_epsilon": 1e-8,
        "weight_decay": 0.0,
        "max_steps": -1,
    }
    return SimpleNamespace(**{**fields, **changes})


def test_the_defaults_are_those_that_transformers_copied() -> None:
    from transformers import TrainingArguments

    fields = TrainingArguments(output_dir="unused", use_cpu=True)
    expected = arguments()
    for name in ("adam_beta1", "adam_beta2", "adam_epsilon", "weight_decay", "max_steps"):
        assert getattr(fields, name) == getattr(expected, name)
    assert fields.optim == expected.optim


def test_a_configuration_written_for_galore_torch() -> None:
    model = tiny_model()
    optimizer = optimizer_from_arguments(
        arguments(
            optim=SimpleNamespace(value="galore_adamw"),
            optim_args="rank=4, update_proj_gap=50,scale=0.5, proj_type=reverse_std",
            optim_target_modules=["mlp"],
            learning_rate=0.02,
        ),
        model,
    )
    assert isinstance(optimizer, GaLoreAdamW)
    projected = optimizer.param_groups[0]
    wanted = {"rank": 4, "update_proj_gap": 50, "scale": 0.5, "proj_type": "reverse_std"}
    assert {key: projected[key] for key in wanted} == wanted
    assert projected["param_names"] == ["mlp.up_proj.weight", "mlp.down_proj.weight"]
    assert {group["lr"] for group in optimizer.param_groups} == {0.02}
    assert projected["eps"] == 1e-6  # transformers' 1e-8 is not passed to GaLore there either


@pytest.mark.parametrize(
    ("optim", "name", "kind"),
    [
        ("galore_adamw_8bit", None, GaLoreAdamW8bit),
        ("galore_adafactor", None, GaLoreAdafactor),
        ("apollo_adamw", None, ApolloAdamW),
        ("adamw_torch", "coap_adamw", CoapAdamW),
        ("galore_adamw", "galore_adamw", GaLoreAdamW),
        ("adamw_torch_fused", "qgalore_adamw_8bit", QGaLoreAdamW8bit),
    ],
)
def test_methods_by_name(optim: str, name: str | None, kind: type) -> None:
    made = optimizer_from_arguments(arguments(optim=optim, optim_args="rank=4"), tiny_model(), name)
    assert type(made) is kind


def test_values_of_optim_args_and_options_that_win() -> None:
    text = "rank=4,update_interval=7,restore_state=true,refresh=svd,lr=0.5,rank_ratio_cnn=none"
    given = arguments(optim_args=text)
    optimizer = optimizer_from_arguments(given, tiny_model(), "coap_adamw", rank=2)
    group = optimizer.param_groups[0]
    assert (group["rank"], group["update_proj_gap"], group["moments"]) == (2, 7, "restore")
    assert (group["refresh"], group["lr"]) == ("svd", 0.5)


def test_changed_fields_are_passed_on() -> None:
    changed = arguments(adam_beta2=0.95, adam_epsilon=1e-7, weight_decay=0.1, optim_args="rank=4")
    optimizer = optimizer_from_arguments(changed, tiny_model(), "galore_adamw")
    first, last = optimizer.param_groups[0], optimizer.param_groups[-1]
    assert (first["betas"], first["eps"], first["weight_decay"]) == ((0.9, 0.95), 1e-7, 0.1)
    assert last["weight_decay"] == 0.0  # biases and norms


def test_the_run_s_length_reaches_methods_that_need_it() -> None:
    given = arguments(max_steps=77, optim_args="rank=4")
    optimizer = optimizer_from_arguments(given, tiny_model(), "switchlora_adamw")
    assert isinstance(optimizer, SwitchLoRAAdamW)
    assert optimizer.param_groups[0]["total_steps"] == 77


@pytest.mark.parametrize(
    ("changes", "name", "said"),
    [
        ({"optim": "galore_adamw_layerwise"}, None, "update_in_backward"),
        ({"optim": "lomo"}, None, "unknown optim .lomo."),
        ({}, "galore", "unknown optimizer .galore.; did you mean"),
        ({"optim": "galore_adamw"}, "coap_adamw", "accepted is one of them"),
        ({"optim_args": "rank"}, "galore_adamw", "optim_args has 'rank'"),
        ({"optim_args": "rank=4, rank=8"}, "galore_adamw", "each option once"),
        ({"optim_args": {"rank": 4}}, "galore_adamw", "accepted is a string like"),
        ({"optim_args": "rank="}, "galore_adamw", "accepted are pairs"),
        ({"optim_args": "ranks=4"}, "galore_adamw", "rank"),
        ({"adam_epsilon": 1e-7}, "galore_adafactor", "adam_epsilon=1e-07 with galore_adafactor"),
        ({"adam_beta1": 0.8}, "galore_adafactor", "adam_beta1=0.8 with galore_adafactor"),
        ({"optim_target_modules": ["nothing"]}, "galore_adamw", "nothing"),
    ],
)
def test_what_can_t_be_followed_is_said(
    changes: dict[str, Any], name: str | None, said: str
) -> None:
    with pytest.raises(ValueError, match=said):
        optimizer_from_arguments(arguments(**changes), tiny_model(), name)
