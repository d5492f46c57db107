"""SLTrain's layer: gradients, supports, and what it keeps in memory."""

from __future__ import annotations

import gc
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode

from lowrank.optimizers.layers import SparseLowRankLinear
from lowrank.optimizers.layers.sparse_low_rank import seeded_support, stored_support

M, N = 12, 9
supports = pytest.mark.parametrize("support", ["seeded", "stored"])


def made(dtype: torch.dtype = torch.float64, bias: bool = True, **options: Any) -> Any:
    linear = nn.Linear(N, M, bias=bias, dtype=dtype)
    layer = SparseLowRankLinear(linear, 5, **{"rank": 3, "density": 0.25, **options})
    with torch.no_grad():
        layer.lora_b.normal_()
    return layer


def by_autograd(layer: SparseLowRankLinear, x: Tensor) -> Tensor:
    sparse = torch.zeros(M * N, dtype=x.dtype).index_put((layer.support(),), layer.sparse_values)
    weight = layer.scaling * layer.lora_b @ layer.lora_a + sparse.view(M, N)
    return functional.linear(x, weight, layer.bias)


@supports
@pytest.mark.parametrize("bias", [True, False])
def test_gradcheck(support: str, bias: bool) -> None:
    layer = made(bias=bias, support=support)
    x = torch.randn(2, 4, N, dtype=torch.float64, requires_grad=True)
    parts = list(layer.parameters())
    assert torch.autograd.gradcheck(lambda x, *_: layer(x), (x, *parts))


@supports
def test_equals_plain_autograd(support: str) -> None:
    layer = made(support=support)
    x = torch.randn(7, N, dtype=torch.float64)
    weights = torch.randn(7, M, dtype=torch.float64)
    expected = torch.autograd.grad((by_autograd(layer, x) * weights).sum(), layer.parameters())
    found = torch.autograd.grad((layer(x) * weights).sum(), layer.parameters())
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(layer.to_linear()(x), layer(x), rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(layer(x[0]), layer(x)[0])


def test_supports_are_distinct_sorted_and_even() -> None:
    total, count = 10_007, 499
    drawn = torch.stack([seeded_support(total, count, s, torch.device("cpu")) for s in range(200)])
    assert (drawn.diff(dim=1) > 0).all()
    assert drawn.min() >= 0
    assert drawn.max() < total
    histogram = torch.histc(drawn.double(), 20, 0, total)
    assert ((histogram / histogram.mean() - 1).abs() < 0.05).all()
    stored = stored_support(total, count, 3)
    assert stored.dtype == torch.int32
    assert (stored.diff() > 0).all()
    assert torch.equal(stored, stored_support(total, count, 3))
    assert not torch.equal(stored, stored_support(total, count, 4))


@supports
def test_a_state_dict_brings_its_support(support: str) -> None:
    layer = made(support=support)
    other = SparseLowRankLinear(
        nn.Linear(N, M, dtype=torch.float64), 77, rank=3, density=0.25, support=support
    )
    assert not torch.equal(layer.support(), other.support())
    other.load_state_dict(layer.state_dict())
    assert torch.equal(layer.effective_weight(), other.effective_weight())


def test_nothing_dense_is_kept_for_the_backward_pass() -> None:
    layer = SparseLowRankLinear(nn.Linear(256, 384), 0, rank=8, density=0.03)
    saved: list[int] = []

    def pack(tensor: Tensor) -> Tensor:
        saved.append(tensor.numel())
        return tensor

    x = torch.randn(16, 256, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        layer(x)
    parts = sum(getattr(layer, name).numel() for name in layer.FACTORS)
    assert sum(saved) == x.numel() + parts


class _Living(TorchDispatchMode):
    """Counts tensors of at least `entries` entries that are alive at once."""

    def __init__(self, entries: int) -> None:
        super().__init__()
        self.entries, self.most = entries, 0
        self.alive: dict[int, StorageWeakRef] = {}

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        if isinstance(result, Tensor) and result.numel() >= self.entries:
            reference = StorageWeakRef(result.untyped_storage())
            self.alive[reference.cdata] = reference
            self.alive = {k: r for k, r in self.alive.items() if not r.expired()}
            self.most = max(self.most, len(self.alive))
        return result


@pytest.mark.parametrize(("m", "n", "rank"), [(384, 256, 8), (2736, 1024, 256)])  # 350M's layer
def test_one_dense_matrix_at_a_time(m: int, n: int, rank: int) -> None:
    layer = SparseLowRankLinear(nn.Linear(n, m), 0, rank=rank, density=0.03)
    x = torch.randn(16, n, requires_grad=True)
    gc.collect()
    with _Living(m * n) as living:
        layer(x).sum().backward()
    assert living.most == 1


@pytest.mark.parametrize("how", ["bfloat16", "autocast"])
def test_low_precision(how: str) -> None:
    layer = made(torch.bfloat16 if how == "bfloat16" else torch.float32)
    x = torch.randn(6, N, dtype=layer.dtype)
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=how == "autocast"):
        y = layer(x)
    assert y.dtype == torch.bfloat16
    y.float().square().sum().backward()
    assert all(p.grad.dtype == p.dtype and p.grad.isfinite().all() for p in layer.parameters())


def test_initial_scale_of_the_model_or_of_the_paper() -> None:
    linear = nn.Linear(512, 400)
    nn.init.normal_(linear.weight, std=0.02)
    for init, expected in (("model", 0.02), ("official", (0.1 / (3 * 512)) ** 0.5)):
        layer = SparseLowRankLinear(linear, 1, rank=4, density=0.1, init=init)
        root = layer.effective_weight().square().mean().sqrt()
        assert float(root) == pytest.approx(expected, rel=0.02)


@pytest.mark.parametrize(
    ("option", "value"),
    [("density", 0.0), ("density", 1e-6), ("support", "random"), ("init", "zero")],
)
def test_bad_options_raise(option: str, value: Any) -> None:
    with pytest.raises(ValueError, match=f"{option}={value!r}"):
        made(**{option: value})
