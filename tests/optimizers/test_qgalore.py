"""Q-GaLore whole: its written-out rule, its options, its bytes, and the ways to train it."""

from __future__ import annotations

import copy
import itertools
from typing import Any

import pytest
import torch
from references_qgalore import qgalore
from support import TinyBlock, hashed, matrix, set_gradients, tiny_model
from table import each_size
from test_groups_and_registry import LLAMA, Llama
from torch import Tensor, nn

from lowrank.optimizers import (
    GaLoreAdamW8bit,
    Int8Weight,
    QGaLoreAdamW8bit,
    build,
    convert,
    expected_state_bytes,
    param_groups,
    state_bytes,
    state_bytes_by_category,
)

NAME = "qgalore_adamw_8bit"


def gradient(shape: tuple[int, int], step: int, drift: float) -> Tensor:
    """Gradients whose leading direction moves little (drift 0) or much."""
    steady = torch.outer(hashed(shape[0], 70), hashed(shape[1], 71))
    return (1e-2 * (steady + drift * matrix(*shape, step + 2))).float()


@pytest.mark.parametrize("shape", [(24, 17), (17, 24), (16, 16)], ids=str)
@pytest.mark.parametrize("drift", [0.1, 2.0])
def test_equals_the_written_out_rule(shape: tuple[int, int], drift: float) -> None:
    """40 steps, at least eight refreshes, partial groups on both sides, growing gaps."""
    settings: dict[str, Any] = {"rank": 3, "scale": 0.25, "queue_size": 3}
    grads = [gradient(shape, step, drift) for step in range(40)]
    dense = (0.2 * matrix(*shape, 0)).float()
    other = nn.Parameter(Int8Weight.quantize(dense, 100))
    weight = nn.Parameter(Int8Weight.quantize(dense, 100))
    keys = {"update_proj_gap": 3, "quant_group_size": 32, "refresh": "svd"}
    group = {"params": [other, weight], **settings, **keys}
    optimizer = QGaLoreAdamW8bit([group], lr=0.01, weight_decay=0.1, min_8bit_size=10**6, seed=11)
    events = []
    optimizer.register_refresh_hook(events.append)
    for grad in grads:
        other.grad, weight.grad = grad.clone(), grad.clone()
        optimizer.step()
    expected = qgalore(
        grads,
        dense,
        **settings,
        gap=3,
        lr=0.01,
        weight_decay=0.1,
        basis_group=32,
        weight_group=100,
        seed=11,
        name="param.1",
    )
    state = optimizer.state[weight]
    assert state["gap"] == expected.gap
    assert sorted({event.step - 1 for event in events}) == expected.refreshed
    assert len(expected.refreshed) >= (4 if drift < 1 else 8)
    assert (expected.gap > 3) == (drift < 1)
    # fp32 sums fall on the other side of a rounding once in a while
    differing = weight.codes.flatten() != expected.weight.codes
    assert differing.float().mean() < 0.01
    apart = (weight.dequantize().flatten().double() - expected.weight.dense).abs()
    assert (apart <= 1.01 * expected.weight.scales).all()
    # another matrix has other noise
    assert not torch.equal(other.codes, weight.codes)


def test_with_dense_parts_it_is_8bit_galore() -> None:
    weights = []
    for cls, options in (
        (GaLoreAdamW8bit, {}),
        (QGaLoreAdamW8bit, {"quant": False, "cos_threshold": 1.0}),
    ):
        weight = nn.Parameter((0.2 * matrix(80, 64, 0)).float())
        group = {"params": [weight], "rank": 8, "update_proj_gap": 2, **options}
        optimizer = cls([group], lr=0.01, min_8bit_size=0)
        for step in range(5):
            weight.grad = gradient((80, 64), step, 1.0)
            optimizer.step()
        weights.append(weight)
    assert torch.equal(*weights)


def test_official_groups_and_keywords() -> None:
    weight = nn.Parameter(torch.zeros(8, 8))
    group = {
        "params": [weight],
        "rank": 4,
        "update_proj_gap": 200,
        "scale": 0.25,
        "proj_type": "std",
        "quant": True,
        "quant_group_size": 256,
        "quant_n_bit": 4,
        "cos_threshold": 0.4,
        "gamma_proj": 2,
        "queue_size": 5,
    }
    optimizer = QGaLoreAdamW8bit(
        [{**group}], percentile_clipping=100, block_wise=True, is_paged=False
    )
    defaults = ("lr", "betas", "eps", "weight_decay")
    assert [optimizer.defaults[key] for key in defaults] == [1e-3, (0.9, 0.999), 1e-8, 1e-2]
    own = QGaLoreAdamW8bit([{"params": [weight], "rank": 4}]).param_groups[0]
    for key, value in group.items():
        if key not in ("params", "quant", "quant_n_bit"):
            assert own[key] == value, key
    assert own["basis"] == "int4"
    for bits, basis in ((8, "int8"), (4, "int4")):
        made = QGaLoreAdamW8bit([{**group, "quant_n_bit": bits}])
        assert made.param_groups[0]["basis"] == basis
    dense = QGaLoreAdamW8bit([{**group, "quant": False}])
    assert dense.param_groups[0]["basis"] is None
    by_keyword = QGaLoreAdamW8bit([{"params": [weight], "rank": 4}], quant_n_bit=8)
    assert by_keyword.param_groups[0]["basis"] == "int8"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"quant_n_bit": 3}, r"quant_n_bit=3.*4, 8"),
        ({"quant": "yes"}, "quant='yes'"),
        ({"quant_group_size": 0}, "quant_group_size=0"),
        ({"quant_format": "fp4"}, "quant_format='fp4'.*'nf4'"),
        ({"cos_threshold": 2.0}, "cos_threshold=2.0"),
        ({"gamma_proj": 0.5}, "gamma_proj=0.5"),
        ({"queue_size": 0}, "queue_size=0"),
        ({"weight_bits": 16}, "weight_bits=16.*8, 4, None"),
        ({"weight_group_size": 0}, "weight_group_size=0"),
        ({"weight_bit": 8}, "did you mean 'weight_bits'"),
        ({"stochastic_rounding": 1.5}, "stochastic_rounding=1.5"),
    ],
)
def test_bad_options_name_the_value(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build(NAME, tiny_model(), rank=4, **options)


def test_options_of_strategies_not_chosen_raise() -> None:
    with pytest.raises(ValueError, match=r"quant_group_size=64.*basis='int8'"):
        build("galore_adamw", tiny_model(), rank=4, quant_group_size=64)
    with pytest.raises(ValueError, match=r"gamma_proj=2.*schedule='lazy'"):
        build("galore_adamw", tiny_model(), rank=4, gamma_proj=2)


def test_seeds_reproduce() -> None:
    codes = []
    for seed in (0, 0, 1):
        model = tiny_model()
        optimizer = build(NAME, model, lr=1e-2, rank=4, update_proj_gap=3, seed=seed)
        for step in range(4):
            set_gradients(model, step)
            optimizer.step()
        codes.append(model.mlp["up_proj"].weight.codes.clone())
    assert torch.equal(codes[0], codes[1])
    assert not torch.equal(codes[0], codes[2])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("checkpointed", [False, True])
def test_every_parameter_trains_under_accumulation_and_clipping(
    dtype: torch.dtype, checkpointed: bool
) -> None:
    """As in a loop that knows nothing of INT8; the gradients are the dense layer's."""
    model = convert(NAME, tiny_model(dtype=dtype))
    twin = tiny_model(dtype=dtype)
    with torch.no_grad():
        for p, q in zip(twin.parameters(), model.parameters(), strict=True):
            p.copy_(q.detach())
    before = [param.detach().clone() for param in model.parameters()]
    optimizer = build(NAME, model, lr=1e-2, rank=4, update_proj_gap=2)
    tokens = torch.randint(0, 32, (6, 4, 8))

    def loss_of(module: TinyBlock, batch: Tensor) -> Tensor:
        if checkpointed:
            logits = torch.utils.checkpoint.checkpoint(module, batch, use_reentrant=False)
        else:
            logits = module(batch)
        return nn.functional.cross_entropy(logits.flatten(0, 1).float(), batch.flatten())

    for step in range(3):
        optimizer.zero_grad(set_to_none=step == 0)
        for batch in tokens[2 * step : 2 * step + 2]:
            (loss_of(model, batch) / 2).backward()
            if step == 0:
                (loss_of(twin, batch) / 2).backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 0.01)
        if step == 0:
            expected = torch.nn.utils.clip_grad_norm_(twin.parameters(), 0.01)
            torch.testing.assert_close(norm, expected)
            for p, q in zip(model.parameters(), twin.parameters(), strict=True):
                assert type(p.grad) is Tensor
                assert p.grad.dtype == dtype
                torch.testing.assert_close(p.grad, q.grad)
        optimizer.step()
    for old, new in zip(before, model.parameters(), strict=True):
        assert new.isfinite().all()
        assert not torch.equal(old, new)


def test_grad_scaler_steps_and_skips() -> None:
    model = convert(NAME, tiny_model())
    optimizer = build(NAME, model, lr=1e-2, rank=4)
    scaler = torch.amp.GradScaler("cpu", init_scale=64.0)
    tokens = torch.randint(0, 32, (4, 8))
    weight = model.mlp["up_proj"].weight
    for spoilt in (False, True):
        optimizer.zero_grad()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            logits = model(tokens)
        scaler.scale(nn.functional.cross_entropy(logits.flatten(0, 1), tokens.flatten())).backward()
        assert weight.grad is not None
        assert weight.grad.dtype == torch.float32
        if spoilt:
            weight.grad[0, 0] = torch.inf
        before = weight.codes.clone()
        scaler.step(optimizer)
        scaler.update()
        assert torch.equal(before, weight.codes) == spoilt


def test_small_updates_count_on_average() -> None:
    """Updates of a twentieth of a step add up; rounded to the nearest they never would."""
    dense = (0.2 * matrix(64, 64, 0)).float()
    weight = nn.Parameter(Int8Weight.quantize(dense))
    start = weight.dequantize()
    group = {"params": [weight], "rank": 64, "scale": 1.0, "basis": None}
    # moments in fp32, so that the steps are known
    optimizer = QGaLoreAdamW8bit([group], lr=3e-5, weight_decay=0.0, min_8bit_size=10**6)
    grad = torch.randn(64, 64)
    for _ in range(200):
        weight.grad = grad.clone()
        optimizer.step()
    moved = (weight.dequantize() - start).double()
    direction = optimizer.state[weight]["basis"].double()
    # With a constant gradient each step is lr in each direction of the subspace.
    expected = -3e-5 * 200 * (grad.double() @ direction).sign() @ direction.T
    slope = float((moved * expected).sum() / expected.square().sum())
    assert slope == pytest.approx(1.0, abs=0.1)
    assert float(weight.scales.mean()) > 20 * 3e-5


@pytest.mark.parametrize("name", ["adamw", "adafactor", "muon", "galore_adamw", "fira_adamw"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_other_methods_train_int8_weights_too(name: str, dtype: torch.dtype) -> None:
    quantised, dense = convert(NAME, tiny_model(dtype=dtype)), tiny_model(dtype=dtype)
    for model in (quantised, dense):
        optimizer = build(name, model, lr=1e-2, rank=4)
        for step in range(3):
            set_gradients(model, step)
            optimizer.step()
    assert isinstance(quantised.mlp["up_proj"].weight, Int8Weight)
    for p, q in zip(quantised.parameters(), dense.parameters(), strict=True):
        torch.testing.assert_close(p.detach().float(), q.detach().float(), rtol=0, atol=1.2e-2)


@pytest.mark.parametrize("name", ["galore_adamw", NAME])
def test_stochastic_rounding_of_bfloat16_weights(name: str) -> None:
    """Updates far below bf16's precision: lost when rounded to the nearest, kept on average."""
    changes = []
    for stochastic in (False, True):
        model = tiny_model(dtype=torch.bfloat16)
        with torch.no_grad():
            for param in model.parameters():
                param.fill_(1.0)
        options = {"weight_bits": None} if name == NAME else {}
        optimizer = build(
            name,
            model,
            lr=1e-4,
            rank=16,
            scale=1.0,
            weight_decay=0.0,
            basis=None,
            stochastic_rounding=stochastic,
            **options,
        )
        for _ in range(40):
            for param in model.parameters():
                param.grad = torch.ones_like(param)
            optimizer.step()
        changes.append([p.detach().double().flatten() - 1 for p in model.parameters()])
    assert all((change == 0).all() for change in changes[0])
    means = {
        n: float(c.mean()) for (n, _), c in zip(model.named_parameters(), changes[1], strict=True)
    }
    assert means["embed_tokens.weight"] == pytest.approx(-40 * 1e-4, rel=0.2)
    # the gradient is one direction in which each entry of its vector is 1/4
    assert means["self_attn.q_proj.weight"] == pytest.approx(-10 * 1e-4, rel=0.5)


# Bytes


@each_size(LLAMA)
def test_bytes_of_llama_are_the_formula(size: str) -> None:
    """D1's formulas with packed codes, and the small terms of the method's page; bf16."""
    hidden, ffn, layers, rank = LLAMA[size]
    with torch.device("meta"):
        model = Llama(hidden, ffn, layers).bfloat16()
    shapes = [(hidden, hidden)] * 4 * layers + [(hidden, ffn)] * 3 * layers
    plain = [32000 * hidden] * 2 + [hidden] * (2 * layers + 1)

    def groups(count: int) -> int:
        return -(-count // 256)

    def moments(count: int) -> int:
        return 2 * (count + 4 * groups(count)) if count >= 4096 else 2 * 4 * count

    state = sum(moments(count) + 4 for count in plain)
    weights = 2 * sum(plain)
    for m, n in shapes:
        basis = -(-m * rank // 2) + 2 * 2 * groups(m * rank)
        lazy = 4 * (m + 5)
        state += basis + lazy + moments(n * rank) + 4
        weights += m * n + 2 * 2 * groups(m * n)
    assert expected_state_bytes(NAME, model, rank=rank) == state
    assert not any(isinstance(p, Int8Weight) for p in model.parameters())
    optimizer = build(NAME, model, rank=rank)
    assert state_bytes(optimizer) == state
    assert expected_state_bytes(NAME, model, rank=rank) == state
    assert sum(param.nbytes for param in model.parameters()) == weights
    stored = [
        part
        for param in model.parameters()
        for part in (param.parts() if isinstance(param, Int8Weight) else (param,))
    ]
    assert sum(part.untyped_storage().nbytes() for part in stored) == weights
    saved = weights + 8 * len(shapes)  # each one's group size
    assert sum(t.numel() * t.element_size() for t in model.state_dict().values()) == saved


@pytest.mark.parametrize("basis", ["int4", "int8", None])
@pytest.mark.parametrize("format", ["asymmetric", "nf4"])
def test_basis_bytes_by_category(basis: str | None, format: str) -> None:
    options: dict[str, Any] = {"basis": basis, "rank": 5}
    if basis == "int4":
        options["quant_format"] = format
    if basis is not None:
        options["quant_group_size"] = 7
    optimizer = build(NAME, tiny_model(), **options)
    found = state_bytes_by_category(optimizer)["basis"]
    entries = 16 * 5
    groups = 4 * -(-entries // 7) * (1 if basis == "int4" and format == "nf4" else 2)
    expected = {"int4": 40 + groups, "int8": 80 + groups, None: 320}[basis]
    assert found == 3 * expected
    assert state_bytes(optimizer) == expected_state_bytes(NAME, tiny_model(), **options)


def test_no_temporary_of_the_weights_size() -> None:
    """A step allocates row chunks and low-rank tensors only."""
    weight = nn.Parameter(Int8Weight.quantize((0.02 * torch.randn(1024, 1536)).bfloat16()))
    group = {"params": [weight], "rank": 8, "update_proj_gap": 1000}
    optimizer = QGaLoreAdamW8bit([group], lr=0.01, projection_dtype="float32")
    for _ in range(2):
        weight.grad = torch.randn(1024, 1536, dtype=torch.bfloat16)
        optimizer.step()
    with torch.profiler.profile(profile_memory=True, record_shapes=True) as profile:
        optimizer.step()
    largest = max(event.self_cpu_memory_usage for event in profile.events())
    assert largest <= 4 * (1 << 18) + 4 * 1536  # one fp32 chunk
    assert largest < weight.numel()


def test_groups_of_a_converted_model_are_those_of_the_dense_one() -> None:
    dense, quantised = tiny_model(), convert(NAME, tiny_model())
    for first, second in zip(param_groups(dense), param_groups(quantised), strict=True):
        assert first["param_names"] == second["param_names"]
    named = dict(quantised.named_parameters())
    chosen = [named[name] for name in param_groups(quantised)[0]["param_names"]]
    assert all(isinstance(param, Int8Weight) for param in chosen)
    others = [named[n] for g in param_groups(quantised)[1:] for n in g["param_names"]]
    assert not any(isinstance(param, Int8Weight) for param in others)


def test_copies_of_model_and_optimizer_stay_apart() -> None:
    model = tiny_model()
    optimizer = build(NAME, model, lr=1e-2, rank=4, update_proj_gap=3)
    twin_model, twin = copy.deepcopy((model, optimizer))
    set_gradients(model, 0)
    optimizer.step()
    for param, other in itertools.zip_longest(model.parameters(), twin_model.parameters()):
        assert not torch.equal(param, other)
        assert other in twin.state
