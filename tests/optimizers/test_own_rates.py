"""`head_lr` and `embedding_lr`: rates of their own, under every method."""

from __future__ import annotations

import pytest
import torch
from support import set_gradients
from torch import Tensor, nn

from lowrank.optimizers import available, build, expected_state_bytes, state_bytes

WIDTH, WORDS = 16, 24


class Model(nn.Module):
    """An embedding, blocks with the usual names, and a head."""

    def __init__(self, tied: bool = False) -> None:
        super().__init__()
        self.embed = nn.Embedding(WORDS, WIDTH)
        self.layers = nn.ModuleList(
            nn.ModuleDict({"q_proj": nn.Linear(WIDTH, WIDTH), "up_proj": nn.Linear(WIDTH, WIDTH)})
            for _ in range(2)
        )
        self.norm = nn.LayerNorm(WIDTH)
        self.lm_head = nn.Linear(WIDTH, WORDS, bias=False)
        if tied:
            self.lm_head.weight = self.embed.weight

    def get_output_embeddings(self) -> nn.Linear:
        return self.lm_head


def rates(optimizer: torch.optim.Optimizer) -> dict[int, float]:
    return {id(p): group["lr"] for group in optimizer.param_groups for p in group["params"]}


@pytest.mark.filterwarnings("ignore:.*no effect")
@pytest.mark.parametrize("name", available())
def test_embeddings_and_head_have_their_rates(name: str) -> None:
    heads = {"heads": 2} if name == "galore_plus_adamw" else {}
    options = {"rank": 4, "plain_lr": 3e-2, **heads}
    model, other = Model(), Model()
    apart = {"head_lr": 5e-3, "embedding_lr": 6e-3}
    wanted = {"lm_head.weight": 5e-3, "embed.weight": 6e-3}
    made = build(name, model, lr=1e-3, **apart, **options)
    plain = build(name, other, lr=1e-3, **options)
    theirs = dict(zip(dict(other.named_parameters()), other.parameters(), strict=True))
    for called, param in model.named_parameters():
        if id(param) in rates(made):
            expected = wanted.pop(called, rates(plain)[id(theirs[called])])
            assert rates(made)[id(param)] == expected, called
    assert not wanted
    assert sum(len(g["params"]) for g in made.param_groups) == len(rates(plain))
    assert all(len(g["params"]) == len(g["param_names"]) for g in made.param_groups)
    set_gradients(model, 0)
    made.step()
    assert state_bytes(made) == expected_state_bytes(name, Model(), **apart, **options)


def moved(head_lr: float | Tensor) -> tuple[Tensor, Tensor]:
    model = Model()
    before = [model.lm_head.weight.detach().clone(), model.embed.weight.detach().clone()]
    made = build("adamw", model, lr=1e-3, plain_lr=1e-2, head_lr=head_lr, weight_decay=0.0)
    for param in model.parameters():
        param.grad = torch.ones_like(param)
    made.step()
    after = model.lm_head.weight.detach(), model.embed.weight.detach()
    return after[0] - before[0], after[1] - before[1]


@pytest.mark.parametrize("rate", [2e-3, 0, torch.tensor(2e-3)], ids=str)
def test_a_step_is_of_that_size(rate: float | Tensor) -> None:
    head, embedding = moved(rate)
    torch.testing.assert_close(head, torch.full_like(head, -float(rate)), rtol=1e-4, atol=1e-7)
    torch.testing.assert_close(embedding, torch.full_like(embedding, -1e-2), rtol=1e-4, atol=1e-7)


def test_what_has_no_head_of_its_own_says_so() -> None:
    with pytest.raises(ValueError, match=r"head_lr=0.01: an embedding and the head share a weig"):
        build("galore_adamw", Model(tied=True), head_lr=0.01, rank=4)
    with pytest.raises(ValueError, match=r"embedding_lr=0.01: an embedding and the head share"):
        build("galore_adamw", Model(tied=True), embedding_lr=0.01, rank=4)
    frozen = Model()
    frozen.lm_head.weight.requires_grad_(False)
    with pytest.raises(ValueError, match=r"head_lr=0.01: the model has no output head that is tr"):
        build("galore_adamw", frozen, head_lr=0.01, rank=4)
    for rate in (-1.0, "fast", float("nan")):
        with pytest.raises(ValueError, match="head_lr"):
            build("adamw", Model(), head_lr=rate)


def test_embeddings_may_share_a_weight_with_each_other() -> None:
    model = Model()
    model.again = nn.Embedding(WORDS, WIDTH)
    model.again.weight = model.embed.weight
    made = build("adamw", model, lr=1e-3, embedding_lr=6e-3)
    assert rates(made)[id(model.embed.weight)] == 6e-3
