"""A step (forward, backward, update) of factored layers, ours and written plainly for autograd."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from lowrank.optimizers import build, state_bytes
from lowrank.optimizers.layers import (
    FactoredLinear,
    QuantizedLowRankLinear,
    SparseLowRankLinear,
    SpectralLinear,
    SwitchedLinear,
)
from lowrank.optimizers.layers.convert import replace_modules
from lowrank.optimizers.layers.frozen import FrozenMatrix

from .workload import Workload

TOKENS = 2048
#: Nothing scheduled falls into the timed steps but SwitchLoRA's switches.
OPTIONS: dict[str, dict[str, Any]] = {
    "low_rank_adamw": {"alpha": 32.0},
    "loqt_adamw": {"update_proj_gap": 10**6},
    "relora_adamw": {"alpha": 32.0, "update_proj_gap": 10**6},
    "switchlora_adamw": {},
    "sltrain_adamw": {"alpha": 32.0},
    "sst_adamw": {"update_proj_gap": 10**6},
}


class PlainLinear(nn.Module):
    """The same layer from differentiable operations alone, on parameters of its own."""

    def __init__(self, layer: FactoredLinear) -> None:
        super().__init__()
        for name in layer.FACTORS:
            self.register_parameter(name, nn.Parameter(getattr(layer, name).detach().clone()))
        for name in layer.FROZEN:
            weight = getattr(layer, name)
            self.register_buffer(name, None if weight is None else weight.detach())
        for name, buffer in layer.named_buffers(recurse=False):
            self.register_buffer(name, buffer)
        for name, module in layer.named_children():
            self.add_module(name, module)
        scaling = getattr(layer, "scaling", getattr(layer, "scale", 1.0))
        self.kind, self.scaling = type(layer), float(scaling)
        if isinstance(layer, SparseLowRankLinear):
            self.register_buffer("index", layer.support())

    def forward(self, x: Tensor) -> Tensor:
        """(t, n) to (t, m)."""
        part: dict[str, Tensor] = dict(self.named_parameters()) | dict(self.named_buffers())
        if self.kind is SparseLowRankLinear:
            product = self.scaling * (part["lora_b"] @ part["lora_a"])
            flat = product.flatten().scatter_add(0, part["index"], part["sparse_values"])
            return functional.linear(x, flat.view_as(product))
        if self.kind is SpectralLinear:
            r, values = part["left"].shape[1], part["singular_values"]
            active = ((x @ part["right"]) * values[:r]) @ part["left"].mT
            return active + ((x @ part["frozen_right"]) * values[r:]) @ part["frozen_left"].mT
        if self.kind is QuantizedLowRankLinear:
            base, basis, factor = self._frozen("base", x), self._frozen("basis", x), part["factor"]
            left = base.shape[0] <= base.shape[1]
            a, b = (factor, basis) if left else (basis.mT, factor)
            low = functional.linear(functional.linear(x, a) * self.scaling, b)
            return functional.linear(x, base) + low
        switched = self.kind is SwitchedLinear
        a = part["rows_a"] if switched else part["lora_a"]
        b = part["rows_b"].mT if switched else part["lora_b"]
        y = functional.linear(functional.linear(x, a) * self.scaling, b)
        return y + functional.linear(x, part["frozen"]) if "frozen" in part else y

    def _frozen(self, name: str, x: Tensor) -> Tensor:
        matrix = self.get_submodule(name)
        assert isinstance(matrix, FrozenMatrix)
        return matrix.dense(x.dtype)


@dataclass(frozen=True)
class Step:
    """One contestant.

    Attributes:
        label: of its row.
        call: takes a step.
        kib: of weights, gradients and optimizer state.
    """

    label: str
    call: Callable[[], None]
    kib: float


def contestants(work: Workload) -> dict[str, Step]:
    """Dense AdamW, and each method twice, on one layer of each of the workload's shapes."""
    made = {"dense": _dense(work)}
    for name in OPTIONS:
        made[name] = _ours(work, name)
        made[f"{name} autograd"] = _autograd(work, name)
    return made


def _model(work: Workload) -> nn.ModuleDict:
    torch.manual_seed(work.seed)
    shapes = sorted({(m, n) for _, m, n in work.shapes})
    return nn.ModuleDict({f"mlp_{m}_{n}": nn.Linear(n, m, bias=False) for m, n in shapes})


def _dense(work: Workload) -> Step:
    model = _model(work)
    return _step(
        "torch AdamW(fused=True), dense", model, torch.optim.AdamW(model.parameters(), fused=True)
    )


def _converted(work: Workload, name: str) -> tuple[nn.ModuleDict, torch.optim.Optimizer]:
    model = _model(work)
    options = OPTIONS[name]
    return model, build(name, model, lr=1e-4, rank=work.rank, **options)


def _ours(work: Workload, name: str) -> Step:
    model, optimizer = _converted(work, name)
    return _step(type(optimizer).__name__, model, optimizer)


def _autograd(work: Workload, name: str) -> Step:
    model, optimizer = _converted(work, name)
    label = f"{type(optimizer).__name__}, layer by autograd"
    layers: dict[nn.Module, nn.Module] = {
        module: PlainLinear(module)
        for module in model.modules()
        if isinstance(module, FactoredLinear)
    }
    replace_modules(model, layers)
    return _step(label, model, torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True))


def _step(label: str, model: nn.ModuleDict, optimizer: torch.optim.Optimizer) -> Step:
    generator = torch.Generator().manual_seed(1)
    data = []
    for key, layer in model.items():
        m, n = (int(part) for part in key.split("_")[1:])
        x = torch.randn(TOKENS, n, generator=generator).requires_grad_()
        data.append((layer, x, torch.randn(TOKENS, m, generator=generator)))

    def call() -> None:
        for layer, x, grad in data:
            layer(x).backward(grad)
            x.grad = None
        optimizer.step()
        optimizer.zero_grad()

    call()
    weights = sum(t.nbytes for t in (*model.parameters(), *model.buffers()))
    gradients = sum(t.nbytes for t in model.parameters() if t.requires_grad)
    return Step(label, call, (weights + gradients + state_bytes(optimizer)) / 1024)
