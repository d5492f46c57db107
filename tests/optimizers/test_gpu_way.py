"""The way that steps take on a GPU gives what the ordinary one gives, on a CPU."""

from __future__ import annotations

from contextlib import nullcontext
from math import prod
from typing import Any
from unittest import mock

import pytest
import torch
from support import matrix
from torch import Tensor, nn

from lowrank.cuda import status, using_kernels
from lowrank.optimizers import (
    FiraAdamW,
    GaLoreAdamW,
    LowRankOptimizer,
    OnlineSubspaceAdamW,
    available,
    build,
)
from lowrank.optimizers.engine import chunks, devices
from lowrank.optimizers.engine.geometry import Side
from lowrank.optimizers.engine.gradients import SkippedUpdates
from lowrank.optimizers.projectors import RandomProjector
from lowrank.optimizers.storage import Int4Basis, Int8Basis

pytestmark = pytest.mark.skipif(
    status("host").library is None, reason="the host's library is not compiled"
)

#: Those that change the layers have steps of their own.
LAYERS = {"relora_adamw", "switchlora_adamw", "sltrain_adamw", "sltrain_adamw_8bit", "sst_adamw"}
LAYERS |= {"loqt_adamw", "low_rank_adamw", "dlrt_adamw", "lisa_adamw", "sparse_loco"}
#: Methods whose parts are batched; the others go through the general form of the same step.
BATCHED = {"galore_adamw", "galore_adamw_8bit", "qgalore_adamw_8bit", "fira_adamw", "apollo_adamw"}
BATCHED |= {"frugal_adamw", "online_subspace_adamw", "online_subspace_lion", "galore_muon", "muon"}
BATCHED |= {"galore_adafactor", "coap_adamw", "adamw_8bit"}
NAMES = [
    pytest.param(name, marks=() if name in BATCHED else pytest.mark.slow)
    for name in available()
    if name not in LAYERS
]


class Layers(nn.Module):
    """Matrices of three shapes, three of each, and a plain one."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        shapes = ((96, 64), (64, 96), (64, 64))
        for number in range(3):
            for place, (m, n) in enumerate(shapes):
                layer = nn.Linear(n, m, bias=False, dtype=dtype)
                setattr(self, f"mlp_{number}_{place}", layer)
        self.head = nn.Linear(64, 32, bias=False, dtype=dtype)
        for index, weight in enumerate(self.parameters()):
            weight.data.copy_(matrix(*weight.shape, index) * 0.05)


def give_gradients(model: nn.Module, step: int) -> None:
    for index, weight in enumerate(model.parameters()):
        weight.grad = matrix(*weight.shape, 100 * step + index).to(weight.dtype)


def trained(
    name: str, dtype: torch.dtype, steps: int = 5, **options: Any
) -> tuple[list[Tensor], LowRankOptimizer]:
    model = Layers(dtype)
    optimizer = build(name, model, **{"lr": 1e-2, "rank": 8, "update_proj_gap": 3, **options})
    for step in range(steps):
        give_gradients(model, step)
        optimizer.step()
    return [weight.detach().float() for weight in model.parameters()], optimizer


def assert_close(
    ours: list[Tensor], theirs: list[Tensor], dtype: torch.dtype, limit: float
) -> None:
    start = [weight.detach().float() for weight in Layers(dtype).parameters()]
    for index, (a, b, before) in enumerate(zip(ours, theirs, start, strict=True)):
        moved = torch.linalg.vector_norm(b - before)
        difference = torch.linalg.vector_norm(a - b)
        assert difference <= limit * moved, (index, float(difference), float(moved))


#: Muon's products are in bf16 on a GPU; a sign may turn where the last bits differ.
ROUGH = {"muon": 0.05, "galore_muon": 0.05, "online_subspace_lion": 0.05}


@pytest.mark.parametrize("name", NAMES)
def test_it_goes_where_the_ordinary_one_goes(name: str) -> None:
    options: dict[str, Any] = {"heads": 2} if name == "galore_plus_adamw" else {}
    plain, _ = trained(name, torch.float32, weight_decay=0.1, **options)
    with devices.as_on_gpu():
        ours, _ = trained(name, torch.float32, weight_decay=0.1, **options)
    assert_close(ours, plain, torch.float32, ROUGH.get(name, 1e-4))


@pytest.mark.parametrize("name", ["galore_adamw", "fira_adamw", "online_subspace_adamw"])
def test_half_precision(name: str) -> None:
    plain, _ = trained(name, torch.bfloat16)
    with devices.as_on_gpu():
        ours, _ = trained(name, torch.bfloat16)
    assert_close(ours, plain, torch.bfloat16, 0.05)


@pytest.mark.parametrize("shape", [(24, 16), (3, 24, 16)], ids=["matrices", "experts"])
@pytest.mark.parametrize("options", [{}, {"moments": "rotate"}, {"projection_dtype": "bfloat16"}])
@pytest.mark.parametrize("cls", [GaLoreAdamW, FiraAdamW, OnlineSubspaceAdamW])
def test_options_and_experts(
    cls: type[LowRankOptimizer], options: dict[str, Any], shape: tuple[int, ...]
) -> None:
    results = []
    for way in (nullcontext, devices.as_on_gpu):
        starts = [matrix(36, 32, i).float().reshape(-1)[: prod(shape)] for i in (0, 1)]
        params = [nn.Parameter(start.view(shape).clone()) for start in starts]
        with way():
            optimizer = cls(
                [{"params": params, "rank": 4, "update_proj_gap": 3, **options}], lr=0.1
            )
            for step in range(5):
                for i, param in enumerate(params):
                    grad = matrix(36, 32, 10 * step + i).float().reshape(-1)
                    param.grad = grad[: param.numel()].view(shape).clone()
                optimizer.step()
        results.append([param.detach() for param in params])
    for plain, ours in zip(*results, strict=True):
        # Each of five steps moves an entry by about 1e-2; a direction is rounded to bf16 in one.
        limit = 1e-4 if options.get("projection_dtype") else 1e-5
        torch.testing.assert_close(ours, plain, rtol=0, atol=limit)


@pytest.mark.parametrize(
    ("name", "capturable"),
    [
        *(("galore_adamw", False), ("galore_adamw", True), ("galore_adamw_8bit", False)),
        *(("galore_adamw_8bit", True), ("muon", False)),
    ],
)
def test_a_matrix_without_a_finite_gradient_stays(name: str, capturable: bool) -> None:
    """Nothing is read back; its moments take in a zero, and counts are read when asked for."""
    options: dict[str, Any] = {} if name == "muon" else {"rank": 8, "capturable": capturable}
    if "8bit" in name:
        options["min_8bit_size"] = 256
    results = []
    for bad in (float("nan"), float("inf"), 0.0):
        model = Layers(torch.float32)
        with devices.as_on_gpu():
            optimizer = build(name, model, lr=1e-2, weight_decay=0.0, **options)
            for step in range(3):
                give_gradients(model, step)
                before = model.mlp_1_0.weight.detach().clone()
                if step == 1:
                    model.mlp_1_0.weight.grad.mul_(0.0)[5, 6] = bad
                optimizer.step()
                if step == 1 and bad != 0.0:
                    torch.testing.assert_close(model.mlp_1_0.weight, before, rtol=0, atol=0)
        state = optimizer.state[model.mlp_1_0.weight]
        results.append([value for value in state.values() if isinstance(value, Tensor)])
        others = [w.detach() for n, w in model.named_parameters() if n != "mlp_1_0.weight"]
        results[-1] += others
        if bad != 0.0:
            with pytest.warns(UserWarning, match=r"non-finite gradient of mlp_1_0.weight"):
                assert optimizer.skipped == 1
            assert optimizer.skipped_by_name() == {"mlp_1_0.weight": 1}
        else:
            assert optimizer.skipped == 0
    for nan, infinite, zero in zip(*results, strict=True):
        torch.testing.assert_close(nan, zero, rtol=0, atol=0)
        torch.testing.assert_close(infinite, zero, rtol=0, atol=0)


#: By what uses a gradient that isn't finite after the flags: residuals, and projectors that track.
GATED: dict[str, tuple[str, dict[str, Any]]] = {
    "norm_scaled": ("fira_adamw", {}),
    "norm_scaled, paper": ("fira_adamw", {"residual_scale": 1.0, "basis": "int8"}),
    "norm_scaled, capturable": ("fira_adamw", {"capturable": True}),
    "scaled": ("apollo_adamw", {}),
    "scaled, tensor": ("apollo_adamw", {"scale_type": "tensor", "scale_front": True}),
    "scaled, capturable": ("apollo_adamw", {"capturable": True}),
    "scaled, stochastic": ("fira_adamw", {"stochastic_rounding": True, "dtype": torch.bfloat16}),
    "column_scaled": ("alice_adamw", {}),
    "row_normalised": ("galore_adamw", {"residual": "row_normalised"}),
    "error_feedback": ("ldadam_adamw", {}),
    "weight_normalised": ("gradnorm_lorp_adamw", {}),
    "sign": ("frugal_adamw", {}),
    "online, rotate": ("online_subspace_adamw", {"moments": "rotate"}),
    "online, projection_dtype": ("online_subspace_adamw", {"projection_dtype": "bfloat16"}),
}


@pytest.mark.parametrize("kernels", ["native", "torch"])
@pytest.mark.parametrize("case", GATED)
def test_a_gradient_that_is_not_finite_leaves_nothing(case: str, kernels: str) -> None:
    """Its matrix stays and nothing in its state is infected; the others don't notice."""
    name, options = GATED[case]
    options = dict(options)
    dtype = options.pop("dtype", torch.float32)
    options = {"lr": 1e-2, "rank": 8, "update_proj_gap": 50, "weight_decay": 0.0, **options}
    others = []
    for bad in (float("nan"), float("inf"), None):
        model = Layers(dtype)
        weight = model.mlp_1_0.weight
        with devices.as_on_gpu(), using_kernels(kernels):
            optimizer = build(name, model, **options)
            for step in range(4):
                give_gradients(model, step)
                if step == 2 and bad is not None:
                    weight.grad.fill_(bad)
                before = weight.detach().clone()
                kept = optimizer.state[weight].get("residual_norm", torch.zeros(())).clone()
                optimizer.step()
                stays = step == 2 and bad is not None
                assert torch.equal(weight.detach(), before) == stays, step
                if stays and kept:
                    assert torch.equal(optimizer.state[weight]["residual_norm"], kept)
        for key, value in optimizer.state[weight].items():
            if isinstance(value, Tensor):
                assert bool(value.isfinite().all()), key
        others.append([w.detach() for w in model.parameters() if w is not weight])
        with nullcontext() if bad is None else pytest.warns(UserWarning, match="mlp_1_0.weight"):
            assert optimizer.skipped_by_name() == ({} if bad is None else {"mlp_1_0.weight": 1})
    for nan, infinite, fine in zip(*others, strict=True):
        torch.testing.assert_close(nan, fine, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(infinite, fine, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("capturable", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_bases_that_are_drawn_as_a_list_are_those_drawn_one_by_one(
    dtype: torch.dtype, capturable: bool
) -> None:
    model = Layers(dtype)
    give_gradients(model, 0)
    optimizer = build("apollo_adamw", model, rank=8, capturable=capturable)
    optimizer.step()
    found: list[Tensor] = []
    plain = RandomProjector.bases_together

    def noted(self: Any, params: Any) -> list[Tensor]:
        made = plain(self, params)
        for param, basis in zip(params, made, strict=True):
            (alone,) = self._read(param)
            assert torch.equal(basis, alone.to(dtype))
        found.extend(made)
        return made

    with devices.as_on_gpu(), mock.patch.object(RandomProjector, "bases_together", noted):
        give_gradients(model, 1)
        optimizer.step()
    assert len(found) == 9


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("group", [60, 256])
def test_quantised_bases_are_read_as_a_list(bits: int, group: int) -> None:
    storage = (Int4Basis if bits == 4 else Int8Basis)(quant_group_size=group)
    for side in Side.LEFT, Side.RIGHT:
        states = []
        for seed in range(3):
            basis = matrix(33, 7, seed).bfloat16()
            states.append({"side": side, **storage.init("basis", (33, 7), basis)})
            storage.write(states[-1], "basis", basis)
        for ours, state in zip(storage.read_together(states, "basis"), states, strict=True):
            assert torch.equal(ours, storage.read(state, "basis"))


@pytest.mark.parametrize("capturable", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_plain_parameter_without_a_finite_gradient_only_decays(
    dtype: torch.dtype, capturable: bool
) -> None:
    found = []
    for bad in (float("nan"), float("inf"), 0.0):
        model = Layers(dtype)
        with devices.as_on_gpu():
            optimizer = build("adamw", model, lr=1e-2, weight_decay=0.1, capturable=capturable)
            for step in range(3):
                give_gradients(model, step)
                before = model.head.weight.detach().clone()
                if step == 1:
                    model.head.weight.grad.fill_(bad)
                optimizer.step()
                if step == 1 and bad != 0.0:
                    decayed = (before.float() * (1 - 1e-3)).to(dtype)
                    torch.testing.assert_close(model.head.weight.detach(), decayed)
        state = optimizer.state[model.head.weight]
        found.append([value for value in state.values() if isinstance(value, Tensor)])
        found[-1] += [w.detach() for w in model.parameters() if w is not model.head.weight]
        with nullcontext() if not bad else pytest.warns(UserWarning, match="head.weight"):
            assert optimizer.skipped_by_name() == ({"head.weight": 1} if bad else {})
    for nan, infinite, zero in zip(*found, strict=True):
        assert torch.equal(nan, zero)
        assert torch.equal(infinite, zero)


def test_coordinates_are_left_out_of_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a step has updated is no part of its signs, however a matrix is cut."""
    plain, _ = trained("frugal_adamw", torch.float32)
    monkeypatch.setattr(chunks, "DEVICE_ELEMENTS", 1000)
    with devices.as_on_gpu():
        ours, _ = trained("frugal_adamw", torch.float32)
    assert_close(ours, plain, torch.float32, 1e-5)


@pytest.mark.parametrize("name", ["frugal_adamw", "galore_muon", "online_subspace_lion"])
def test_what_is_not_finite_does_not_spread(name: str) -> None:
    """The matrix stays, and the others go where they would go without it."""
    results = []
    for bad in (False, True):
        model = Layers(torch.float32)
        with devices.as_on_gpu():
            optimizer = build(name, model, lr=1e-2, rank=8, weight_decay=0.0)
            for step in range(3):
                give_gradients(model, step)
                before = model.mlp_1_0.weight.detach().clone()
                if step == 1 and bad:
                    model.mlp_1_0.weight.grad[5, 6] = float("nan")
                optimizer.step()
                if step == 1 and bad:
                    torch.testing.assert_close(model.mlp_1_0.weight, before, rtol=0, atol=0)
        assert all(weight.isfinite().all() for weight in model.parameters())
        results.append([w.detach() for n, w in model.named_parameters() if n != "mlp_1_0.weight"])
    for whole, broken in zip(*results, strict=True):
        torch.testing.assert_close(broken, whole, rtol=0, atol=0)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        *(("adamw_8bit", {}), ("adamw_8bit", {"min_8bit_size": 256}), ("galore_adafactor", {})),
        *(("online_subspace_lion", {}), ("foam_adamw", {}), ("racs_adamw", {})),
        *(("scale_sgd", {}), ("adamw", {"stochastic_rounding": True})),
    ],
    ids=str,
)
def test_no_rule_reads_whether_plain_gradients_are_finite(
    name: str, options: dict[str, Any]
) -> None:
    """Without weight decay a plain parameter stays, and nothing in its state is infected."""
    dtype = torch.bfloat16 if "stochastic_rounding" in options else torch.float32
    others = []
    for bad in (float("nan"), None):
        model = Layers(dtype)
        with devices.as_on_gpu():
            optimizer = build(name, model, lr=1e-2, weight_decay=0.0, **options)
            for step in range(3):
                give_gradients(model, step)
                before = model.head.weight.detach().clone()
                if step == 1 and bad is not None:
                    model.head.weight.grad.fill_(bad)
                with mock.patch.object(SkippedUpdates, "usable", side_effect=AssertionError):
                    optimizer.step()
                stays = step == 1 and bad is not None
                assert torch.equal(model.head.weight.detach(), before) == stays
        for key, value in optimizer.state[model.head.weight].items():
            if isinstance(value, Tensor):
                assert bool(value.isfinite().all()), key
        others.append([w.detach() for w in model.parameters() if w is not model.head.weight])
        with nullcontext() if bad is None else pytest.warns(UserWarning, match="head.weight"):
            assert optimizer.skipped_by_name() == ({} if bad is None else {"head.weight": 1})
    assert all(map(torch.equal, *others))
