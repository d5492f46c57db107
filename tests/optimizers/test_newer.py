"""SCALE, RACS, FOAM and LoRA-Pre equal their plain fp64 references, and what wrong use does."""

from __future__ import annotations

import logging
from dataclasses import replace

import pytest
import references_newer as references
import torch
from support import TinyBlock, matrix, set_gradients, tiny_model
from table import train as train_model
from torch import Tensor, nn

from lowrank.cuda import rademacher
from lowrank.optimizers import (
    FoamAdamW,
    LoRAPreAdamW,
    Muon,
    RacsAdamW,
    ScaleSGD,
    build,
    expected_state_bytes,
    scale_groups,
    state_bytes,
)
from lowrank.optimizers.coverage import tell
from lowrank.optimizers.engine.processes import Processes
from lowrank.optimizers.engine.sharding import Part
from lowrank.optimizers.rules.factored_moments import SECOND, START
from lowrank.optimizers.rules.folded import FoldedAdam

SHAPES = ((14, 9), (9, 14), (11, 16))


def gradients(shape: tuple[int, int], steps: int = 12) -> list[Tensor]:
    return [1e-2 * (matrix(*shape, 1) + 0.6 * matrix(*shape, k + 2)) for k in range(steps)]


def start(shape: tuple[int, int]) -> nn.Parameter:
    return nn.Parameter(0.2 * matrix(*shape, 0))


def train(made: torch.optim.Optimizer, weight: nn.Parameter, grads: list[Tensor]) -> Tensor:
    for grad in grads:
        weight.grad = grad.to(weight.dtype).clone()
        made.step()
    return weight.detach()


def assert_close(found: Tensor, expected: Tensor, rtol: float = 1e-9) -> None:
    torch.testing.assert_close(found, expected, rtol=rtol, atol=rtol * 1e-2)


# SCALE


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("normalise", ["rows", "columns"])
@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_scale(shape: tuple[int, int], normalise: str, momentum: float) -> None:
    weight, grads = start(shape), gradients(shape)
    axis = 1 if normalise == "rows" else 0
    expected = references.scale(
        grads, weight, lr=0.02, axis=axis, momentum=momentum, weight_decay=0.1
    )
    group = {"params": [weight], "normalise": normalise, "momentum": momentum}
    assert_close(train(ScaleSGD([group], lr=0.02, weight_decay=0.1), weight, grads), expected)


def test_scale_sorts_a_model(caplog: pytest.LogCaptureFixture) -> None:
    model = tiny_model()
    model.conv = nn.Conv1d(3, 4, 5)
    tell.cache_clear()  # it says things once
    with caplog.at_level(logging.INFO, "lowrank"):
        groups = scale_groups(model, plain_lr=0.5)
    assert "head: lm_head.weight; embeddings: embed_tokens.weight; 3 hidden" in caplog.text
    hidden, head, embedding, other, vectors = groups
    assert hidden["param_names"] == [
        *("self_attn.q_proj.weight", "mlp.up_proj.weight", "mlp.down_proj.weight"),
    ]
    assert [g["normalise"] for g in groups] == ["rows", "rows", "columns", None, None]
    assert [g.get("momentum") for g in groups] == [0.0, None, 0.0, None, None]
    assert [g.get("lr") for g in groups] == [None, 0.5, 0.5, 0.5, 0.5]
    assert head["param_names"] == ["lm_head.weight"]
    assert embedding["param_names"] == ["embed_tokens.weight"]
    assert other["param_names"] == ["conv.weight"]
    assert vectors["weight_decay"] == 0.0
    made = build("scale_sgd", model)
    assert "momentum_buffer" in made.state[model.lm_head.weight]
    for name in ("self_attn.q_proj.weight", "embed_tokens.weight"):
        assert made.state[model.get_parameter(name)].keys() == {"step"}


def test_scale_of_a_tied_embedding_is_that_of_the_head() -> None:
    model = tiny_model()
    model.lm_head.weight = model.embed_tokens.weight
    hidden, head, _ = scale_groups(model)
    assert head["param_names"] == ["embed_tokens.weight"]
    assert head["normalise"] == "rows"
    assert len(hidden["params"]) == 3


class Speaking(TinyBlock):
    """A model that says which head it has, as transformers' models do."""

    def get_output_embeddings(self) -> nn.Module | None:
        return self.self_attn["q_proj"]


class Headless(TinyBlock):
    def get_output_embeddings(self) -> nn.Module | None:
        return None


def test_a_model_says_which_head_it_has() -> None:
    torch.manual_seed(0)
    _, head, *_ = scale_groups(Speaking())
    assert head["param_names"] == ["self_attn.q_proj.weight"]
    body = Headless()
    del body.lm_head
    groups = scale_groups(body)
    assert [g["normalise"] for g in groups] == ["rows", "columns", None]


@pytest.mark.parametrize(
    ("method", "said"),
    [
        (ScaleSGD, r"no parameter group has normalise, .*build\('scale_sgd', model\)"),
        (RacsAdamW, "no parameter group has use_racs"),
        (LoRAPreAdamW, "no parameter group has rank"),
        (Muon, r"no parameter group has use_muon, .*build\('muon', model\)"),
    ],
)
def test_parameters_that_nobody_sorted_warn_once(method: type, said: str) -> None:
    with pytest.warns(UserWarning, match=said) as caught:
        method(tiny_model().parameters())
    assert len(caught) == 1


def test_a_vector_can_neither_be_normalised_nor_folded() -> None:
    vector = nn.Parameter(torch.ones(4))
    with pytest.raises(ValueError, match="1-dimensional: accepted are matrices"):
        ScaleSGD([{"params": [vector], "normalise": "rows"}])
    with pytest.raises(ValueError, match="1-dimensional: accepted are matrices"):
        FoamAdamW([vector])


@pytest.mark.parametrize("scale", [1e-6, 1e6])
def test_scale_doesnt_feel_the_gradients_scale(scale: float) -> None:
    usual, other = start((9, 14)), start((9, 14))
    for weight, factor in ((usual, 1.0), (other, scale)):
        made = ScaleSGD([{"params": [weight], "normalise": "rows", "momentum": 0.0}], eps=1e-20)
        train(made, weight, [factor * g for g in gradients((9, 14))])
    assert_close(other.detach(), usual.detach())


# RACS


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("limiter", [1.01, None])
def test_racs(shape: tuple[int, int], limiter: float | None) -> None:
    weight, grads = start(shape), gradients(shape)
    grads[6] = 10 * grads[6]
    expected = references.racs(grads, weight, lr=0.5, limiter=limiter, weight_decay=0.1)
    group = {"params": [weight], "use_racs": True, "limiter": limiter}
    # The limiter's norm is kept in fp32.
    slack = 1e-9 if limiter is None else 1e-4
    made = RacsAdamW([group], lr=0.5, weight_decay=0.1)
    assert_close(train(made, weight, grads), expected, rtol=slack)


def test_racs_leaves_dead_rows_and_outlives_zero_gradients() -> None:
    weight = start((9, 14))
    before = weight.detach().clone()
    made = RacsAdamW([{"params": [weight], "use_racs": True}], lr=0.5)
    grads = gradients((9, 14), 6)
    for grad in grads:
        grad[3], grad[:, 5] = 0.0, 0.0
    grads[2] = torch.zeros(9, 14, dtype=torch.float64)
    train(made, weight, grads[:2])
    kept = {k: v.clone() for k, v in made.state[weight].items() if k.startswith("exp_avg")}
    train(made, weight, grads[2:3])
    assert all(torch.equal(made.state[weight][key], value) for key, value in kept.items())
    train(made, weight, grads[3:])
    assert torch.equal(weight[3], before[3])
    assert torch.equal(weight[:, 5], before[:, 5])
    assert bool(weight.isfinite().all())
    assert not torch.equal(weight, before)


# FOAM


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("level", [0, 1, 2, 6])
def test_foam(shape: tuple[int, int], level: int) -> None:
    """Blocks that divide a row, that leave a rest, and one that is longer than it."""
    weight, grads = start(shape), gradients(shape)
    expected = references.foam(grads, weight, lr=0.02, level=level, c=0.7, weight_decay=0.1)
    made = FoamAdamW([weight], lr=0.02, fold_level=level, residual_scale=0.7, weight_decay=0.1)
    assert_close(train(made, weight, grads), expected)
    blocks = -(-shape[1] // 2**level)
    assert state_bytes(made) == 2 * 8 * shape[0] * blocks + 4


@pytest.mark.parametrize("level", [1, 2, 4])
@pytest.mark.parametrize("limiter", [1.01, None])
def test_haar_is_adam_on_the_approximations(level: int, limiter: float | None) -> None:
    weight, grads = start((11, 16)), gradients((11, 16))
    grads[6] = 10 * grads[6]
    expected = references.gwt(grads, weight, lr=0.02, level=level, limiter=limiter)
    made = FoamAdamW([weight], lr=0.02, fold="haar", fold_level=level, limiter=limiter)
    slack = 1e-9 if limiter is None else 1e-4
    assert_close(train(made, weight, grads), expected, rtol=slack)


def test_haar_of_ragged_rows_is_that_of_their_parts() -> None:
    """A rest of two columns is a block of two."""
    weight, grads = start((5, 10)), gradients((5, 10))
    parts = [nn.Parameter(weight.detach()[:, :8].clone()), nn.Parameter(weight[:, 8:].detach())]
    made = FoamAdamW([weight], lr=0.02, fold="haar", limiter=None)
    train(made, weight, grads)
    for part, columns, level in zip(parts, (slice(0, 8), slice(8, 10)), (2, 1), strict=True):
        own = FoamAdamW([part], lr=0.02, fold="haar", limiter=None, fold_level=level)
        train(own, part, [grad[:, columns] for grad in grads])
        assert_close(weight[:, columns].detach(), part.detach())


def test_blocks_of_one_are_adam() -> None:
    weight, grads = start((9, 14)), gradients((9, 14))
    other = nn.Parameter(weight.detach().clone())
    made = FoamAdamW([weight], lr=0.01, fold_level=0, scale=1.0)
    train(made, weight, grads)
    train(torch.optim.Adam([other], lr=0.01, betas=(0.9, 0.95)), other, grads)
    assert_close(weight.detach(), other.detach())


def test_another_fold_starts_the_moments_anew() -> None:
    """They have the same shape and another scale."""
    weight, grads = start((9, 16)), gradients((9, 16))
    made = FoamAdamW([weight], lr=0.01, limiter=None)
    train(made, weight, grads[:4])
    made.param_groups[0]["fold"] = "haar"
    train(made, weight, grads[4:5])
    assert int(made.state[weight]["step"]) == 1
    made.param_groups[0]["fold"] = "wavelet"
    with pytest.raises(ValueError, match="fold='wavelet': accepted are 'mean', 'haar'"):
        made.step()


@pytest.mark.parametrize("name", ["foam_adamw", "racs_adamw"])
def test_a_scale_below_zero_is_refused(name: str) -> None:
    """It would climb."""
    with pytest.raises(ValueError, match=r"scale=-0\.5: accepted is a finite number of at least 0"):
        build(name, tiny_model(), lr=0.01, scale=-0.5)


# LoRA-Pre


def starts(shape: tuple[int, int], rank: int) -> tuple[Tensor, Tensor]:
    m, n = shape
    signs = rademacher((min(rank, *shape), n), START + m).double() / n**0.5
    second = signs.clone()
    second[0] = n**-0.5
    return signs, second


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("rank", [1, 4, 64])
def test_lora_pre(shape: tuple[int, int], rank: int) -> None:
    weight, grads = start(shape), gradients(shape, 20)
    expected = references.lora_pre(grads, weight, starts(shape, rank), lr=0.02, weight_decay=0.1)
    made = LoRAPreAdamW([{"params": [weight], "rank": rank}], lr=0.02, weight_decay=0.1)
    assert_close(train(made, weight, grads), expected, rtol=1e-6)
    assert state_bytes(made) == 2 * 8 * min(rank, *shape) * sum(shape) + 4


def test_the_first_step_of_lora_pre_is_adams() -> None:
    weight, (grad,) = start((9, 14)), gradients((9, 14), 1)
    other = nn.Parameter(weight.detach().clone())
    train(LoRAPreAdamW([{"params": [weight], "rank": 2}], lr=0.01), weight, [grad])
    train(torch.optim.Adam([other], lr=0.01, betas=(0.9, 0.95)), other, [grad])
    assert_close(weight.detach(), other.detach())


def test_factors_follow_adams_moments_of_low_rank() -> None:
    """Of gradients that stay in a subspace the first moment is Adam's, but for the start."""
    shape, rank = (20, 30), 3
    left, right = matrix(20, rank, 1), matrix(rank, 30, 2)
    grads = [left @ (torch.eye(rank) + matrix(rank, rank, 10 + k)) @ right for k in range(60)]
    weight, m = start(shape), torch.zeros(shape).double()
    made = LoRAPreAdamW([{"params": [weight], "rank": rank}], lr=0.0, ridge=1e-10)
    train(made, weight, grads)
    for grad in grads:
        m = 0.9 * m + 0.1 * grad
    state = made.state[weight]
    found = state["exp_avg_left"] @ state["exp_avg_right"]
    assert float((found - m).norm()) < 0.2 * float(m.norm())


def test_lora_pre_outlives_steps_without_a_gradient() -> None:
    """B shrinks to nothing, and A stays: the next gradient must not be magnified."""
    weight, grads = start((9, 14)), gradients((9, 14), 12)
    made = LoRAPreAdamW([{"params": [weight], "rank": 3}], lr=0.01)
    zero = torch.zeros(9, 14, dtype=torch.float64)
    train(made, weight, grads[:3] + [zero] * 200)
    assert float(made.state[weight][SECOND[1]].norm()) > 0.1
    before = weight.detach().clone()
    train(made, weight, grads[3:])
    # Nine steps of at most a few learning rates each.
    assert float((weight.detach() - before).abs().max()) < 0.5
    made.param_groups[0]["betas"] = (0.01, 0.01)
    train(made, weight, [zero] * 120)
    assert float(made.state[weight]["exp_avg_left"].norm()) < 1e-100
    before = weight.detach().clone()
    train(made, weight, grads)
    assert not torch.equal(weight, before)
    assert float((weight.detach() - before).abs().max()) < 0.5


def test_build_gives_hidden_matrices_the_rank() -> None:
    model = tiny_model()
    made = build("lora_pre_adamw", model, rank=4)
    assert made.state[model.mlp["up_proj"].weight]["exp_avg_left"].shape == (24, 4)
    assert made.state[model.lm_head.weight].keys() == {"step", "exp_avg", "exp_avg_sq"}
    with pytest.raises(ValueError, match="rank=4 is not a keyword of LoRAPreAdamW: it belongs in"):
        LoRAPreAdamW(model.parameters(), rank=4)
    with pytest.raises(ValueError, match=r"ridge=0\.0"):
        build("lora_pre_adamw", tiny_model(), ridge=0.0)


BF16 = ("scale_sgd", "racs_adamw", "foam_adamw", "lora_pre_adamw", "cautious_adafactor")


@pytest.mark.parametrize("name", BF16)
def test_bf16_weights_train_like_fp32(name: str) -> None:
    made = {}
    for dtype in (torch.float32, torch.bfloat16):
        torch.manual_seed(0)
        model = TinyBlock().to(torch.bfloat16).to(dtype)
        train_model(model, build(name, model, lr=1e-2), range(6), set_gradients)
        made[dtype] = model.mlp["up_proj"].weight.detach().float()
    assert float((made[torch.bfloat16] - made[torch.float32]).abs().max()) < 5e-3


class Moe(nn.Module):
    """Experts of 12 x 10 in one parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.mlp = nn.Module()
        self.mlp.experts = nn.Parameter(0.1 * matrix(36, 10, 5).view(3, 12, 10))


@pytest.mark.parametrize("name", ["scale_sgd", "racs_adamw", "foam_adamw", "lora_pre_adamw"])
def test_each_expert_is_a_matrix(name: str) -> None:
    stacked, single = Moe(), [Moe() for _ in range(3)]
    for i, model in enumerate(single):
        own = stacked.mlp.experts.detach()[i]
        model.mlp.experts = None
        model.mlp.attn = nn.Linear(10, 12, bias=False, dtype=torch.float64)
        model.mlp.attn.weight.data.copy_(own)
    made = build(name, stacked, lr=1e-2, rank=3)
    others = [build(name, model, lr=1e-2, rank=3) for model in single]
    for step in range(4):
        grads = [
            torch.zeros(12, 10).double() if (i, step) == (1, 0) else matrix(12, 10, 9 * i + step)
            for i in range(3)
        ]
        stacked.mlp.experts.grad = torch.stack(grads)
        made.step()
        for model, grad, other in zip(single, grads, others, strict=True):
            model.mlp.attn.weight.grad = grad
            other.step()
    for i, model in enumerate(single):
        assert torch.equal(stacked.mlp.experts[i], model.mlp.attn.weight)
    assert expected_state_bytes(name, stacked, rank=3) == state_bytes(made)


def test_columns_that_cut_blocks_are_refused() -> None:
    """Six columns a process, blocks of four: the moments of a block would lie on two of them."""
    part = Part((12, 9), 0, 0, 6, Processes(None, 2, 0), (), 108, transposed=True)
    rule = FoldedAdam(1e-3)
    with pytest.raises(
        ValueError, match=r"up\.weight is spread by columns, 6 a process, which cuts"
    ):
        rule.check_part(part, "up.weight")
    replace(rule, level=1).check_part(part, "up.weight")
    rule.check_part(part.mirror(), "up.weight")
