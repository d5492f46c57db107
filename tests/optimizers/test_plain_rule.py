"""Embeddings, head, norms and biases under another rule than the method's own."""

from __future__ import annotations

import copy
import io
import types
from typing import Any

import pytest
import torch
from support import set_gradients, tiny_model
from torch import Tensor, nn

from lowrank.optimizers import (
    FloraAdafactor,
    GaLoreAdamW,
    LowRankOptimizer,
    available,
    build,
    expected_state_bytes,
    param_groups,
    state_bytes,
    update_in_backward,
)
from lowrank.optimizers.engine.method import TABLE

RULES = ("adamw", "adamw_8bit", "adafactor")


def model_of_heads() -> nn.Module:
    model = tiny_model()
    model.config = types.SimpleNamespace(num_attention_heads=2)  # GaLore+ asks for it
    return model


def built(name: str, model: nn.Module, **options: Any) -> LowRankOptimizer:
    return build(name, model, lr=1e-2, **{"rank": 4, "plain_lr": 3e-3, **options})


def stepped(model: nn.Module, optimizer: LowRankOptimizer, steps: range) -> None:
    for step in steps:
        set_gradients(model, step)
        optimizer.step()
        optimizer.zero_grad()


def ruled(optimizer: LowRankOptimizer) -> set[Tensor]:
    groups = [group for group in optimizer.param_groups if group.get("plain_rule")]
    return {param for group in groups for param in group["params"]}


def reference_adamw(weight: Tensor, grads: list[Tensor], lr: float) -> Tensor:
    """Loshchilov and Hutter, algorithm 2, without decay."""
    first, second = torch.zeros_like(weight), torch.zeros_like(weight)
    for t, grad in enumerate(grads, 1):
        first = 0.9 * first + 0.1 * grad
        second = 0.999 * second + 0.001 * grad**2
        weight = weight - lr * (first / (1 - 0.9**t)) / ((second / (1 - 0.999**t)).sqrt() + 1e-8)
    return weight


def reference_adafactor(weight: Tensor, grads: list[Tensor], lr: float) -> Tensor:
    """Shazeer and Stern, algorithms 4 and 5, at a rate of its own and without momentum."""
    rows = columns = whole = torch.zeros(())
    for t, grad in enumerate(grads, 1):
        decay, square = 1 - t**-0.8, grad**2 + 1e-30
        if weight.ndim == 2:
            rows = decay * rows + (1 - decay) * square.mean(1)
            columns = decay * columns + (1 - decay) * square.mean(0)
            second = torch.outer(rows, columns) / rows.mean()
        else:
            second = whole = decay * whole + (1 - decay) * square
        update = grad / second.sqrt()
        weight = weight - lr * update / max(1.0, float(update.square().mean().sqrt()))
    return weight


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("name", available())
def test_the_rule_is_the_paper_s_and_hidden_matrices_keep_the_method(name: str, rule: str) -> None:
    model, own = model_of_heads().double(), model_of_heads().double()
    options: dict[str, Any] = {"weight_decay": 0.0}
    if "betas" in TABLE[name].constructor_options():
        options["betas"] = (0.9, 0.999)
    if name == "lisa_adamw":
        options["active_layers"] = 3  # all: none rests
    optimizer = built(name, model, plain_rule=rule, **options)
    kept = built(name, own, **options)
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    grads: dict[str, list[Tensor]] = {n: [] for n in before}
    for step in range(5):
        for net in (model, own):
            set_gradients(net, step)
        for n, p in model.named_parameters():
            if p.grad is not None:
                grads[n].append(p.grad.clone())
        optimizer.step()
        kept.step()
    # Matrices this small keep moments of 32 bits under 8-bit AdamW as well.
    rule_of = reference_adafactor if rule == "adafactor" else reference_adamw
    others, chosen = dict(own.named_parameters()), ruled(optimizer)
    assert {"embed_tokens.weight", "lm_head.weight", "norm.weight"} <= {
        n for n, p in model.named_parameters() if p in chosen
    }
    for n, p in model.named_parameters():
        if p in chosen:
            wanted = rule_of(before[n], grads[n], 3e-3)
            torch.testing.assert_close(p.detach(), wanted, rtol=1e-6, atol=1e-9)
        else:
            assert torch.equal(p, others[n]), n


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("name", available())
def test_every_method_takes_a_rule(name: str, rule: str) -> None:
    model = model_of_heads()
    optimizer = built(name, model, plain_rule=rule)
    chosen = ruled(optimizer)
    assert model.lm_head.weight in chosen
    assert model.embed_tokens.weight in chosen
    members = [p for group in optimizer.param_groups for p in group["params"]]
    assert len({*members}) == len(members)
    whole = [p for group in built(name, model_of_heads()).param_groups for p in group["params"]]
    assert len(members) == len(whole)
    hidden = [p for p in members if p not in chosen and p.ndim > 1]
    assert hidden, "no hidden matrix keeps the method"
    options = {"rank": 4, "plain_rule": rule}
    assert expected_state_bytes(name, model_of_heads(), **options) == state_bytes(optimizer)
    stepped(model, optimizer, range(2))
    # A saved state goes on to the bit.
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    again = copy.deepcopy(model)
    other = built(name, again, plain_rule=rule)
    other.load_state_dict(torch.load(file, weights_only=True))
    stepped(model, optimizer, range(2, 4))
    stepped(again, other, range(2, 4))
    for (n, p), (_, q) in zip(model.named_parameters(), again.named_parameters(), strict=True):
        assert torch.equal(p, q), n


def wide_model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Embedding(512, 16), nn.Linear(16, 16), nn.Linear(16, 512))


@pytest.mark.parametrize("name", ["galore_adamw", "galore_adafactor", "muon"])
def test_plain_moments_of_eight_bits_are_those_of_the_method_of_this_name(name: str) -> None:
    model, whole = wide_model(), wide_model()
    options: dict[str, Any] = {"rank": 4, "patterns": "1", "weight_decay": 0.01}
    optimizer = build(
        name,
        model,
        lr=1e-2,
        plain_rule="adamw_8bit",
        moments_dtype="bfloat16",
        **({"betas": (0.9, 0.999)} if name == "muon" else {}),
        **options,
    )
    assert {model[0].weight, model[2].weight} <= ruled(optimizer)
    eight = build("adamw_8bit", whole, lr=1e-2, weight_decay=0.01)
    for step in range(4):
        for net, stepper in ((model, optimizer), (whole, eight)):
            set_gradients(net, step)
            stepper.step()
    for at in (0, 2):
        state = optimizer.state[model[at].weight]
        assert state["exp_avg"].dtype == state["exp_avg_sq"].dtype == torch.uint8
        assert torch.equal(model[at].weight, whole[at].weight)
        torch.testing.assert_close(state, eight.state[whole[at].weight], rtol=0, atol=0)


def test_own_is_the_method_s_rule() -> None:
    plain, named = model_of_heads(), model_of_heads()
    stepped(plain, built("muon", plain), range(3))
    stepped(named, built("muon", named, plain_rule="own"), range(3))
    for p, q in zip(plain.parameters(), named.parameters(), strict=True):
        assert torch.equal(p, q)


def test_a_state_saved_under_own_is_one_of_no_other_rule() -> None:
    for named, other in ((True, False), (False, True)):
        saved, loads = (built("galore_adamw", model_of_heads()) for _ in range(2))
        for optimizer, says in ((saved, named), (loads, other)):
            for group in optimizer.param_groups[1:] if says else ():
                group["plain_rule"] = "own"
        loads.load_state_dict(saved.state_dict())


def test_rates_of_embeddings_and_head_hold_under_a_rule() -> None:
    model = model_of_heads()
    optimizer = built("fira_adamw", model, plain_rule="adafactor", embedding_lr=0.1, head_lr=5e-3)
    of = {p: group for group in optimizer.param_groups for p in group["params"]}
    assert of[model.embed_tokens.weight]["lr"] == 0.1
    assert of[model.lm_head.weight]["lr"] == 5e-3
    assert of[model.norm.weight]["lr"] == 3e-3
    assert {of[p]["plain_rule"] for p in ruled(optimizer)} == {"adafactor"}


def test_a_state_under_another_rule_is_refused() -> None:
    factored = built("galore_adamw", model_of_heads(), plain_rule="adafactor")
    for options in ({}, {"plain_rule": "adamw"}, {"plain_rule": "adamw_8bit"}):
        with pytest.raises(ValueError, match="plain_rule"):
            factored.load_state_dict(
                built("galore_adamw", model_of_heads(), embedding_lr=None, **options).state_dict()
            )
        with pytest.raises(ValueError, match="plain_rule"):
            built("galore_adamw", model_of_heads(), **options).load_state_dict(
                factored.state_dict()
            )


def test_wrong_uses_are_named() -> None:
    model = model_of_heads()
    with pytest.raises(ValueError, match=r"plain_rule='sgd': accepted.*adamw.*adafactor"):
        build("galore_adamw", model, plain_rule="sgd")
    with pytest.raises(ValueError, match=r"plain_rule='adafactor' in a group that is projected"):
        GaLoreAdamW(param_groups(model, rank=4, plain_rule="adafactor"))
    with pytest.raises(ValueError, match=r"capturable=True with plain_rule='adafactor'"):
        build("galore_adamw", model, plain_rule="adafactor", capturable=True)
    for rule in ("adamw", "adamw_8bit"):
        build("galore_adamw", model, plain_rule=rule, capturable=True)


@pytest.mark.parametrize("rule", RULES)
def test_hidden_matrices_of_a_method_s_own_choice_keep_it(rule: str) -> None:
    """SCALE takes linear layers outside attention and MLP for hidden matrices."""
    model = nn.ModuleDict(
        {"layers": tiny_model(), "extra": nn.Linear(6, 4), "head": nn.Linear(4, 8)}
    )
    optimizer = build("scale_sgd", model, lr=1e-2, plain_lr=3e-3, plain_rule=rule)
    chosen = ruled(optimizer)
    assert model["extra"].weight not in chosen
    assert {model["extra"].bias, model["head"].weight} <= chosen


def test_a_rule_set_in_a_group_later_makes_its_state_anew() -> None:
    model, wanted = model_of_heads(), model_of_heads()
    optimizer = built("galore_adamw", model, weight_decay=0.0)
    for group in optimizer.param_groups[1:]:
        group["plain_rule"] = "adafactor"
    stepped(model, optimizer, range(3))
    stepped(wanted, built("galore_adamw", wanted, plain_rule="adafactor"), range(3))
    for (n, p), (_, q) in zip(model.named_parameters(), wanted.named_parameters(), strict=True):
        assert torch.equal(p, q), n


def test_updates_in_the_backward_pass_are_the_same() -> None:
    made = []
    for inside in (False, True):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Embedding(16, 8), nn.Linear(8, 8), nn.Linear(8, 16))
        optimizer = build(
            "galore_adamw", model, lr=1e-2, rank=4, patterns="1", plain_rule="adafactor"
        )
        handle = update_in_backward(optimizer) if inside else None
        for step in range(4):
            tokens = torch.randint(0, 16, (4, 6), generator=torch.Generator().manual_seed(step))
            nn.functional.cross_entropy(model(tokens).flatten(0, 1), tokens.flatten()).backward()
            optimizer.step()
            optimizer.zero_grad()
        made.append([param.detach().clone() for param in model.parameters()])
        if handle is not None:
            handle.remove()
    for plain, backward in zip(*made, strict=True):
        assert torch.equal(plain, backward)


def test_a_second_head_is_told() -> None:
    model = nn.ModuleDict(
        {"layers": tiny_model(), "first": nn.Linear(4, 8), "second": nn.Linear(4, 8)}
    )
    with pytest.warns(UserWarning, match=r"head_lr=0\.5 is for second.*first.* may be heads too"):
        build("galore_adamw", model, lr=0.01, rank=4, head_lr=0.5)


def test_a_state_that_was_sorted_by_other_options_says_which() -> None:
    apart = build("galore_adamw", model_of_heads(), lr=0.01, rank=4, embedding_lr=0.1)
    with pytest.raises(ValueError, match=r"build sorts by patterns, embedding_lr, head_lr and pl"):
        build("galore_adamw", model_of_heads(), lr=0.01, rank=4).load_state_dict(apart.state_dict())


@pytest.mark.parametrize("wrong", ["AdamW", True, "adamw"])
def test_a_projected_group_has_no_other_rule_under_flora(wrong: Any) -> None:
    groups = param_groups(model_of_heads(), rank=4)
    groups[0]["plain_rule"] = wrong
    with pytest.raises(ValueError, match="plain_rule="):
        FloraAdafactor(groups, lr=0.01)


@pytest.mark.parametrize("spread", [0.0, 3.0])
def test_steps_with_moments_of_eight_bits_are_no_longer_than_others(spread: float) -> None:
    """Where gradients have gone or differ by decades within a block of 256."""
    longest = {}
    for rule in ("adamw", "adamw_8bit"):
        torch.manual_seed(0)
        model = nn.ModuleDict(
            {"embed": nn.Embedding(128, 64), "layers": nn.ModuleList([nn.Linear(8, 8)])}
        )
        optimizer = build(
            "galore_adamw", model, lr=1e-3, rank=4, plain_rule=rule, patterns="layers"
        )
        weight, steps = model["embed"].weight, []
        scales = 10.0 ** (-spread * torch.rand(128, 1))
        for step in range(8):
            before = weight.detach().clone()
            weight.grad = (
                torch.randn_like(weight) * scales if step < 3 else torch.zeros_like(weight)
            )
            optimizer.step()
            steps.append(float((weight.detach() - before).abs().max()) / 1e-3)
        assert ("exp_avg_sq_absmax" in optimizer.state[weight]) == (rule == "adamw_8bit")
        longest[rule] = max(steps)
    assert longest["adamw_8bit"] < 1.5 * longest["adamw"]
