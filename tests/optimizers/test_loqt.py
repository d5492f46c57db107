"""LoQT: its layer, its schedule, and a plain-tensor reference."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from support import matrix, tiny_model
from torch import Tensor, distributed, nn
from torch.utils._python_dispatch import TorchDispatchMode

from lowrank.optimizers import LayerEvent, build
from lowrank.optimizers.layers import QuantizedLowRankLinear
from lowrank.optimizers.layers.frozen import FORMATS, FrozenMatrix
from lowrank.optimizers.layers.mean import mean_gradients
from lowrank.optimizers.methods.loqt import bases_by, largest_entry

SHAPES = ((6, 10), (10, 6), (7, 7))
shapes = pytest.mark.parametrize("shape", SHAPES, ids=str)
formats = pytest.mark.parametrize("format", [None, *FORMATS])


def layer_of(shape: tuple[int, int], format: str | None, **options: Any) -> QuantizedLowRankLinear:
    """A layer whose basis and factor are not zero."""
    m, n = shape
    linear = nn.Linear(n, m, dtype=torch.float64)
    with torch.no_grad():
        linear.weight.copy_(matrix(m, n, 1))
    chosen = {"rank": 3, "scale": 0.7, "weight_format": format, "basis_format": format, **options}
    layer = QuantizedLowRankLinear.of(linear, 0, **chosen)
    layer.basis.assign(torch.linalg.qr(matrix(min(m, n), layer.rank, 2)).Q)
    with torch.no_grad():
        layer.factor.copy_(matrix(*layer.factor.shape, 3))
    return layer


# The layer


@shapes
@formats
def test_gradients(shape: tuple[int, int], format: str | None) -> None:
    layer = layer_of(shape, format)
    x = matrix(4, shape[1], 4).requires_grad_()
    torch.testing.assert_close(layer(x), x @ layer.effective_weight().mT + layer.bias)
    for watched in (False, True):
        layer.watch(watched)

        def function(x: Tensor, factor: Tensor, bias: Tensor) -> Any:
            return torch.func.functional_call(layer, {"factor": factor, "bias": bias}, (x,))

        assert torch.autograd.gradcheck(function, (x, layer.factor, layer.bias))


@shapes
def test_the_weight_has_a_gradient_while_it_is_watched(shape: tuple[int, int]) -> None:
    layer = layer_of(shape, "nf4")
    x, grad_y = matrix(4, shape[1], 4), matrix(4, shape[0], 5)
    layer(x).backward(grad_y)
    assert layer.weight_gradient is None
    layer.watch(on=True)
    for _ in range(2):  # accumulated
        layer(x).backward(grad_y)
    assert layer.weight_gradient is not None
    torch.testing.assert_close(layer.weight_gradient, 2 * grad_y.mT @ x)
    layer.watch(on=False)
    assert layer.weight_gradient is None


@shapes
@pytest.mark.parametrize("format", FORMATS)
def test_compensation_keeps_more_of_the_weight(shape: tuple[int, int], format: str) -> None:
    layer = layer_of(shape, format)
    basis = torch.linalg.qr(matrix(min(shape), 3, 6)).Q
    twin = copy.deepcopy(layer)
    plain, compensated = twin.renew(basis, 0), layer.renew(basis, 5)
    assert 0 < compensated < 0.95 * plain
    assert not twin.factor.any()


@shapes
def test_dense_formats_lose_nothing(shape: tuple[int, int]) -> None:
    layer = layer_of(shape, None)
    before = layer.effective_weight()
    assert layer.renew(torch.linalg.qr(matrix(min(shape), 3, 6)).Q, 5) < 1e-15
    torch.testing.assert_close(layer.effective_weight(), before, rtol=1e-14, atol=1e-14)
    assert not layer.factor.any()


@formats
def test_a_frozen_matrix_holds_what_it_is_given(format: str | None) -> None:
    first, second = matrix(30, 50, 1).float(), matrix(30, 50, 2).float()
    frozen = FrozenMatrix(first, format)
    bound = {None: 0.0, "nf4": 0.16, "int8": 5e-3}[format]
    for wanted in (first, second):
        frozen.assign(wanted)
        got = frozen.dense(torch.float32)
        assert (got - wanted).abs().max() <= bound * wanted.abs().max()
    stored = sum(part.nbytes for part in frozen.parts() if part is not None)
    # two scales and zeros a group of 256; a scale a group of 64
    assert stored == {None: 6000, "nf4": 750 + 4 * 24, "int8": 1500 + 8 * 6}[format]
    with pytest.raises(ValueError, match="format='int3'"):
        FrozenMatrix(first, "int3")


@pytest.mark.parametrize("name", ["eager", "aot_eager"])
def test_compiled(name: str) -> None:
    layer, x = layer_of((64, 64), "nf4").float(), matrix(3, 64, 4).float()
    expected = layer(x)
    compiled = torch.compile(layer, backend=name, fullgraph=True)
    for watched in (False, True):
        layer.watch(watched)
        y = compiled(x)
        torch.testing.assert_close(y, expected)
        y.sum().backward()
    torch.testing.assert_close(layer.weight_gradient, x.sum(0).expand(64, 64).contiguous())


# The schedule


def test_bases_come_at_growing_gaps() -> None:
    group = {"update_proj_gap": 3, "gap_growth": 2.0}
    steps = [step for step in range(40) if bases_by(group, step) > bases_by(group, step - 1)]
    assert steps == [0, 4, 9, 16, 27]  # 3 + 1, 3 + 2, 3 + 4, 3 + 8
    constant = {"update_proj_gap": 3, "gap_growth": 0.0}
    assert [bases_by(constant, step) for step in (0, 3, 4, 6, 7)] == [1, 1, 2, 2, 3]


def loss_of(model: nn.Module, seed: int) -> Tensor:
    tokens = torch.randint(0, 32, (3, 5), generator=torch.Generator().manual_seed(seed))
    return nn.functional.cross_entropy(model(tokens).flatten(0, 1), tokens.flatten())


def test_equals_the_reference() -> None:
    """W = W_f + c P B with P from the gradient at its step; B by Adam, which starts anew."""
    options = {"scale": 0.5, "weight_format": None, "basis_format": None, "update_proj_gap": 3}
    dense, model = tiny_model(dtype=torch.float64), tiny_model(dtype=torch.float64)
    optimizer = build("loqt_adamw", model, lr=1e-2, rank=4, plain_lr=0.0, **options)
    events: list[LayerEvent] = []
    optimizer.register_event_hook(events.append)
    projected = [dense.self_attn["q_proj"], dense.mlp["up_proj"], dense.mlp["down_proj"]]
    memory: dict[nn.Linear, list[Any]] = {}
    for step in range(9):
        optimizer.zero_grad()
        loss_of(model, step).backward()
        optimizer.step()
        dense.zero_grad()
        loss_of(dense, step).backward()
        for linear in projected:
            gradient = linear.weight.grad
            m, n = gradient.shape
            if step in (0, 4, 8):
                u, _, vh = torch.linalg.svd(gradient)
                memory[linear] = [u[:, :4] if m <= n else vh[:4], 0.0, 0.0, 0]
                continue
            p, first, second, taken = memory[linear]
            b = 0.5 * (p.mT @ gradient if m <= n else gradient @ p.mT)
            taken += 1
            first, second = 0.9 * first + 0.1 * b, 0.999 * second + 0.001 * b * b
            memory[linear] = [p, first, second, taken]
            root = (second / (1 - 0.999**taken)).sqrt() + 1e-8
            change = 1e-2 * first / (1 - 0.9**taken) / root
            linear.weight.data -= 0.5 * (p @ change if m <= n else change @ p)
    made = [model.self_attn["q_proj"], model.mlp["up_proj"], model.mlp["down_proj"]]
    for layer, linear in zip(made, projected, strict=True):
        torch.testing.assert_close(layer.effective_weight(), linear.weight, rtol=1e-9, atol=1e-11)
    assert [(event.kind, event.step, event.layers) for event in events] == [
        ("requantize", step, 3) for step in (0, 4, 8)
    ]


def test_a_basis_waits_for_a_sound_gradient() -> None:
    model = tiny_model()
    optimizer = build("loqt_adamw", model, lr=1e-2, rank=4, update_proj_gap=1)
    events: list[LayerEvent] = []
    optimizer.register_event_hook(events.append)
    (loss_of(model, 0) * float("inf")).backward()
    with pytest.warns(UserWarning, match="non-finite gradient"):
        optimizer.step()
    assert not events
    loss_of(model, 0).backward()  # dropped with the others
    optimizer.zero_grad()
    assert model.mlp["up_proj"].weight_gradient is None
    loss_of(model, 1).backward()
    optimizer.step()
    assert [event.layers for event in events] == [3]
    assert model.mlp["up_proj"].weight_gradient is None
    for step in range(2, 4):  # B moves, and is merged into four bits
        optimizer.zero_grad()
        loss_of(model, step).backward()
        optimizer.step()
    assert [event.step for event in events] == [0, 2]
    assert 0 < events[1].change < 0.2


def test_gradients_are_the_users_at_an_event() -> None:
    model = tiny_model()
    optimizer = build("loqt_adamw", model, lr=1e-2, rank=4)
    events: list[LayerEvent] = []
    optimizer.register_event_hook(events.append)
    with torch.no_grad():  # a basis, so that the factor has a gradient
        model.mlp["up_proj"].basis.assign(torch.linalg.qr(matrix(16, 4, 2)).Q.float())
    loss_of(model, 0).backward()
    grads = [(param, param.grad, param.grad.clone()) for param in model.parameters()]
    assert model.mlp["up_proj"].factor.grad.any()
    optimizer.step()
    assert len(events) == 1
    assert not model.mlp["up_proj"].factor.any()  # the step was without it
    for param, grad, value in grads:
        assert param.grad is grad
        assert torch.equal(grad, value)


@pytest.mark.parametrize("there", [(True, False), (False, True), (False, False), (True, True)])
def test_processes_reduce_the_same_gradients(
    there: tuple[bool, bool], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever this process has: the other one has the second gradient."""
    model = tiny_model()
    optimizer = build("loqt_adamw", model, rank=4)
    reduced: list[tuple[int, ...]] = []

    def all_reduce(tensor: Tensor, group: None) -> None:
        reduced.append(tuple(tensor.shape))
        if tensor.dtype == torch.int32:
            tensor.add_(torch.tensor([0, 1], dtype=torch.int32))

    monkeypatch.setattr(distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(distributed, "get_world_size", lambda group: 2)
    monkeypatch.setattr(distributed, "all_reduce", all_reduce)
    links = optimizer._links[1:]
    own = [
        torch.ones(link.layer.out_features, link.layer.in_features) if has else None
        for link, has in zip(links, there, strict=True)
    ]
    means = mean_gradients(own, links)
    first = [(24, 16)] if there[0] else []
    assert reduced == [(2,), *first, (16, 24)]
    assert (means[0] is not None) == there[0]
    assert means[1] is not None
    assert float(means[1].max()) == (0.5 if there[1] else 0.0)


class _Largest(TorchDispatchMode):
    """The most entries that an operation's new result has had."""

    def __init__(self) -> None:
        super().__init__()
        self.most = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        if isinstance(result, Tensor):
            self.most = max(self.most, result.numel())
        return result


def test_the_largest_entry_takes_no_second_gradient() -> None:
    gradient = matrix(30, 40, 1)
    assert largest_entry(gradient) == largest_entry(-gradient) == float(gradient.abs().max())
    with _Largest() as watched:
        largest_entry(gradient)
    assert watched.most == 1
    gradient[2, 3] = float("nan")
    assert largest_entry(gradient) != largest_entry(gradient)


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("weight_format", "fp4"),
        ("basis_format", "fp4"),
        ("scale", 0),
        ("gap_growth", -1.0),
        ("compensation_steps", -1),
        ("reset", "random"),
        ("update_proj_gap", 0),
    ],
)
def test_bad_options_raise(option: str, value: Any) -> None:
    name = "format" if option.endswith("format") else option
    with pytest.raises(ValueError, match=f"{name}={value!r}"):
        build("loqt_adamw", tiny_model(), **{"rank": 4, option: value})


def test_a_backward_pass_that_skips_the_full_weight_is_said() -> None:
    model = tiny_model()
    optimizer = build("loqt_adamw", model, lr=1e-2, rank=4)
    inputs = [param for param in model.parameters() if param.requires_grad]
    layer = model.self_attn["q_proj"]
    x = torch.ones(2, layer.in_features)
    layer(x).square().sum().backward(inputs=[p for p in inputs if p is layer.factor])
    with pytest.warns(UserWarning, match=r"no gradient of the full weight of self_attn\.q_proj"):
        optimizer.step()
