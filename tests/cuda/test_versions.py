"""Autograd hears of what operations write: version counters of every written tensor."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from samples import cloned, samples
from torch import Tensor

from lowrank.cuda import ops, using_kernels
from lowrank.optimizers import Int8Weight
from lowrank.optimizers.weights import fused

KERNELS = pytest.mark.parametrize("kernels", ["native", "torch"])
NAMES = pytest.mark.parametrize("name", list(ops.OPERATIONS))


def tensors_of(value: Any) -> list[Tensor]:
    """The tensors of one argument."""
    values = value if isinstance(value, list) else [value]
    return [item for item in values if isinstance(item, Tensor)]


def sides(name: str, arguments: tuple[Any, ...]) -> tuple[list[Tensor], list[Tensor]]:
    """The tensors that an operation writes, and those that it only reads."""
    sides: tuple[list[Tensor], list[Tensor]] = [], []
    for part, value in zip(ops.OPERATIONS[name][0].split(", "), arguments, strict=True):
        sides["!" not in part].extend(tensors_of(value))
    return sides


def moved(value: Any) -> Any:
    """Tensors on the device "meta"."""
    if isinstance(value, list):
        return [moved(item) for item in value]
    return value.to("meta") if isinstance(value, Tensor) else value


def call(name: str, arguments: tuple[Any, ...]) -> None:
    getattr(torch.ops.lowrank, name)(*arguments)


@KERNELS
@NAMES
def test_written_tensors_get_a_new_version_and_read_ones_do_not(name: str, kernels: str) -> None:
    arguments = tuple(map(cloned, samples()[name]))
    written, read = sides(name, arguments)
    assert written
    before = [t._version for t in written]
    with using_kernels(kernels):
        for setting in (torch.no_grad(), torch.enable_grad()):
            with setting:
                call(name, arguments)
            after = [t._version for t in written]
            assert all(new > old for new, old in zip(after, before, strict=True))
            before = after
    assert [t._version for t in read] == [0] * len(read)


@NAMES
def test_on_meta_tensors(name: str) -> None:
    arguments = samples()[name]
    on_meta = tuple(map(moved, arguments))
    call(name, on_meta)
    assert all(t._version > 0 for t in sides(name, on_meta)[0])


@KERNELS
@NAMES
def test_below_autograd(name: str, kernels: str) -> None:
    """As an operation of a tensor subclass is: there torch's own counters stand still."""
    arguments = tuple(map(cloned, samples()[name]))
    with using_kernels(kernels), torch._C._AutoDispatchBelowADInplaceOrView():
        call(name, arguments)
    assert all(t._version > 0 for t in sides(name, arguments)[0])


@NAMES
def test_inference_tensors_have_none(name: str) -> None:
    with torch.inference_mode():
        call(name, tuple(map(cloned, samples()[name])))


@pytest.mark.exhaustive
def test_in_a_compiled_function() -> None:
    def step(x: Tensor, out: Tensor) -> Tensor:
        torch.ops.lowrank.stochastic_bfloat16(x, out, 3, 0)
        return x + 1

    out = torch.zeros(300, dtype=torch.bfloat16)
    torch.compile(step, fullgraph=True)(torch.randn(300), out)
    assert out._version > 0
    assert bool((out != 0).all())


@KERNELS
@pytest.mark.parametrize("whole", [True, False])
def test_a_backward_pass_through_an_updated_weight_raises(kernels: str, whole: bool) -> None:
    """`whole`: the parameter itself is written, not some of its rows without autograd."""
    weight = torch.nn.Parameter(torch.randn(20, 30, dtype=torch.bfloat16))
    x = torch.randn(4, 30, dtype=torch.bfloat16, requires_grad=True)
    loss = torch.nn.functional.linear(x, weight).sum()
    target = weight.detach() if whole else weight.detach()[5:9]
    delta = torch.ones(target.shape)
    with using_kernels(kernels):
        torch.ops.lowrank.write_back(target, delta, None, None, 1.0, 0.1, 7, 0)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@KERNELS
def test_a_fused_write_into_an_int8_weight(kernels: str) -> None:
    """Codes, scales and zero points, and the weight that they make up."""
    weight = torch.nn.Parameter(Int8Weight.quantize(torch.randn(20, 32), 64))
    x = torch.randn(4, 32, requires_grad=True)
    by_linear = torch.nn.functional.linear(x, weight).sum()
    by_itself = weight.abs().sum()
    assert isinstance(weight, Int8Weight)
    chunk = fused.FusedChunk(weight, None, 0, 20, 5, 0)
    before = weight._version
    with using_kernels(kernels):
        chunk.write(torch.ones(20, 32), None, decay_factor=1.0, alpha=0.1)
    assert all(part._version > 0 for part in weight.parts())
    assert weight._version > before
    for loss in (by_linear, by_itself):
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            loss.backward()
