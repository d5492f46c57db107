"""SST's layer and schedule: gradients, draws, state surgery, and a hyperbolic layer on top."""

from __future__ import annotations

import math
from collections import Counter
from typing import Any

import pytest
import torch
from support import matrix
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from lowrank.optimizers import build
from lowrank.optimizers.layers import SpectralLinear
from lowrank.optimizers.layers.spectral import sample

shapes = pytest.mark.parametrize(("m", "n", "rank"), [(7, 5, 2), (5, 7, 2), (6, 6, 3), (4, 6, 9)])


def made(m: int = 7, n: int = 5, rank: int = 2, bias: bool = True, **options: Any) -> Any:
    linear = nn.Linear(n, m, bias=bias, dtype=torch.float64)
    return SpectralLinear(linear, 0, rank=rank, **options)


def by_autograd(layer: SpectralLinear, x: Tensor) -> Tensor:
    u = torch.cat([layer.left, layer.frozen_left], 1)
    v = torch.cat([layer.right, layer.frozen_right], 1)
    return functional.linear(x, (u * layer.singular_values) @ v.mT, layer.bias)


@shapes
@pytest.mark.parametrize("bias", [True, False])
def test_gradcheck_with_the_plain_gradient(m: int, n: int, rank: int, bias: bool) -> None:
    layer = made(m, n, rank, bias, enhanced=False)
    x = torch.randn(2, 3, n, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x, *_: layer(x), (x, *layer.parameters()))


@shapes
def test_enhanced_gradient_lacks_the_singular_value(m: int, n: int, rank: int) -> None:
    layer = made(m, n, rank)
    x, weights = matrix(9, n, 1).requires_grad_(), matrix(9, m, 2)
    names = ("x", *(name for name, p in layer.named_parameters() if p.requires_grad))
    inputs = (x, *(p for p in layer.parameters() if p.requires_grad))
    expected = dict(
        zip(
            names, torch.autograd.grad((by_autograd(layer, x) * weights).sum(), inputs), strict=True
        )
    )
    found = dict(zip(names, torch.autograd.grad((layer(x) * weights).sum(), inputs), strict=True))
    active = layer.singular_values[: layer.rank].detach()
    for name, value in found.items():
        exact = expected[name] / active if name in ("left", "right") else expected[name]
        torch.testing.assert_close(value, exact, rtol=1e-8, atol=1e-10)
    assert layer.frozen_left.grad is None


@shapes
def test_function_survives_conversion_and_events(m: int, n: int, rank: int) -> None:
    linear = nn.Linear(n, m, dtype=torch.float64)
    layer = SpectralLinear(linear, 0, rank=rank)
    x = matrix(4, n, 3)
    torch.testing.assert_close(layer(x), linear(x), rtol=1e-10, atol=1e-12)
    with torch.no_grad():  # no longer orthogonal
        layer.left.add_(0.1 * matrix(m, layer.rank, 4))
    before, values = layer.effective_weight(), layer.singular_values.detach().clone()
    k = min(m, n)
    selected = torch.randperm(k)[: layer.rank]
    order = layer.resample(selected)
    assert torch.equal(order[: layer.rank], selected)
    assert sorted(order.tolist()) == list(range(k))
    assert torch.equal(layer.singular_values, values[order])
    torch.testing.assert_close(layer.effective_weight(), before, rtol=1e-10, atol=1e-12)
    assert layer.redecompose()
    torch.testing.assert_close(layer.effective_weight(), before, rtol=1e-10, atol=1e-12)
    u = torch.cat([layer.left, layer.frozen_left], 1)
    torch.testing.assert_close(u.mT @ u, torch.eye(k).double(), rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(layer.to_linear()(x), layer(x), rtol=1e-10, atol=1e-12)


def test_a_failing_decomposition_leaves_the_layer() -> None:
    layer = made()
    with torch.no_grad():
        layer.left[0, 0] = math.nan
    before = {key: value.clone() for key, value in layer.state_dict().items()}
    assert not layer.redecompose()
    for key, value in layer.state_dict().items():
        torch.testing.assert_close(value, before[key], equal_nan=True, rtol=0, atol=0)


def test_vectors_get_unit_length_and_values_no_sign() -> None:
    layer = made()
    with torch.no_grad():
        layer.left.mul_(3.0)
        layer.right[:, 0] = 0.0
        layer.singular_values[1] = -1.0
    layer.renormalize()
    layer.clamp_singular_values()
    torch.testing.assert_close(layer.left.norm(dim=0), torch.ones(2).double())
    assert not layer.right[:, 0].any()
    assert layer.singular_values.min() == 0


@pytest.mark.parametrize("selected", [[1, 1], [1], [1, 2, 3], [-1, 2], [5, 0]])
def test_a_refused_draw_leaves_the_layer(selected: list[int]) -> None:
    layer = made()
    before = {key: value.clone() for key, value in layer.state_dict().items()}
    with pytest.raises(ValueError, match="2 distinct positions below 5"):
        layer.resample(torch.tensor(selected))
    for key, value in layer.state_dict().items():
        assert torch.equal(value, before[key])


@pytest.mark.parametrize("autocast", [True, False])
def test_bfloat16_computes_in_it_and_keeps_the_parts_dtype(autocast: bool) -> None:
    kept = torch.float32 if autocast else torch.bfloat16
    linear = nn.Linear(96, 64, dtype=kept)
    layer = SpectralLinear.of(linear, 0, rank=8)
    x = torch.randn(16, 96, dtype=kept)
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        y = layer(x)
    y.float().square().sum().backward()
    assert y.dtype == torch.bfloat16
    assert {p.grad.dtype for p in layer.parameters() if p.grad is not None} == {kept}
    assert all(getattr(layer, name).grad is not None for name in layer.FACTORS)
    assert (y - linear(x)).norm() < 0.02 * y.norm()
    assert layer.to_linear().weight.dtype == kept


@pytest.mark.parametrize("reentrant", [True, False])
def test_activation_checkpointing_gives_the_same_gradients(reentrant: bool) -> None:
    layer, x = made(), matrix(4, 5, 1).requires_grad_()
    grads = []
    for forward in (layer, lambda x: checkpoint(layer, x, use_reentrant=reentrant)):
        layer.zero_grad()
        forward(x).square().sum().backward()
        grads.append([p.grad.clone() for p in layer.parameters() if p.grad is not None])
    assert len(grads[0]) == len(grads[1]) == 4
    for a, b in zip(*grads, strict=True):
        assert torch.equal(a, b)


def test_one_vector_and_meta_weights() -> None:
    layer, x = made(), matrix(4, 5, 1)
    torch.testing.assert_close(layer(x[0]), layer(x)[0])
    meta = SpectralLinear.of(nn.Linear(24, 16, device="meta"), 0, rank=4)
    assert meta.frozen_right.shape == (24, 12)
    assert meta.frozen_right.device.type == "meta"


def test_draws_follow_their_probabilities() -> None:
    s = torch.tensor([4.0, 2.0, 1.0, 1.0, 0.0])
    expected = {
        "uniform": torch.full((5,), 0.2),
        "singular": s / 8,
        "mixed": (s / 8 + 0.2) / 2,
    }
    for how, odds in expected.items():
        generator = torch.Generator().manual_seed(1)
        counts = Counter(int(sample(s, 1, generator, how)) for _ in range(6000))
        found = torch.tensor([counts[i] / 6000 for i in range(5)])
        torch.testing.assert_close(found, odds, rtol=0, atol=0.025)
        whole = sample(torch.zeros(5), 5, generator, how)
        assert whole.tolist() == [0, 1, 2, 3, 4]
        assert len(set(sample(s, 5, generator, how).tolist())) == 5


def test_nothing_of_the_weights_size_is_kept() -> None:
    layer = SpectralLinear(nn.Linear(96, 128), 0, rank=4)
    saved: list[int] = []
    with torch.autograd.graph.saved_tensors_hooks(
        lambda t: saved.append(t.numel()) or t, lambda t: t
    ):
        layer(torch.randn(8, 96))
    assert sum(saved) == 8 * (96 + 96) + 96 * (96 + 128 + 1)  # x, x V and the layer's tensors


def reference_adam(p: Tensor, g: Tensor, m: Tensor, v: Tensor, t: int) -> Tensor:
    """Torch's Adam at lr 0.01; moments in place."""
    m.mul_(0.9).add_(g, alpha=0.1)
    v.mul_(0.999).addcmul_(g, g, value=0.001)
    return p - 0.01 * (m / (1 - 0.9**t)) / ((v / (1 - 0.999**t)).sqrt() + 1e-8)


def test_the_optimizer_equals_its_reference() -> None:
    """Values by one Adam throughout; vectors by a fresh one in each iteration, and normalised."""
    model = nn.ModuleDict({"mlp": nn.Linear(6, 8, bias=False, dtype=torch.float64)})
    optimizer = build("sst_adamw", model, lr=0.01, rank=2, update_proj_gap=3)
    layer = model["mlp"]
    s, u, v = (p.detach().clone() for p in (layer.singular_values, layer.left, layer.right))
    slow = [torch.zeros_like(s), torch.zeros_like(s)]
    fast = [torch.zeros_like(x) for x in (u, u, v, v)]
    for step in range(1, 13):
        grads = matrix(1, 6, step)[0], matrix(8, 2, 50 + step), matrix(6, 2, 90 + step)
        parts = (layer.singular_values, layer.left, layer.right)
        for param, grad in zip(parts, grads, strict=True):
            param.grad = grad.clone()
        optimizer.step()
        since = (step - 1) % 3 + 1
        s = reference_adam(s, grads[0], *slow, step).clamp(min=0)
        u = functional.normalize(reference_adam(u, grads[1], *fast[:2], since), dim=0)
        v = functional.normalize(reference_adam(v, grads[2], *fast[2:], since), dim=0)
        state = optimizer.state[layer.singular_values]
        if step % 9 == 0:  # a round is three iterations of two vectors
            everything = torch.cat([layer.left, layer.frozen_left], 1)
            torch.testing.assert_close(
                everything.mT @ everything, torch.eye(6).double(), rtol=0, atol=1e-9
            )
        if step % 3:
            found = (layer.singular_values, layer.left, layer.right)
            for a, b in zip(found, (s, u, v), strict=True):
                torch.testing.assert_close(a.detach(), b, rtol=1e-9, atol=1e-11)
        else:
            fast = [torch.zeros_like(x) for x in fast]
            if step % 9:  # the same values and moments, in another order
                order = (layer.singular_values.unsqueeze(1) - s).abs().argmin(1)
                slow = [moment[order] for moment in slow]
            else:
                ranks = s.argsort(descending=True)
                drawn = layer.singular_values.detach().argsort(descending=True).argsort()
                slow = [moment[ranks][drawn] for moment in slow]
            s, u, v = (p.detach().clone() for p in parts)
        torch.testing.assert_close(state["exp_avg"], slow[0], rtol=1e-9, atol=1e-12)


class LorentzLinear(nn.Module):
    """A linear layer on the hyperboloid <x, x>_L = -1 (Chen et al., 2022), on any Euclidean one.

    The space part is W x over the whole Lorentz vector; the time part puts the result back on it.
    """

    def __init__(self, linear: nn.Module) -> None:
        super().__init__()
        self.mlp = linear

    def forward(self, x: Tensor) -> Tensor:
        space = self.mlp(x)
        time = (space.square().sum(-1, keepdim=True) + 1).sqrt()
        return torch.cat([time, space], -1)


def test_a_hyperbolic_layer_trains_on_it() -> None:
    torch.manual_seed(0)
    layer = LorentzLinear(nn.Linear(7, 5, dtype=torch.float64))
    space = torch.randn(32, 6, dtype=torch.float64)
    points = torch.cat([(space.square().sum(-1, keepdim=True) + 1).sqrt(), space], -1)
    target = LorentzLinear(nn.Linear(7, 5, dtype=torch.float64))(points).detach()
    optimizer = build("sst_adamw", layer, lr=0.02, rank=2, update_proj_gap=10)
    assert isinstance(layer.mlp, SpectralLinear)
    signs = torch.tensor([-1.0] + [1.0] * 5, dtype=torch.float64)
    losses = []
    for _ in range(80):
        optimizer.zero_grad()
        y = layer(points)
        inner = (y * signs * target).sum(-1)  # minus cosh of the distance
        loss = (-inner - 1).clamp(min=0).mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
        torch.testing.assert_close((y * y * signs).sum(-1), -torch.ones(32).double())
    assert losses[-1] < 0.5 * losses[0]


def test_an_unknown_sampling_raises() -> None:
    with pytest.raises(ValueError, match="how='best': accepted are 'mixed'"):
        sample(torch.ones(4), 2, torch.Generator(), "best")
