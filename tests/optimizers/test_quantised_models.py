"""`weight_bits`, `weight_group_size` and `weight_include` of every method that keeps its layers."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from support import set_gradients, tiny_model
from torch import nn

from lowrank.optimizers import (
    Int4Weight,
    Int8Weight,
    QuantizedWeight,
    available,
    build,
    convert,
    expected_state_bytes,
    expected_weight_bytes,
    merge,
    state_bytes,
)
from lowrank.optimizers.engine.method import TABLE
from lowrank.optimizers.layers.convert import factored_layers

KEEPING = [name for name in available() if not TABLE[name].conversion.replaces_layers]
OPTIONS: dict[str, dict[str, Any]] = {"galore_plus_adamw": {"heads": 2}}
ALL = ("embeddings", "head")


@pytest.mark.parametrize(
    ("name", "bits"),
    [*((name, 8) for name in KEEPING), ("galore_adamw", 4), ("qgalore_adamw_8bit", 4)],
)
def test_every_method_trains_them(name: str, bits: int) -> None:
    """Weights follow a dense twin's; states have the formula's bytes."""
    options = {"lr": 3e-3, "rank": 4, "update_proj_gap": 2, **OPTIONS.get(name, {})}
    given = {"weight_bits": bits, "weight_include": ALL, "weight_group_size": 16}
    moved: list[dict[str, torch.Tensor]] = []
    for own in (given, {"weight_bits": None}):
        model = tiny_model()
        if own is not given:  # from the same first weights
            model = merge(convert(name, model, **given))
        assert expected_state_bytes(name, model, **options, **own) >= 0
        optimizer = build(name, model, **options, **own)
        start = {n: p.detach().clone() + 0 for n, p in model.named_parameters()}
        for step in range(6):
            set_gradients(model, step)
            optimizer.step()
        assert state_bytes(optimizer) == expected_state_bytes(name, model, **options, **own)
        moved.append({n: p.detach() - start[n] for n, p in model.named_parameters()})
        kinds = {n for n, p in model.named_parameters() if isinstance(p, QuantizedWeight)}
        expected = {n for n, p in model.named_parameters() if p.dim() == 2 and own is given}
        assert kinds == expected
    for key, quantised in moved[0].items():
        dense = moved[1][key].flatten()
        if float(dense.norm()) == 0:
            continue
        noise = quantised.flatten() - dense
        # unbiased: the part along the dense update is the whole of it, up to rounding noise
        slope = float(quantised.flatten() @ dense / dense.square().sum())
        spread = float(noise.std()) / float(dense.norm())
        assert abs(slope - 1) < 5 * spread + 0.15, key


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("galore_adamw", {}),
        ("qgalore_adamw_8bit", {}),
        ("apollo_adamw", {"weight_bits": 4, "weight_include": ALL, "weight_group_size": 20}),
        ("sltrain_adamw", {"rank": 4}),
        ("switchlora_adamw", {"rank": 4, "offload": True}),
    ],
)
def test_weight_bytes_are_known_before(name: str, options: dict[str, Any]) -> None:
    model = tiny_model(dtype=torch.bfloat16)
    expected = expected_weight_bytes(name, model, **options)
    assert all(type(param) is nn.Parameter for param in model.parameters())
    assert expected_weight_bytes(name, model.to("meta"), **options) == expected
    model = convert(name, tiny_model(dtype=torch.bfloat16), **options)
    tensors = [*model.parameters(), *model.buffers()]
    tensors += [
        getattr(layer, host) for _, layer in factored_layers(model) for host in layer.host_tensors()
    ]
    parts = [p for t in tensors for p in (t.parts() if isinstance(t, QuantizedWeight) else (t,))]
    assert sum(part.untyped_storage().nbytes() for part in parts) == expected


@pytest.mark.parametrize("bits", [8, 4])
def test_tied_weights_are_tied_or_refused(bits: int) -> None:
    model = tiny_model()
    model.lm_head.weight = model.embed_tokens.weight
    for include, other in ((("head",), "embed_tokens"), ("embeddings", "lm_head")):
        with pytest.raises(ValueError, match=rf"is also {other}\.weight, which is not included"):
            convert("galore_adamw", model, weight_bits=bits, weight_include=include)
        assert not any(isinstance(p, QuantizedWeight) for p in model.parameters())
    optimizer = build("galore_adamw", model, rank=4, weight_bits=bits, weight_include=ALL)
    assert model.lm_head.weight is model.embed_tokens.weight
    assert model.lm_head.weight in optimizer.state
    model(torch.arange(8).view(1, 8)).sum().backward()
    optimizer.step()
    other = convert("galore_adamw", tiny_tied(), weight_bits=bits, weight_include=ALL)
    other.load_state_dict(model.state_dict())
    assert torch.equal(other.lm_head.weight.codes, model.lm_head.weight.codes)
    assert merge(model).lm_head.weight is model.embed_tokens.weight


def tiny_tied() -> nn.Module:
    model = tiny_model(seed=3)
    model.lm_head.weight = model.embed_tokens.weight
    return model


def test_what_is_converted_stays_and_a_contradiction_raises() -> None:
    model = convert("galore_adamw", tiny_model(), weight_bits=4)
    weight = model.mlp["up_proj"].weight
    for name in ("galore_adamw", "adamw", "qgalore_adamw_8bit"):
        build(name, model, **({"rank": 4} if name != "adamw" else {}))
        assert model.mlp["up_proj"].weight is weight
    for bits in (8, None):
        with pytest.raises(ValueError, match=rf"weight_bits={bits} for a model whose .* in 4 bits"):
            build("galore_adamw", model, rank=4, weight_bits=bits)
    convert("galore_adamw", model, weight_bits=4, weight_include="head")
    assert isinstance(model.lm_head.weight, Int4Weight)
    assert model.mlp["up_proj"].weight is weight


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"weight_bits": 5}, r"weight_bits=5.*8, 4, None"),
        ({"weight_bits": 4, "weight_group_size": 7}, r"weight_group_size=7 with weight_bits=4"),
        ({"weight_bits": 4, "weight_group_size": 0}, "weight_group_size=0"),
        ({"weight_bits": 8, "weight_include": ("norms",)}, "weight_include='norms'"),
        ({"weight_include": ("head",)}, r"weight_include=\('head',\) with dense weights"),
        ({"weight_group_size": 64}, "weight_group_size=64 with dense weights"),
    ],
)
def test_bad_options_change_nothing(options: dict[str, Any], message: str) -> None:
    model = tiny_model()
    with pytest.raises(ValueError, match=message):
        build("galore_adamw", model, rank=4, **options)
    assert not any(isinstance(p, QuantizedWeight) for p in model.parameters())


def test_frozen_embeddings_and_parts_that_are_missing() -> None:
    model = tiny_model()
    model.embed_tokens.requires_grad_(False)
    optimizer = build("adamw", model, weight_bits=4, weight_include="embeddings")
    weight = model.embed_tokens.weight
    assert isinstance(weight, Int4Weight)
    assert not weight.requires_grad
    codes = weight.codes.clone()
    model(torch.arange(8).view(1, 8)).sum().backward()
    optimizer.step()
    assert torch.equal(weight.codes, codes)
    model = nn.ModuleDict({"mlp": nn.Linear(8, 8)})
    for part, missing in (("embeddings", "nn.Embedding"), ("head", "nn.Linear that no pattern")):
        with pytest.raises(ValueError, match=rf"has no {missing}.* without '{part}'"):
            build("galore_adamw", model, rank=4, weight_bits=4, weight_include=part)
        assert type(model["mlp"].weight) is nn.Parameter


def test_methods_that_replace_layers_have_no_such_option() -> None:
    with pytest.raises(ValueError, match="unknown option of relora_adamw 'weight_bits'"):
        build("relora_adamw", tiny_model(), rank=4, weight_bits=8)


def test_embeddings_that_are_changed_in_forward_are_refused() -> None:
    model = tiny_model()
    model.embed_tokens.max_norm = 1.0
    with pytest.raises(ValueError, match=r"embed_tokens has max_norm=1\.0"):
        convert("galore_adamw", model, weight_bits=8, weight_include="embeddings")
    assert not any(isinstance(p, Int8Weight) for p in model.parameters())


@pytest.mark.filterwarnings("ignore:LoQTAdamW has no gradient of the full weight")
@pytest.mark.parametrize("name", available())
def test_every_method_rounds_bfloat16_stochastically(name: str) -> None:
    """Updates far below bf16's precision are lost to the nearest, and arrive on average."""
    options = OPTIONS.get(name, {}) | (
        {"weight_bits": None} if "weight_bits" in TABLE[name].conversion.options else {}
    )
    moved = []
    for stochastic in (False, True):
        model = tiny_model(dtype=torch.bfloat16)
        with torch.no_grad():
            model.embed_tokens.weight.fill_(1.0)
        optimizer = build(name, model, lr=1e-4, rank=4, stochastic_rounding=stochastic, **options)
        for _ in range(3):
            for param in model.parameters():
                if param.requires_grad:
                    param.grad = torch.ones_like(param)
            optimizer.step()
        moved.append(model.embed_tokens.weight.detach().double() - 1)
    assert (moved[0] == 0).all()
    assert (moved[1] < 0).any()
    assert (moved[1] == 0).any()
