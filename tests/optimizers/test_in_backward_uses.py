"""Updates in the backward pass: living gradients, and kinds of models."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from in_backward_runs import backward, batch, distance, loss_of, make, unexamined
from support import TinyBlock, tiny_model
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from lowrank.optimizers import build, param_groups, update_in_backward

STEPS = 5


@pytest.fixture(autouse=True)
def quick() -> Iterator[None]:
    with unexamined():
        yield


# Living gradients


class Layered(nn.Module):
    """Blocks under LLaMA's names between an embedding and a head."""

    def __init__(self, blocks: int = 4, hidden: int = 16) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(32, hidden)
        self.layers = nn.ModuleList(
            nn.ModuleDict(
                {
                    "self_attn": nn.Linear(hidden, hidden, bias=False),
                    "mlp": nn.Linear(hidden, hidden, bias=False),
                    "norm": nn.LayerNorm(hidden),
                }
            )
            for _ in range(blocks)
        )
        self.lm_head = nn.Linear(hidden, 32, bias=False)

    def block(self, layer: nn.ModuleDict, x: Tensor) -> Tensor:
        return x + layer["mlp"](torch.tanh(layer["self_attn"](layer["norm"](x))))

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed_tokens(tokens)
        for layer in self.layers:
            x = self.block(layer, x)
        return self.lm_head(x)


class Living:
    """The largest sum of bytes of gradients that were alive when a gradient was complete."""

    def __init__(self, model: nn.Module) -> None:
        self.model, self.most = model, 0
        self._known: list[weakref.ref[Tensor]] = []
        for param in model.parameters():
            if param.requires_grad:
                param.register_post_accumulate_grad_hook(self._record)

    def _record(self, param: Tensor) -> None:
        assert param.grad is not None
        self._known.append(weakref.ref(param.grad))
        alive = {id(grad): grad for ref in self._known if (grad := ref()) is not None}
        self.most = max(self.most, sum(grad.nbytes for grad in alive.values()))


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("adamw", {}),
        ("galore_adamw", {}),
        ("fira_adamw", {}),
        ("qgalore_adamw_8bit", {"min_8bit_size": 0}),
        ("relora_adamw", {}),
    ],
)
@pytest.mark.parametrize("clip", [None, 1.0])
def test_living_gradients(name: str, options: dict[str, Any], clip: float | None) -> None:
    torch.manual_seed(0)
    model = Layered()
    optimizer = build(name, model, rank=4, update_proj_gap=3, **options)
    living = Living(model)
    update_in_backward(optimizer, max_norm=clip, norm="exact" if clip is None else "previous")
    sizes = {n: p.numel() * 4 for n, p in model.named_parameters() if p.requires_grad}
    block = sum(size for n, size in sizes.items() if n.startswith("layers.0."))
    plain = sum(size for n, size in sizes.items() if "layers" not in n or "norm" in n)
    for step in range(STEPS):  # refits are in it
        backward(model, step)
        optimizer.step()
        optimizer.zero_grad()
    assert 0 < living.most <= block + plain < sum(sizes.values())
    assert living.most <= max(sizes.values()) + min(sizes.values())  # one at a time, and one more


def test_living_gradients_of_the_ordinary_loop() -> None:
    """What the test above would find if nothing were freed."""
    model = Layered()
    living = Living(model)
    backward(model, 0)
    assert living.most == sum(p.numel() * 4 for p in model.parameters())


def test_what_lives_between_micro_batches() -> None:
    torch.manual_seed(0)
    model = Layered()
    optimizer = build("galore_adamw", model, rank=4, update_proj_gap=10)
    handle = update_in_backward(optimizer, 2)
    assert set(handle.whole()) == {
        n for n, _ in model.named_parameters() if "mlp" not in n and "attn" not in n
    }
    assert {handle.whole()[n] for n in handle.whole() if n != "layers.0.norm.weight"} == {
        "it is not projected"
    }
    for step in range(3):
        for part in range(2):
            (loss_of(model, batch(step, part)) / 2).backward()
            whole = {n for n, param in model.named_parameters() if param.grad is not None}
            if part == 0:
                fitted = set() if step else {n for n, _ in model.named_parameters()}
                assert whole == set(handle.whole()) | fitted
                sums = [kept.projected for kept in handle._window.sums.values()]
                assert [tuple(kept.shape) for kept in sums] == [(16, 4)] * (8 if step else 0)
                assert all(kept.dtype == torch.float32 for kept in sums)
        assert whole == {"layers.0.norm.weight"}
        optimizer.step()
        optimizer.zero_grad()


REASONS = {
    "fira_adamw": "residual='norm_scaled' uses the gradient outside the subspace",
    "apollo_adamw": "residual='scaled' uses the gradient outside the subspace",
    "online_subspace_adamw": "projector='online' moves the basis",
    "switchlora_adamw": "vectors are switched by its gradient",
}


@pytest.mark.parametrize("name", REASONS)
def test_why_gradients_are_kept_whole(name: str) -> None:
    optimizer = make(name)[1]
    handle = update_in_backward(optimizer, 2)
    assert any(reason.startswith(REASONS[name]) for reason in handle.whole().values())
    assert f"{len(handle.whole())} gradients are kept whole" in repr(handle)
    handle.accumulation = 1
    kept = {why for why in handle.whole().values() if not why.startswith("it is the smallest")}
    assert len(kept) == (1 if name == "switchlora_adamw" else 0)


def test_an_exact_norm_of_sums_keeps_all_and_says_so() -> None:
    model, optimizer = make()
    with pytest.warns(UserWarning, match="accumulation above 1 keeps all gradients whole"):
        handle = update_in_backward(optimizer, 2, 1.0)
    assert len(handle.whole()) == len(list(model.parameters()))
    assert "the norm of a sum" in handle.whole()["norm.weight"]


# Models


class Tied(TinyBlock):
    """The head is the embedding, and a matrix is used twice."""

    def __init__(self) -> None:
        super().__init__()
        self.lm_head.weight = self.embed_tokens.weight

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed_tokens(tokens)
        x = x + self.self_attn["q_proj"](torch.tanh(self.self_attn["q_proj"](x)))
        x = x + self.mlp["down_proj"](torch.relu(self.mlp["up_proj"](x)))
        return self.lm_head(self.norm(x))


class Checkpointed(Layered):
    """Blocks are computed again in the backward pass."""

    reentrant = False

    def block(self, layer: nn.ModuleDict, x: Tensor) -> Tensor:
        return checkpoint(super().block, layer, x, use_reentrant=self.reentrant)


class Reentrant(Checkpointed):
    reentrant = True


class TiedBlocks(Checkpointed):
    """All blocks are one."""

    def __init__(self) -> None:
        super().__init__(blocks=1)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed_tokens(tokens)
        for _ in range(3):
            x = self.block(self.layers[0], x)
        return self.lm_head(x)


class TiedReentrant(TiedBlocks):
    reentrant = True


def compare(
    model_type: Callable[[], nn.Module], parts: int = 1, name: str = "galore_adamw", **more: Any
) -> None:
    runs = []
    for on in (True, False):
        torch.manual_seed(0)
        model = model_type()
        optimizer = build(name, model, lr=1e-2, rank=4, update_proj_gap=3)
        if on:
            update_in_backward(optimizer, parts, **more)
        for step in range(STEPS):
            backward(model, step, parts)
            optimizer.step()
            optimizer.zero_grad()
        runs.append(model)
    assert distance(*runs) < 1e-6


@pytest.mark.parametrize("model_type", [Tied, Checkpointed, Reentrant, TiedBlocks])
@pytest.mark.parametrize("parts", [1, 2])
@pytest.mark.parametrize("name", ["galore_adamw", "qgalore_adamw_8bit"])
def test_models(model_type: Callable[[], nn.Module], parts: int, name: str) -> None:
    compare(model_type, parts, name)


def test_segments_that_share_parameters_with_a_backward_pass_each() -> None:
    """Each gives a gradient of its own: the first was applied when the second comes."""
    torch.manual_seed(0)
    model = TiedReentrant()
    optimizer = build("galore_adamw", model, rank=4)
    update_in_backward(optimizer)
    with pytest.raises(RuntimeError, match=r"layers\.0\.\S* got a second gradient in one backward"):
        backward(model, 0)
    with pytest.warns(UserWarning, match="ended with an error after 4 parameters"):
        optimizer.zero_grad()


def test_nothing_before_a_reentrant_segment() -> None:
    model = nn.Linear(8, 8)
    optimizer = build("adamw", model)
    update_in_backward(optimizer)
    x = torch.ones(2, 8, requires_grad=True)
    before = model.weight.detach().clone()
    with pytest.raises(
        RuntimeError, match=r"use_reentrant=True.* of what the backward pass begins"
    ):
        checkpoint(model, x, use_reentrant=True).sum().backward()
    assert torch.equal(model.weight, before)


def test_a_weight_that_is_read_after_its_update() -> None:
    """A detached weight is no use that autograd waits for: it refuses the changed one."""
    model, optimizer = make("adamw")
    update_in_backward(optimizer)
    x = model.embed_tokens(batch(0, 0)) @ model.lm_head.weight.detach().mT
    x = (x.square() @ model.lm_head.weight).sum()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        x.backward()


def test_frozen_parameters() -> None:
    runs = []
    for on in (True, False):
        model, optimizer = make()
        model.norm.weight.requires_grad_(False)
        if on:
            update_in_backward(optimizer, 2)
        for step in range(STEPS):
            model.norm.weight.requires_grad_(step >= 1)
            model.mlp["up_proj"].weight.requires_grad_(step < 3)
            backward(model, step, 2)
            optimizer.step()
            assert not on or all(param.grad is None for param in model.parameters())
            optimizer.zero_grad()
        runs.append(model)
    assert distance(*runs) < 1e-6


def test_parameters_without_a_gradient_in_some_passes() -> None:
    """A pass that has none of a matrix, be it the last, leaves its sum to `step`."""
    runs = []
    for on in (True, False):
        model, optimizer = make(update_proj_gap=10)
        if on:
            update_in_backward(optimizer, 3)
        for step in range(STEPS):
            for part in range(3):
                x = model.embed_tokens(batch(step, part))
                if (step + part) % 3:
                    x = x + model.self_attn["q_proj"](x)
                if part == step % 3:
                    x = x + model.mlp["down_proj"](model.mlp["up_proj"](x))
                model.lm_head(x).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
        runs.append(model)
    assert distance(*runs) < 1e-6


def test_groups_that_come_later() -> None:
    runs = []
    for on in (True, False):
        model = tiny_model()
        first, *rest = param_groups(model, rank=4, update_proj_gap=2)
        optimizer = type(make()[1])([first], lr=1e-2)
        if on:
            update_in_backward(optimizer, 2)
        for step in range(STEPS):
            if step == 2:
                for group in rest:
                    optimizer.add_param_group(group)
            backward(model, step, 2)
            optimizer.step()
            optimizer.zero_grad()
            model.zero_grad()
        runs.append(model)
    assert distance(*runs) < 1e-6
