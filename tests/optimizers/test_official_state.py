"""States of galore_torch and fira: training goes on here as it would have there."""

from __future__ import annotations

import io
import pickle
import sys
import types
import warnings
from typing import Any

import pytest
import torch
from side_by_side import GAP, SHAPES, gradient, needs, official
from support import matrix
from torch import nn

from lowrank.optimizers import (
    ApolloAdamW,
    FiraAdamW,
    GaLoreAdafactor,
    GaLoreAdamW,
    LowRankOptimizer,
    load_official_state,
    read_official,
)

SAVED, STEPS = 12, 24


def parameters(shape: tuple[int, int]) -> tuple[nn.Parameter, nn.Parameter]:
    weight = (0.2 * matrix(*shape, 0)).float()
    plain = (0.2 * matrix(1, 7, 3)).float().squeeze(0)
    return nn.Parameter(weight), nn.Parameter(plain)


def train(
    optimizer: torch.optim.Optimizer, pair: tuple[nn.Parameter, nn.Parameter], steps: range
) -> None:
    weight, plain = pair
    for step in steps:
        weight.grad = gradient(tuple(weight.shape), step)  # type: ignore[arg-type]
        plain.grad = (1e-2 * matrix(1, 7, step + 50)).float().squeeze(0)
        optimizer.step()


def follows(
    package: str, kind: type[LowRankOptimizer], shape: tuple[int, int], proj_type: str, **more: Any
) -> None:
    scale = "alpha" if package == "fira" else "scale"
    options: dict[str, Any] = {"lr": 0.01, "weight_decay": 0.05, **more}
    group = {"rank": 5, "update_proj_gap": GAP, scale: 0.25, "proj_type": proj_type}

    def groups(pair: tuple[nn.Parameter, nn.Parameter]) -> list[dict[str, Any]]:
        return [{"params": [pair[1]]}, {"params": [pair[0]], **group}]

    theirs = parameters(shape)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        optimizer = getattr(official(package), kind.__name__)(groups(theirs), **options)
    train(optimizer, theirs, range(SAVED))
    file = io.BytesIO()
    torch.save({"optimizer": optimizer.state_dict()}, file)
    file.seek(0)
    ours = parameters(shape)
    for own, other in zip(ours, theirs, strict=True):
        own.data.copy_(other.data)
    made = kind(groups(ours), **{**options, "lr": 1.0}, refresh="svd")
    load_official_state(made, read_official(file)["optimizer"])
    before = theirs[0].detach().clone()
    train(optimizer, theirs, range(SAVED, STEPS))
    train(made, ours, range(SAVED, STEPS))
    moved = (theirs[0] - before).norm()
    assert moved > 0.01
    assert (ours[0] - theirs[0]).norm() < 1e-5 * moved + STEPS * 2**-24 * before.norm()
    torch.testing.assert_close(ours[1], theirs[1], rtol=1e-5, atol=1e-7)


@needs("galore_torch")
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("proj_type", ["std", "left", "right", "full"])
def test_galore(shape: tuple[int, int], proj_type: str) -> None:
    follows("galore_torch", GaLoreAdamW, shape, proj_type)
    adafactor = {"relative_step": False, "scale_parameter": False}
    for beta1 in (None, 0.9):
        follows("galore_torch", GaLoreAdafactor, shape, proj_type, beta1=beta1, **adafactor)


@needs("fira")
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("proj_type", ["std", "reverse_std"])
def test_fira(shape: tuple[int, int], proj_type: str) -> None:
    follows("fira", FiraAdamW, shape, proj_type)


class GaLoreProjector:
    """Stands for the package's class, under its name, in a file."""

    def __init__(self, matrix_: Any) -> None:
        self.rank, self.update_proj_gap, self.scale, self.proj_type = 2, 3, 0.25, "std"
        self.ortho_matrix = matrix_


@pytest.fixture
def saved(monkeypatch: pytest.MonkeyPatch) -> Any:
    """A state as the package makes it after five steps, for a 6 x 4 matrix and a vector."""
    module = types.ModuleType("galore_torch.galore_projector")
    monkeypatch.setattr(GaLoreProjector, "__module__", module.__name__)
    monkeypatch.setitem(sys.modules, "galore_torch", types.ModuleType("galore_torch"))
    monkeypatch.setitem(sys.modules, module.__name__, module)
    module.GaLoreProjector = GaLoreProjector  # type: ignore[attr-defined]
    basis = torch.linalg.qr(matrix(4, 2, 1).float()).Q
    moments = {"exp_avg": matrix(6, 2, 2).float(), "exp_avg_sq": matrix(6, 2, 3).float().abs()}
    group = {"lr": 0.03, "betas": (0.9, 0.99), "eps": 1e-6, "weight_decay": 0.0}
    group["correct_bias"] = True
    projected = {"rank": 2, "update_proj_gap": 3, "scale": 0.25, "proj_type": "std"}
    content = {
        "state": {
            0: {"step": 5, "projector": GaLoreProjector(basis.t().contiguous()), **moments},
            1: {"step": 5, "exp_avg": torch.ones(3), "exp_avg_sq": torch.ones(3)},
        },
        "param_groups": [
            {**group, **projected, "params": [0]},
            {**group, "params": [1]},
        ],
    }
    file = io.BytesIO()
    torch.save(content, file)
    monkeypatch.undo()
    file.seek(0)
    return file


def ours(kind: type[LowRankOptimizer] = GaLoreAdamW, **changes: Any) -> LowRankOptimizer:
    pair = nn.Parameter(torch.zeros(6, 4)), nn.Parameter(torch.zeros(3))
    projected = {"rank": 2, "update_proj_gap": 3, "scale": 0.25, "proj_type": "std", **changes}
    return kind([{"params": [pair[0]], **projected}, {"params": [pair[1]]}], lr=0.01)


def test_a_file_is_read_without_the_package(saved: Any) -> None:
    state = read_official(saved)
    optimizer = ours()
    load_official_state(optimizer, state)
    (weight,) = optimizer.param_groups[0]["params"]
    own = optimizer.state[weight]
    assert int(own["step"]) == 5
    assert own["refreshed_at"] == 3  # steps 0 and 3 refreshed
    assert torch.equal(own["basis"], state["state"][0]["projector"].ortho_matrix.t())
    assert torch.equal(own["exp_avg"], state["state"][0]["exp_avg"])
    assert optimizer.param_groups[0]["lr"] == 0.03
    assert optimizer.param_groups[0]["betas"] == (0.9, 0.99)


def test_a_file_with_another_class_is_not_read() -> None:
    file = io.BytesIO()
    torch.save({"state": GaLoreProjector(None)}, file)
    file.seek(0)
    with pytest.raises(pickle.UnpicklingError):
        read_official(file)


def drop(state: Any, *path: Any) -> None:
    for key in path[:-1]:
        state = state[key]
    del state[path[-1]]


@pytest.mark.parametrize(
    ("edit", "said"),
    [
        (lambda s: s["state"][0].update(state1=torch.zeros(3)), "has .'state1'."),
        (lambda s: drop(s, "state", 0, "exp_avg"), "exp_avg absent"),
        (lambda s: drop(s, "state", 0, "projector"), "basis absent"),
        (lambda s: s["state"][0].update(exp_avg=torch.zeros(2, 6)), "exp_avg .2, 6."),
        (lambda s: s["state"][1].update(projector=s["state"][0]["projector"]), "has a projector"),
        (lambda s: setattr(s["state"][0]["projector"], "ortho_matrix", None), "without matrices"),
        (lambda s: s["param_groups"][0].update(update_proj_gap=200), "update_proj_gap=3 with"),
        (lambda s: s["param_groups"][0].update(correct_bias=False), "correct_bias=False"),
        (lambda s: drop(s, "param_groups", 0, "rank"), "has no rank"),
        (lambda s: s["param_groups"].pop(), "parameter groups of"),
        (lambda s: drop(s, "param_groups"), "no param_groups"),
    ],
)
def test_what_doesn_t_fit_changes_nothing(saved: Any, edit: Any, said: str) -> None:
    state, optimizer = read_official(saved), ours()
    edit(state)
    with pytest.raises(ValueError, match=said):
        load_official_state(optimizer, state)
    assert optimizer.param_groups[0]["lr"] == 0.01
    assert all(not int(own["step"]) for own in optimizer.state.values())


def test_other_methods_are_refused(saved: Any) -> None:
    with pytest.raises(ValueError, match=r"ApolloAdamW: accepted are GaLoreAdamW"):
        load_official_state(ours(ApolloAdamW), read_official(saved))
