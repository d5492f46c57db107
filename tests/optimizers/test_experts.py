"""Experts in one parameter of E x m x n train as E parameters would."""

from __future__ import annotations

import copy
import io
import logging
import warnings
from typing import Any

import pytest
import torch
from experts import EXPERTS, ROWS, Moe, Separate, set_gradients, stacked
from table import Row, identifier
from torch import nn

from lowrank.optimizers import (
    GaLoreAdamW,
    Muon,
    build,
    expected_state_bytes,
    param_groups,
    projection_summary,
    state_bytes,
)
from lowrank.optimizers.engine import plan
from lowrank.optimizers.engine.step import projected_params

every = pytest.mark.parametrize("row", ROWS, ids=identifier)
BY_NAME = {row.name: row for row in ROWS}
GALORE = BY_NAME["galore_adamw"]


def follow(
    row: Row,
    steps: int = 9,
    *,
    dtype: torch.dtype = torch.float32,
    changes: dict[int, dict[str, Any]] | None = None,
    broken: int | None = None,
    **options: Any,
) -> None:
    """Trains both forms of a model and compares them.

    Args:
        row: the method.
        steps: their number.
        dtype: of the model.
        changes: options of projected groups that change before a step.
        broken: a step in which one expert's gradient is not finite.
        **options: of `build`.
    """
    model = Moe(dtype=dtype)
    optimizer = stacked(row, model, **options)
    separate = Separate(optimizer, model)
    for step in range(steps):
        for made in (optimizer, separate.optimizer):
            for group in made.param_groups:
                if group.get("rank") is not None:
                    group.update((changes or {}).get(step, {}))
        set_gradients(model, step)
        if step == broken:
            model.mlp.up.grad[1, 2, 3] = torch.nan
        separate.set_gradients(model)
        optimizer.step()
        separate.optimizer.step()
    separate.assert_equal(optimizer, model)


@every
def test_experts_train_as_parameters_of_their_own(row: Row) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        follow(row, broken=4)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("galore_adamw", {"stagger": True, "update_proj_gap": 4}),
        ("galore_adamw", {"moments": "rotate"}),
        ("galore_adamw", {"moments": "reset", "refresh": "warm"}),
        ("galore_adamw", {"schedule": "lazy", "queue_size": 1, "update_proj_gap": 1}),
        ("galore_adamw", {"basis": "int8", "proj_type": "right"}),
        ("galore_adamw", {"capturable": True, "foreach": True}),
        ("galore_adamw", {"foreach": True, "stagger": True}),
        ("galore_adamw", {"proj_type": "full"}),
        ("galore_adamw", {"maximize": True}),
        ("apollo_adamw", {"capturable": True}),
        ("fira_adamw", {"foreach": True}),
    ],
    ids=str,
)
def test_options_are_each_experts_own(name: str, options: dict[str, Any]) -> None:
    follow(BY_NAME[name], 11, **options)


def test_rounding_is_each_experts_own() -> None:
    follow(GALORE, dtype=torch.bfloat16, stochastic_rounding=True)


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("galore_adamw", {"rank": 6}),
        ("galore_adamw", {"rank": 3, "moments": "restore"}),
        ("galore_adamw", {"rank": 6, "moments": "rotate"}),
        ("galore_adamw", {"proj_type": "reverse_std"}),
        ("galore_adamw", {"moments": "reset"}),
        ("galore_adamw", {"basis": "int8", "schedule": "lazy"}),
        ("galore_adamw_8bit", {"rank": 6, "moments": "restore"}),
        ("flora_adafactor", {"rank": 6}),
        ("flora_adafactor", {"seed": 5}),
        ("apollo_adamw", {"seed": 5}),
    ],
    ids=str,
)
def test_changed_options_are_followed_by_each_expert(name: str, change: dict[str, Any]) -> None:
    """At a step in which one expert has no gradient to refit its basis with."""
    follow(BY_NAME[name], 9, changes={5: change})


@every
def test_bytes_are_those_of_the_formula(row: Row) -> None:
    from experts import options_of

    options = options_of(row)
    optimizer = build(row.name, Moe(), **options)
    assert expected_state_bytes(row.name, Moe(), **options) == state_bytes(optimizer)
    set_gradients_of(optimizer)
    optimizer.step()
    assert expected_state_bytes(row.name, Moe().to("meta"), **options) == state_bytes(optimizer)


def set_gradients_of(optimizer: torch.optim.Optimizer) -> None:
    for group in optimizer.param_groups:
        for param in group["params"]:
            param.grad = torch.full_like(param, 1e-3)


@every
def test_a_saved_state_is_resumed_exactly(row: Row) -> None:
    model = Moe()
    optimizer = stacked(row, model)
    for step in range(4):
        set_gradients(model, step)
        optimizer.step()
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    copied = copy.deepcopy(model)
    resumed = stacked(row, copied)
    resumed.load_state_dict(torch.load(file, weights_only=True))
    for step in range(4, 9):
        for trained, made in ((model, optimizer), (copied, resumed)):
            set_gradients(trained, step)
            made.step()
    for a, b in zip(model.parameters(), copied.parameters(), strict=True):
        assert torch.equal(a, b)
    assert resumed.state[copied.mlp.up]["step"].device.type == "cpu"


@pytest.mark.parametrize(
    ("key", "value", "said"),
    [
        ("refreshed_at", torch.tensor([0, 9, 0]), "refreshed_at=9 after 1 steps"),
        ("refreshed_at", torch.tensor([0, -2, 0]), "refreshed_at=-2; accepted is an integer"),
        ("refreshed_at", 0, "refreshed_at as a int"),
        ("step", torch.tensor([1.0, 0.5, 1.0]), "step=0.5"),
        ("step", torch.tensor(1.0), r"step of shape \(\); accepted is \(3,\)"),
        ("basis", torch.zeros(2, 12, 4), r"basis of shape \(2, 12, 4\)"),
    ],
)
def test_a_state_that_does_not_fit_is_refused(key: str, value: Any, said: str) -> None:
    model = Moe()
    optimizer = stacked(GALORE, model)
    set_gradients(model, 2)
    optimizer.step()
    saved = copy.deepcopy(optimizer.state_dict())
    ups = [name for group in optimizer.param_groups for name in group["param_names"]]
    saved["state"][ups.index("mlp.up")][key] = value
    with pytest.raises(ValueError, match=f"mlp.up.* has {said}"):
        optimizer.load_state_dict(saved)


@pytest.mark.parametrize("change", [{}, {"rank": 6, "moments": "rotate"}], ids=str)
def test_step_counts_on_a_device_are_read_once_a_step(
    change: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As those of a DTensor on a GPU: what a step counts on the host is written back."""
    calls: list[int] = []

    def copied(steps: torch.Tensor, *, capturable: bool) -> bool:
        calls.append(len(steps))
        return not capturable

    monkeypatch.setattr(plan, "copied_to_host", copied)  # the other form doesn't ask
    with pytest.warns(UserWarning, match="non-finite gradient"):
        follow(GALORE, 9, changes={5: change}, broken=4)
    assert calls == [EXPERTS, EXPERTS] * 9


def test_an_expert_without_tokens_keeps_its_basis() -> None:
    model = Moe()
    optimizer = stacked(GALORE, model, update_proj_gap=2)
    state = optimizer.state[model.mlp.up]
    for step in range(4):
        set_gradients(model, 2)
        if step in (2, 3):
            model.mlp.up.grad[1] = 0.0
        before = state["basis"].clone()
        optimizer.step()
    assert state["refreshed_at"].tolist() == [2, 0, 2]
    assert torch.equal(before[1], state["basis"][1])
    set_gradients(model, 3)
    optimizer.step()
    assert state["refreshed_at"].tolist() == [4, 4, 4]
    assert not torch.equal(before[1], state["basis"][1])


def test_random_bases_differ_between_experts() -> None:
    model = Moe()
    optimizer = stacked(GALORE, model, projector="random", distribution="orthonormal")
    for param in model.parameters():
        param.grad = torch.ones_like(param)
    optimizer.step()
    first, second, third = optimizer.state[model.mlp.up]["basis"]
    assert not torch.equal(first, second)
    assert not torch.equal(second, third)


def test_nothing_is_copied() -> None:
    model = Moe()
    optimizer = stacked(GALORE, model)
    set_gradients(model, 0)
    (own,) = [p for p in optimizer._prepare() if p.core.projection is not None]
    with torch.no_grad():
        params = projected_params(own, 0)
    found = [param for param in params if param.owner is model.mlp.up]
    assert len(found) == EXPERTS
    state = optimizer.state[model.mlp.up]
    for i, param in enumerate(found):
        assert param.weight.data_ptr() == model.mlp.up[i].data_ptr()
        assert param.grad.data_ptr() == model.mlp.up.grad[i].data_ptr()
        for key in ("basis", "exp_avg", "exp_avg_sq", "step"):
            assert param.state[key].data_ptr() == state[key][i].data_ptr()


def test_a_tensor_of_an_experts_state_is_not_exchanged() -> None:
    model = Moe()
    optimizer = stacked(GALORE, model)
    set_gradients(model, 0)
    (own,) = [p for p in optimizer._prepare() if p.core.projection is not None]
    (param, *_) = [p for p in projected_params(own, 0) if p.owner is model.mlp.up]
    with pytest.raises(TypeError, match="accepted is a change in place"):
        param.state["exp_avg"] = torch.zeros(4, 12)


def test_skipped_updates_are_counted_and_named() -> None:
    model = Moe()
    optimizer = stacked(GALORE, model)
    set_gradients(model, 2)
    model.mlp.down.grad[2, 0, 0] = torch.inf
    with pytest.warns(UserWarning, match=r"non-finite gradient of mlp\.down\.2"):
        optimizer.step()
    assert optimizer.skipped_by_name() == {"mlp.down": 1}
    assert optimizer.state[model.mlp.down]["step"].tolist() == [1.0, 1.0, 0.0]


def test_refresh_events_name_each_expert() -> None:
    model, names = Moe(), []
    optimizer = stacked(GALORE, model)
    optimizer.register_refresh_hook(lambda event: names.append((event.name, event.shape)))
    set_gradients(model, 2)
    model.mlp.up.grad += 1e-4
    optimizer.step()
    assert [name for name in names if "up" in name[0]] == [
        (f"mlp.up.{i}", (20, 12)) for i in range(EXPERTS)
    ]


# Plain rules


@pytest.mark.parametrize("name", ["muon", "galore_muon"])
def test_muon_orthogonalises_each_expert(name: str) -> None:
    row = Row(name, Muon)
    model = Moe()
    optimizer = stacked(row, model)
    separate = Separate(optimizer, model)
    for step in range(4):
        set_gradients(model, step)
        separate.set_gradients(model)
        optimizer.step()
        separate.optimizer.step()
    separate.assert_equal(optimizer, model)


def test_adafactor_factors_each_expert() -> None:
    model = Moe()
    optimizer = build("adafactor", model, lr=1e-2, clip_threshold=1e9)
    separate = Separate(optimizer, model)
    for _ in range(4):
        set_gradients(model, 2)
        separate.set_gradients(model)
        optimizer.step()
        separate.optimizer.step()
    made = separate.weights()
    for name, param in model.named_parameters():
        torch.testing.assert_close(param.detach(), made[name], rtol=1e-5, atol=1e-6)
    assert optimizer.state[model.mlp.up]["exp_avg_sq_row"].shape == (EXPERTS, 20)
    assert optimizer.state[model.mlp.up]["exp_avg_sq_col"].shape == (EXPERTS, 12)


# Groups


def test_groups_hold_experts_but_no_convolutions() -> None:
    model = Moe()
    model.mlp.conv = nn.Conv1d(16, 16, 9)
    model.mlp.depthwise = nn.Conv1d(16, 16, 9, groups=16)
    model.mlp.scale = nn.Parameter(torch.ones(4, 1, 12))
    model.mlp.one = nn.Parameter(torch.ones(1, 12, 12))
    projected, decayed, _ = param_groups(model, rank=4)
    assert projected["param_names"] == ["attn.q.weight", "mlp.up", "mlp.down", "mlp.gate.weight"]
    others = {"mlp.conv.weight", "mlp.depthwise.weight", "mlp.scale", "mlp.one"}
    assert others <= {*decayed["param_names"]}


def test_a_kernel_in_a_projected_group_is_refused() -> None:
    kernel = nn.Parameter(torch.zeros(16, 8, 3))
    with pytest.raises(ValueError, match=r"conv of shape \(16, 8, 3\) would be 16 matrices"):
        GaLoreAdamW([{"params": [("conv", kernel)], "rank": 4}])


def test_what_is_projected_is_told_once(caplog: pytest.LogCaptureFixture) -> None:
    model = Moe()
    with caplog.at_level(logging.INFO, "lowrank"):
        groups = param_groups(model, rank=4, patterns=("mlp", "nowhere"))
        param_groups(model, rank=4, patterns=("mlp", "nowhere"))
    text = projection_summary(groups)
    assert [record.getMessage() for record in caplog.records] == [text]
    total = sum(param.numel() for param in model.parameters())
    share = (1440 + 36) / total
    assert text == (
        f"projected: 7 matrices, {share:.1%} of {total:,} parameters (6 of the matrices are "
        f"experts, in 2 parameters); not projected, of more than 1% each: attn.q.weight "
        f"({144 / total:.1%}), embed.weight ({132 / total:.1%})"
    )


@pytest.mark.parametrize("kind", ["Mixtral", "Qwen3Moe"])
def test_experts_of_transformers_are_found(kind: str) -> None:
    transformers = pytest.importorskip("transformers")
    sizes = {"num_hidden_layers": 1, "hidden_size": 16, "vocab_size": 32, "head_dim": 8}
    sizes |= {"num_attention_heads": 2, "num_key_value_heads": 2, "intermediate_size": 24}
    sizes |= {"moe_intermediate_size": 24, "num_local_experts": 4, "num_experts": 4}
    sizes |= {"num_experts_per_tok": 2}
    config = getattr(transformers, f"{kind}Config")(**sizes)
    model = getattr(transformers, f"{kind}ForCausalLM")(config)
    stacks = {name: tuple(p.shape) for name, p in model.named_parameters() if p.dim() == 3}
    (projected, *_) = param_groups(model, rank=4)
    assert {*stacks} == {n for n in projected["param_names"] if "experts" in n and n in stacks}
    assert len(stacks) == 2
    optimizer = build("galore_adamw", model, rank=4, lr=1e-2)
    model(input_ids=torch.arange(12).view(2, 6), labels=torch.arange(12).view(2, 6)).loss.backward()
    before = {name: p.detach().clone() for name, p in model.named_parameters() if p.dim() == 3}
    optimizer.step()
    assert all(not torch.equal(before[n], p) for n, p in model.named_parameters() if n in before)
