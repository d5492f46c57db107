"""Running ours and an official package's optimizer on the same gradients, in parity mode."""

from __future__ import annotations

import importlib
import importlib.util
import warnings
from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
from support import matrix
from torch import Tensor, nn

SHAPES = ((24, 16), (16, 24), (20, 20))
STEPS = 25
GAP = 5


def needs(package: str) -> pytest.MarkDecorator:
    """Skips where an official package is missing."""
    return pytest.mark.skipif(
        importlib.util.find_spec(package) is None,
        reason=f'{package} is not installed: pip install "lowrank-pretrain[peers]"',
    )


def official(package: str) -> Any:
    """The package; importing it says a lot."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return importlib.import_module(package)


def gradient(shape: tuple[int, int], step: int) -> Tensor:
    return (1e-2 * (matrix(*shape, 1) + 0.6 * matrix(*shape, step + 2))).float()


def assert_side_by_side(
    ours: Callable[..., torch.optim.Optimizer],
    theirs: Callable[..., torch.optim.Optimizer],
    shape: tuple[int, int],
    group: Mapping[str, Any],
    options: Mapping[str, Any],
) -> None:
    """25 steps with a refresh at every fifth: equal to 1e-5 relative in fp32.

    Args:
        ours: our class; it gets `refresh="svd"`.
        theirs: the official class.
        shape: of the projected matrix.
        group: keys of the projected group.
        options: keywords of both constructors.
    """
    start = (0.2 * matrix(*shape, 0)).float()
    weights, plains = [], []
    makers = ((ours, {"refresh": "svd"}), (theirs, {}))
    optimizers = []
    for make, extra in makers:
        weight = nn.Parameter(start.clone())
        plain = nn.Parameter((0.2 * matrix(1, 7, 3)).float().squeeze(0))
        groups = [{"params": [plain]}, {"params": [weight], **group}]
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            optimizers.append(make(groups, **options, **extra))
        weights.append(weight)
        plains.append(plain)
    for step in range(STEPS):
        for optimizer, weight, plain in zip(optimizers, weights, plains, strict=True):
            weight.grad = gradient(shape, step)
            plain.grad = (1e-2 * matrix(1, 7, step + 50)).float().squeeze(0)
            optimizer.step()
    ours_mn, theirs_mn = (weight.detach() for weight in weights)
    # 1e-5 of the change, and the rounding of 25 fp32 additions to the weights themselves
    allowed = 1e-5 * (theirs_mn - start).norm() + STEPS * 2**-24 * start.norm()
    assert (ours_mn - theirs_mn).norm() < allowed
    assert (theirs_mn - start).norm() > 0.01
    torch.testing.assert_close(*plains, rtol=1e-5, atol=1e-7)
