"""Lion and SGD with momentum as update rules, whole and in a subspace."""

from __future__ import annotations

import pytest
import references_beyond
import torch
from support import matrix
from torch import Tensor, nn

from lowrank.optimizers import LowRankOptimizer
from lowrank.optimizers.engine.rotation import Rotation
from lowrank.optimizers.engine.rule_families import LION, SGD
from lowrank.optimizers.rules import MOMENT_TRANSPORTS, Lion, Momentum

SHAPE = (9, 14)


def gradients(steps: int = 12) -> list[Tensor]:
    return [1e-2 * (matrix(*SHAPE, 1) + 0.6 * matrix(*SHAPE, k + 2)) for k in range(steps)]


def train(made: torch.optim.Optimizer, weight: nn.Parameter) -> Tensor:
    for grad in gradients():
        weight.grad = grad.to(weight.dtype).clone()
        made.step()
    return weight.detach()


class ProjectedSGD(LowRankOptimizer):
    """SGD with momentum in a subspace."""

    rule = SGD


class ProjectedLion(LowRankOptimizer):
    """Lion in a subspace."""

    rule = LION


@pytest.mark.parametrize("momentum", [0.0, 0.9])
@pytest.mark.parametrize("nesterov", [False, True])
def test_momentum_is_torchs(momentum: float, nesterov: bool) -> None:
    if nesterov and not momentum:
        return
    ours, theirs, other = (nn.Parameter(matrix(*SHAPE, 0)) for _ in range(3))
    made = ProjectedSGD(
        [{"params": [ours]}, {"params": [other], "rank": 2}],
        lr=0.02,
        momentum=momentum,
        nesterov=nesterov,
    )
    assert ("momentum_buffer" in made.state[ours]) == (momentum > 0)
    expected = train(
        torch.optim.SGD([theirs], lr=0.02, momentum=momentum, nesterov=nesterov), theirs
    )
    torch.testing.assert_close(train(made, ours), expected, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("projector", ["singular", "coordinate"])
def test_full_rank_momentum_is_sgd_in_any_orthonormal_basis(projector: str) -> None:
    ours, theirs = (nn.Parameter(matrix(*SHAPE, 0)) for _ in range(2))
    keys = {"rank": 99, "scale": 1.0, "update_proj_gap": 3, "moments": "rotate"}
    made = ProjectedSGD([{"params": [ours], **keys, "projector": projector}], lr=0.02, momentum=0.9)
    expected = train(torch.optim.SGD([theirs], lr=0.02, momentum=0.9), theirs)
    torch.testing.assert_close(train(made, ours), expected, rtol=1e-9, atol=1e-9)


def test_lion_decays_first() -> None:
    ours, other = nn.Parameter(matrix(*SHAPE, 0)), nn.Parameter(matrix(4, 4, 0))
    made = ProjectedLion([{"params": [ours]}, {"params": [other], "rank": 2}], weight_decay=0.1)
    assert made.defaults["lr"] == 1e-4
    expected = references_beyond.lion(
        gradients(), matrix(*SHAPE, 0), lr=1e-4, weight_decay=0.1, decay_first=True
    )
    torch.testing.assert_close(train(made, ours), expected, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("rule", [Lion(0.1), Momentum(0.1)])
@pytest.mark.parametrize("how", MOMENT_TRANSPORTS)
def test_moments_move_with_their_subspace(rule: Lion | Momentum, how: str) -> None:
    assert how in rule.transports
    if how == "keep":
        return
    low, turn = matrix(4, 14, 1), torch.linalg.qr(matrix(4, 4, 2)).Q
    state = rule.init(low.shape, low)
    rule.update([low], [state], [low])
    before = rule.first_moment(state)
    assert before is not None
    before = before.clone()
    rule.transport_moments(state, how, Rotation(left=turn, right=None))
    expected = torch.zeros_like(before) if how == "reset" else turn @ before
    torch.testing.assert_close(rule.first_moment(state), expected)
    assert rule.state_bytes(low.shape, 8) == 8 * low.numel()


def test_a_tensor_learning_rate_is_never_read_back() -> None:
    lr = torch.tensor(0.1)
    for rule in (Lion(lr, capturable=True), Momentum(lr, capturable=True)):
        low = matrix(4, 6, 1)
        (update,) = rule.update([low], [rule.init(low.shape, low)], [low])
        assert update.alpha is lr


@pytest.mark.parametrize("signed", [True, False])
@pytest.mark.parametrize("overwrites", [True, False])
@pytest.mark.parametrize("rows", [1, 7])
def test_pieces_of_several_matrices_are_the_whole(
    rows: int, overwrites: bool, signed: bool
) -> None:
    grads_b = torch.stack([matrix(rows, 5, i) for i in range(3)]).bfloat16()
    alone = [{"exp_avg": matrix(rows, 5, 10 + i).float()} for i in range(3)]
    joined = [{"exp_avg": state["exp_avg"].clone()} for state in alone]
    weights = [torch.zeros(rows, 5, dtype=torch.bfloat16)] * 3
    rule, good_b = Lion(lr=0.1, weight_decay=0.1, signed=signed), torch.tensor([True, False, True])
    grads_b[1] = 0.0
    wanted = rule.update(list(grads_b.unbind()), alone, weights)
    found = rule.update_together(grads_b, joined, weights, good_b=good_b, overwrites=overwrites)
    for i, (update, direction) in enumerate(zip(wanted, found.direction, strict=True)):
        exact = update.direction.bfloat16() if good_b[i] else torch.zeros_like(direction)
        torch.testing.assert_close(direction, exact, rtol=2**-7, atol=1e-6)
        torch.testing.assert_close(joined[i]["exp_avg"], alone[i]["exp_avg"])
    assert (found.alpha, found.decay_factor) == (wanted[0].alpha, wanted[0].decay_factor)
