"""COAP on convolutions: Tucker-2 factors, the written-out rule, a net that trains."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import references_coap
import torch
from support import hashed
from test_memory_record import largest_allocation
from torch import Tensor, nn
from torch.nn import functional

from lowrank.optimizers import (
    CoapAdafactor,
    CoapAdafactor8bit,
    CoapAdamW,
    CoapAdamW8bit,
    build,
    state_bytes,
)
from lowrank.optimizers.engine.geometry import RowRange
from lowrank.optimizers.projectors import tucker


@pytest.mark.parametrize(
    ("shape", "ratio", "ranks"),
    [
        ((64, 64, 3, 3), 2, (45, 45)),
        ((40, 32, 3, 3), 2, (28, 22)),
        ((40, 32, 1, 1), 2, (20,)),
        ((3, 2, 3, 3), 100, (1, 1)),
    ],
)
def test_tucker_ranks(shape: tuple[int, ...], ratio: float, ranks: tuple[int, ...]) -> None:
    assert tucker.geometry(shape, ratio).ranks == ranks


def tensor(shape: tuple[int, ...], stream: int) -> Tensor:
    return hashed(torch.Size(shape).numel(), stream).reshape(shape)


def test_orthogonal_iteration_beats_separate_factors_and_full_rank_is_exact() -> None:
    grad = tensor((12, 10, 3, 3), 1)
    shape = tucker.geometry(tuple(grad.shape), 4.0)
    bases = tucker.decompose(grad, shape)
    separate = tuple(
        torch.linalg.svd(grad.movedim(axis, 0).flatten(1), full_matrices=False).U[:, :rank]
        for axis, rank in enumerate(shape.ranks)
    )
    assert tucker.down(grad, bases).norm() >= tucker.down(grad, separate).norm() - 1e-12
    for basis in bases:
        torch.testing.assert_close(basis.T @ basis, torch.eye(basis.shape[1]).double())
    full = tucker.decompose(grad, tucker.geometry(tuple(grad.shape), 1.0))
    torch.testing.assert_close(tucker.down(grad, full).norm(), grad.norm())


@pytest.mark.parametrize("shape", [(48, 32, 3, 3), (96, 110, 3, 1)], ids=str)
@pytest.mark.parametrize("restore", [False, True])
def test_convolutions_follow_the_written_out_rule(shape: tuple[int, ...], restore: bool) -> None:
    weight = nn.Parameter(0.2 * tensor(shape, 0))
    made = CoapAdamW(
        [{"params": [weight], "rank_ratio_cnn": 4.0}],
        lr=0.02,
        update_interval=2,
        reproject_factor=2,
        restore_state=restore,
    )
    grads = [tensor(shape, 1) + 0.6 * tensor(shape, k + 2) for k in range(7)]
    geometry = tucker.geometry(shape, 4.0)
    w = references_coap.convolutions(
        grads,
        weight.detach(),
        lambda grad: tucker.decompose(grad, geometry),
        interval=2,
        factor=2,
        restore=restore,
        lr=0.02,
    )
    for grad in grads:
        weight.grad = grad.clone()
        made.step()
    torch.testing.assert_close(weight.detach(), w, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("cls", [CoapAdamW, CoapAdamW8bit, CoapAdafactor, CoapAdafactor8bit])
@pytest.mark.parametrize("channels_last", [False, True])
def test_a_small_convolutional_net_trains_and_resumes(cls: Any, channels_last: bool) -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 32, 3), nn.ReLU(), nn.Conv2d(32, 40, 3), nn.Flatten())
    net.append(nn.Linear(40 * 16, 5))
    if channels_last:
        net = net.to(memory_format=torch.channels_last)
    images, labels = torch.randn(16, 3, 8, 8), torch.arange(16) % 5

    own = {"scale_parameter": False} if issubclass(cls, CoapAdafactor) else {}

    def made(model: nn.Module) -> Any:
        return cls(
            model.named_parameters(), lr=3e-3, rank=4, rank_ratio_cnn=2.0, update_interval=3, **own
        )

    optimizer = made(net)
    events: list[Any] = []
    optimizer.register_refresh_hook(events.append)
    losses = []
    for step in range(30):
        if step == 20:
            twin = copy.deepcopy(net)
            other = made(twin)
            other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
        for model, opt in ((net, optimizer), *(((twin, other),) if step >= 20 else ())):
            loss = functional.cross_entropy(model(images), labels)
            opt.zero_grad()
            loss.backward()
            opt.step()
        losses.append(loss.item())
    assert losses[-1] < 0.6 * losses[0]
    assert all(torch.equal(a, b) for a, b in zip(net.parameters(), twin.parameters(), strict=True))
    kernel = net[2].weight
    assert len(optimizer.state[kernel]["basis"]) == 40
    assert {event.shape for event in events} >= {(40, 288)}
    assert all(0 < event.captured_energy <= 1 for event in events)
    groups = {id(p): group for group in optimizer.param_groups for p in group["params"]}
    expected = sum(
        optimizer.compose(groups[id(p)]).state_bytes(p.shape, 4) for p in net.parameters()
    )
    assert state_bytes(optimizer) == expected


def test_param_groups_take_convolutions_with_a_ratio() -> None:
    net = nn.ModuleDict({"stem": nn.Conv2d(3, 8, 3), "body": nn.Conv2d(40, 48, 3)})
    made = build("coap_adamw", net, rank_ratio_cnn=2.0)
    names = [group["param_names"] for group in made.param_groups]
    assert names[0] == ["body.weight"]
    assert "stem.weight" in names[1]
    assert made.state[net["body"].weight]["exp_avg"].shape == (33, 28, 3, 3)


def test_tied_convolutions_are_not_projected() -> None:
    net = nn.ModuleDict({name: nn.Conv2d(40, 48, 3) for name in ("one", "two", "single")})
    net["two"].weight = net["one"].weight
    made = build("coap_adamw", net, rank_ratio_cnn=2.0)
    assert made.param_groups[0]["param_names"] == ["single.weight"]
    assert "one.weight" in made.param_groups[1]["param_names"]


@pytest.mark.parametrize("shape", [(256, 256, 3, 3), (1024, 512, 1, 1)], ids=str)
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=str)
def test_a_step_between_refits_goes_in_chunks(
    shape: tuple[int, ...], layout: torch.memory_format
) -> None:
    weight = nn.Parameter(torch.zeros(shape).to(memory_format=layout))
    made = CoapAdamW([{"params": [weight], "rank_ratio_cnn": 4.0}])
    weight.grad = tensor(shape, 1).float().to(memory_format=layout)
    made.step()
    core = made.state[weight]["exp_avg"].nbytes
    assert largest_allocation(made.step) <= max(core, (1 << 18) * 4) < weight.nbytes


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=str)
def test_chunks_are_the_whole(dtype: torch.dtype, layout: torch.memory_format) -> None:
    """Core and write-back of a weight of several chunks, with decay, against whole tensors."""
    shape = (300, 128, 3, 3)
    grad, weight = (tensor(shape, stream).to(dtype) for stream in (1, 0))
    bases = tuple(
        torch.linalg.qr(tensor((size, 20), stream)).Q.to(dtype)
        for stream, size in ((2, 300), (3, 128))
    )
    core = torch.einsum("abcd,am,bn->mncd", grad.double(), *(b.double() for b in bases))
    loose = {"rtol": 1e-5, "atol": 1e-5} if dtype == torch.float32 else {"rtol": 0.02, "atol": 0.02}
    low = tucker.down(grad.to(memory_format=layout), bases)
    torch.testing.assert_close(low.double(), core, **loose)
    back = torch.einsum("mncd,am,bn->abcd", low.double(), *(b.double() for b in bases))
    written = weight.clone(memory_format=torch.preserve_format).to(memory_format=layout)
    tucker.write_back(written, low, bases, RowRange.whole(300), alpha=0.5, decay_factor=0.9)
    torch.testing.assert_close(written.double(), 0.9 * weight.double() - 0.5 * back, **loose)


def test_convolutions_need_a_ratio_and_a_dropped_residual() -> None:
    kernel = nn.Parameter(torch.zeros(8, 8, 3, 3))
    with pytest.raises(ValueError, match="rank_ratio_cnn=None"):
        CoapAdamW([{"params": [kernel], "rank": 2}])
    with pytest.raises(ValueError, match="4-dimensional: accepted with SignResidual"):
        CoapAdamW([{"params": [kernel], "rank_ratio_cnn": 2.0, "residual": "sign"}])
