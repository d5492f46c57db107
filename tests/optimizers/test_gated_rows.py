"""Plain updates under a flag on the device: in pieces, without a copy of the gradient."""

from __future__ import annotations

import pytest
import torch

from lowrank.optimizers.engine import chunks
from lowrank.optimizers.engine.devices import as_on_gpu
from lowrank.optimizers.rules import Adam, Adam8bit, Lion, UpdateRule
from lowrank.optimizers.rules.base import State
from lowrank.trainers.plan.ledger import Ledger

ROWS, WIDTH = 64, 256
RULES = [
    Adam(lr=0.1, weight_decay=0.1, fused=False),  # as a flag has it
    Adam8bit(lr=0.1, weight_decay=0.1),
    Lion(lr=0.1, weight_decay=0.1),
]


def started(rule: UpdateRule, weight: torch.Tensor) -> State:
    """A state with moments, at its second step."""
    state = {**rule.init(weight.shape, weight), "step": torch.tensor(1.0)}
    rule.apply([torch.randn_like(weight)], [state], [weight.clone()])
    state["step"] += 1
    return state


@pytest.mark.parametrize("good", [True, False])
@pytest.mark.parametrize("rule", RULES, ids=lambda rule: type(rule).__name__)
def test_pieces_are_masked_as_the_whole_would_be(
    rule: UpdateRule, good: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(chunks, "CACHE_ELEMENTS", 8 * WIDTH)
    torch.manual_seed(0)
    weight, grad = torch.randn(ROWS, WIDTH), torch.randn(ROWS, WIDTH)
    if not good:
        grad[3, 4] = float("nan")
    flag, made = torch.tensor(good), []
    for masks in (type(rule).gated_rows, UpdateRule.gated_rows):
        torch.manual_seed(1)
        own = weight.clone()
        state = started(rule, own)
        updates = masks(rule, grad, state, own, flag)
        directions = [updates(rows).direction for rows in chunks.row_chunks(own, block=256)]
        made.append([torch.cat(directions), *(state[key] for key in sorted(state))])
    assert len(directions) == 8
    for ours, theirs in zip(*made, strict=True):
        assert torch.equal(ours, theirs)
    assert bool(made[0][0].any()) is good


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: type(rule).__name__)
def test_a_flag_changes_no_bit_of_a_good_update_and_leaves_decay_to_others(
    rule: UpdateRule,
) -> None:
    torch.manual_seed(0)
    weight, grad = torch.randn(ROWS, WIDTH), torch.randn(ROWS, WIDTH)
    found = []
    for flags in (None, torch.tensor([True]), torch.tensor([False])):
        torch.manual_seed(1)
        own = weight.clone()
        given = grad if flags is None or flags.all() else torch.full_like(grad, float("nan"))
        rule.apply([given], [started(rule, own)], [own], flags)
        found.append(own)
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[2], weight * (1 - 0.1 * 0.1))


def test_no_copy_of_the_gradient_is_made(monkeypatch: pytest.MonkeyPatch) -> None:
    """All copies of a piece, some in float32, are less than the gradient here."""
    monkeypatch.setattr(chunks, "ENTRY_ELEMENTS", WIDTH)
    torch.manual_seed(0)
    rule, weight = Adam8bit(lr=0.1), torch.randn(32 * ROWS, WIDTH).bfloat16()
    state, grad, flags = started(rule, weight), torch.randn_like(weight), torch.tensor([True])
    ledger = Ledger()
    ledger.hold([weight, grad, *state.values()], "given")
    with as_on_gpu(), ledger:
        monkeypatch.setattr("lowrank.optimizers.rules.adam8bit.DEVICE_ELEMENTS", 0)
        rule.apply([grad], [state], [weight], flags)
    assert ledger.peak.parts["other"] < grad.nbytes / 2
