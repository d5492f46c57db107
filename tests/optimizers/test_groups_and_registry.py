"""Sorting parameters, building by name, and formulas for real model sizes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from support import TinyBlock, set_gradients, tiny_model
from table import each_size
from torch import nn

from lowrank.optimizers import (
    GaLoreAdamW,
    available,
    build,
    describe,
    expected_state_bytes,
    param_groups,
    state_bytes,
    state_bytes_by_category,
)


def names_of(groups: list[dict[str, Any]]) -> list[list[str]]:
    return [group["param_names"] for group in groups]


def test_param_groups_sort_by_name_and_kind() -> None:
    groups = param_groups(tiny_model(), rank=8, weight_decay=0.1, refresh="warm")
    assert names_of(groups) == [
        ["self_attn.q_proj.weight", "mlp.up_proj.weight", "mlp.down_proj.weight"],
        ["embed_tokens.weight", "lm_head.weight"],
        ["mlp.up_proj.bias", "norm.weight", "norm.bias"],
    ]
    assert groups[0]["rank"] == 8
    assert groups[0]["refresh"] == "warm"
    assert [group.get("weight_decay") for group in groups] == [0.1, 0.1, 0.0]
    assert "rank" not in groups[1]


def test_param_groups_train_under_the_class() -> None:
    model = tiny_model()
    optimizer = GaLoreAdamW(param_groups(model, rank=8), lr=0.01)
    set_gradients(model, 0)
    optimizer.step()
    assert "basis" in optimizer.state[model.mlp["up_proj"].weight]
    assert "basis" not in optimizer.state[model.lm_head.weight]


def test_tied_weights_appear_once_and_are_not_projected() -> None:
    model = tiny_model()
    model.lm_head.weight = model.embed_tokens.weight
    model.mlp["tied"] = nn.Linear(16, 16, bias=False)
    model.mlp["tied"].weight = model.self_attn["q_proj"].weight
    groups = param_groups(model)
    flat = [param for group in groups for param in group["params"]]
    assert len(flat) == len(set(flat)) == len(list(model.parameters()))
    assert "self_attn.q_proj.weight" not in groups[0]["param_names"]


def test_frozen_parameters_and_other_patterns() -> None:
    model = tiny_model()
    model.embed_tokens.weight.requires_grad_(False)
    groups = param_groups(model, patterns=["lm_head"])
    assert names_of(groups)[0] == ["lm_head.weight"]
    assert all("embed_tokens.weight" not in names for names in names_of(groups))


def test_no_match_is_one_clear_error() -> None:
    with pytest.raises(ValueError, match=r"'nothing'"):
        param_groups(tiny_model(), patterns=["nothing"])


def test_available_and_describe() -> None:
    assert {"adamw", "adamw_8bit", "adafactor", "muon", "galore_adamw"} <= set(available())
    assert available() == sorted(available())
    assert "2403.03507" in describe("galore_adamw")


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("galore_adam", {}, "did you mean 'galore_adamw'"),
        ("galore_adamw", {"rnk": 4}, "did you mean 'rank'"),
        ("galore_adamw", {"beta1": 0.9}, "option of galore_adamw 'beta1'"),
        ("adamw", {"clip_threshold": 1.0}, "option of adamw"),
    ],
)
def test_unknown_names_say_the_nearest(name: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build(name, tiny_model(), **options)


def test_build_defaults() -> None:
    optimizer = build("galore_adamw", tiny_model())
    group = optimizer.param_groups[0]
    keys = ("rank", "update_proj_gap", "scale", "proj_type", "refresh", "lr")
    assert [group[key] for key in keys] == [128, 200, 0.25, "std", "eigh", 1e-3]
    state = optimizer.state[group["params"][0]]
    assert state["basis"].shape == (16, 16)  # clamped
    adafactor = build("galore_adafactor", tiny_model(), lr=0.01).param_groups[0]
    assert adafactor["relative_step"] is False
    assert adafactor["scale_parameter"] is False


@pytest.mark.parametrize("name", ["adamw", "adamw_8bit", "adafactor", "muon"])
def test_baselines_ignore_projection_options(name: str) -> None:
    optimizer = build(name, tiny_model(), rank=4, update_proj_gap=10, scale=1.0)
    assert all("basis" not in state for state in optimizer.state.values())
    assert all("rank" not in group for group in optimizer.param_groups)


def test_bytes_by_category() -> None:
    optimizer = build("galore_adamw", tiny_model(), rank=4)
    parts = state_bytes_by_category(optimizer)
    matrices = {(16, 16): (64, 64), (24, 16): (64, 96), (16, 24): (64, 96)}  # basis, low
    plain = 2 * 32 * 16 + 24 + 16 + 16
    assert parts["basis"] == 4 * sum(basis for basis, _ in matrices.values())
    assert parts["moments"] == 8 * (sum(low for _, low in matrices.values()) + plain)
    assert parts["other"] == 4 * len(list(optimizer.state))
    assert state_bytes(optimizer) == sum(parts.values())


# hidden, ffn, layers, GaLore rank; vocabulary 32000, untied head (arXiv 2403.03507, table 5).
LLAMA = {
    "60m": (512, 1376, 8, 128),
    "130m": (768, 2048, 12, 256),
    "350m": (1024, 2736, 24, 256),
    "1b": (2048, 5461, 24, 512),
    "7b": (4096, 11008, 32, 1024),
}


class Llama(nn.Module):
    """LLaMA's parameters alone, for counting."""

    def __init__(self, hidden: int, ffn: int, layers: int) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(32000, hidden)
        self.layers = nn.ModuleList()
        for _ in range(layers):
            attention = [nn.Linear(hidden, hidden, bias=False) for _ in range(4)]
            sizes = ((hidden, ffn), (hidden, ffn), (ffn, hidden))
            mlp = [nn.Linear(a, b, bias=False) for a, b in sizes]
            norms = [nn.RMSNorm(hidden) for _ in range(2)]
            self.layers.append(
                nn.ModuleDict(
                    {
                        "self_attn": nn.ModuleList(attention),
                        "mlp": nn.ModuleList(mlp),
                        "norms": nn.ModuleList(norms),
                    }
                )
            )
        self.norm = nn.RMSNorm(hidden)
        self.lm_head = nn.Linear(hidden, 32000, bias=False)


@each_size(LLAMA)
@pytest.mark.parametrize("bits8", [False, True])
def test_galore_bytes_of_llama_are_the_formula(size: str, bits8: bool) -> None:
    """b (sum m r + 2 n r) + 2 b F, blocks and step counts added, for bf16 models."""
    hidden, ffn, layers, rank = LLAMA[size]
    with torch.device("meta"):
        model = Llama(hidden, ffn, layers).bfloat16()
    matrices = [(hidden, hidden)] * 4 * layers + [(hidden, ffn)] * 3 * layers
    plain = [2 * 0 + 32000 * hidden] * 2 + [hidden] * (2 * layers + 1)

    def moments(count: int) -> int:
        if not bits8:
            return 2 * 4 * count
        return 2 * (count + 4 * -(-count // 256)) if count >= 4096 else 2 * 4 * count

    expected = sum(2 * m * rank + moments(n * rank) for m, n in matrices)
    expected += sum(moments(count) for count in plain) + 4 * (len(matrices) + len(plain))
    name = "galore_adamw_8bit" if bits8 else "galore_adamw"
    assert expected_state_bytes(name, model, rank=rank) == expected
    assert state_bytes(build(name, model, rank=rank)) == expected


def test_expected_bytes_leave_the_model_alone() -> None:
    model = TinyBlock()
    before = [param.detach().clone() for param in model.parameters()]
    expected_state_bytes("galore_adamw", model)
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))


@pytest.mark.parametrize("name", ["rnak", "update_gap", "learning_rate", "galore_rank"])
def test_options_that_no_method_has_are_refused(name: str) -> None:
    with pytest.raises(ValueError, match=f"unknown option '{name}'"):
        param_groups(TinyBlock(), **{name: 4})
