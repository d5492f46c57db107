"""Compressed activations (CompAct): what is kept, unbiased gradients, draws, and both widths."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from support import hashed, tiny_model
from torch import Tensor, nn

from lowrank.optimizers import build, compress_activations, convert
from lowrank.optimizers.layers.compressed import CompressedLinear


def layer_of(width: int = 32) -> nn.ModuleDict:
    torch.manual_seed(0)
    return nn.ModuleDict({"mlp": nn.Linear(width, 12)})


def gradients(model: nn.ModuleDict, x: Tensor) -> tuple[Tensor, ...]:
    model.zero_grad()
    inputs = x.clone().requires_grad_()
    y = model["mlp"](inputs)
    y.square().sum().backward()
    return y.detach(), inputs.grad, model["mlp"].weight.grad, model["mlp"].bias.grad


def test_all_but_the_weights_gradient_is_exact_and_that_is_unbiased() -> None:
    plain, model = layer_of(), layer_of()
    x = hashed(5 * 4 * 32, 1).view(5, 4, 32).float()
    expected = gradients(plain, x)
    handle = compress_activations(model, 8, gap=1)
    total = torch.zeros_like(expected[2])
    for step in range(600):
        handle.step = step
        found = gradients(model, x)
        for ours, theirs in zip(found[:2] + found[3:], expected[:2] + expected[3:], strict=True):
            torch.testing.assert_close(ours, theirs)
        total += found[2] / 600
    # the error of one draw is about (n / r) ** 0.5 of the gradient, of the mean a 24th of that
    assert float((total - expected[2]).norm() / expected[2].norm()) < 0.15
    assert int(torch.linalg.matrix_rank(found[2].double(), rtol=1e-5)) == 8


def test_the_input_is_not_kept() -> None:
    model, x = layer_of(64), torch.randn(100, 64)
    compress_activations(model, 4)
    saved: list[Tensor] = []

    def keep(tensor: Tensor) -> Tensor:
        saved.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        model["mlp"](x)
    weight = model["mlp"].weight
    assert sum(tensor.numel() for tensor in saved) == 100 * 4 + weight.numel()


def test_draws_follow_steps_names_and_seeds() -> None:
    x = torch.randn(6, 16)

    def draw(step: int = 0, seed: int = 0, name: str = "q_proj") -> Tensor:
        model = tiny_model()
        handle = compress_activations(model, 4, gap=3, seed=seed)
        handle.step = step
        layer = model.self_attn["q_proj"]
        layer.seed_name = name
        layer(x).sum().backward()
        return layer.weight.grad

    assert torch.equal(draw(0), draw(2))
    others = [draw(3), draw(0, seed=1), draw(0, name="k_proj")]
    assert not any(torch.equal(draw(0), other) for other in others)


@pytest.mark.parametrize("bits", [8, 4, None])
def test_any_optimizer_trains_with_them(bits: int | None) -> None:
    model = convert("galore_adamw", tiny_model(), weight_bits=bits)
    keys = list(model.state_dict())
    handle = compress_activations(model, 8, gap=5)
    assert list(model.state_dict()) == keys
    optimizer = build("galore_adamw", model, lr=1e-2, rank=8, update_proj_gap=5)
    tokens = torch.randint(0, 32, (4, 8), generator=torch.Generator().manual_seed(0))
    losses = []
    for step in range(30):
        handle.step = step
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(tokens).flatten(0, 1), tokens.flatten())
        loss.backward()
        optimizer.step()
        losses.append(float(loss))
    assert losses[-1] < 0.5 * losses[0]
    twin = copy.deepcopy(model)
    assert isinstance(pickle.loads(pickle.dumps(twin)).mlp["up_proj"], CompressedLinear)
    handle.remove()
    assert type(model.mlp["up_proj"]) is nn.Linear
    with torch.no_grad():
        torch.testing.assert_close(model(tokens), twin(tokens))


def test_wrong_use_is_named() -> None:
    model = tiny_model()
    with pytest.raises(ValueError, match="rank=0"):
        compress_activations(model, 0)
    with pytest.raises(ValueError, match=r"no nn\.Linear"):
        compress_activations(model, 4, patterns=["nothing"])
    compress_activations(model, 4)
    with pytest.raises(ValueError, match="q_proj is a CompressedLinear"):
        compress_activations(model, 4)
