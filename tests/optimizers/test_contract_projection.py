"""What every projecting optimizer owes: checked options, refreshes that can't spoil anything."""

from __future__ import annotations

import copy

import pytest
import torch
from support import set_gradients, tiny_model
from table import (
    PROJECTING,
    Row,
    every_with,
    projecting,
    refitted,
    refitting,
    representative_projecting,
    train,
)
from torch import nn

MODES = ("eigh", "svd", "randomized", "warm")
#: A row for each projector that computes singular vectors.
SOLVERS = ("coap_adamw", "galore_adamw", "galore_plus_adamw", "online_subspace_adamw")
BAD_PROJECTIONS = (
    ({"rank": 0}, "rank=0"),
    ({"rank": 2.5}, "rank=2.5"),
    ({"update_proj_gap": 0}, "update_proj_gap=0"),
    ({"scale": "big"}, "scale='big'"),
    ({"proj_type": "up"}, "proj_type='up'.*'std'"),
    ({"refresh": "magic"}, "refresh='magic'.*'eigh'"),
    ({"projection_dtype": "int8"}, "projection_dtype='int8'"),
    ({"seed": -1}, "seed=-1"),
)


@representative_projecting
@pytest.mark.parametrize(("options", "message"), BAD_PROJECTIONS, ids=str)
def test_bad_projections_name_the_value(row: Row, options: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        row.build(tiny_model(), **options)


@representative_projecting
def test_misspelt_group_key_raises_and_own_keys_pass(row: Row) -> None:
    weight = nn.Parameter(torch.zeros(4, 4))
    with pytest.raises(ValueError, match="update_proj_gap"):
        row.optimizer([{"params": [weight], "rank": 2, "update_proj_gp": 5}], lr=0.1)
    optimizer = row.optimizer([{"params": [weight], "rank": 2, "label": "hidden"}], lr=0.1)
    assert optimizer.param_groups[0]["label"] == "hidden"


@projecting
@pytest.mark.parametrize("shape", [(8,), (2, 3, 4), (2, 3, 4, 4)], ids=str)
def test_only_matrices_are_projected(row: Row, shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="accepted are matrices"):
        row.optimizer([{"params": [nn.Parameter(torch.zeros(shape))], "rank": 2}], lr=0.1)


@representative_projecting
def test_no_rank_anywhere_warns_once(row: Row) -> None:
    with pytest.warns(UserWarning, match=r"param_groups\(model\)") as caught:
        row.optimizer(tiny_model().parameters(), lr=0.1)
    assert len(caught) == 1


@every_with("mode", MODES, refitted("solver"), SOLVERS)
def test_failing_solver_keeps_the_former_basis(
    row: Row, mode: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny_model()
    optimizer = row.build(model, refresh=mode)
    train(model, optimizer, range(3))
    former = {p: s["basis"].clone() for p, s in optimizer.state.items() if "basis" in s}

    def broken(*_: object, **__: object) -> object:
        raise torch.linalg.LinAlgError("did not converge")

    with monkeypatch.context() as patch:
        for solver in ("svd", "eigh", "qr"):
            patch.setattr(torch.linalg, solver, broken)
        with pytest.warns(UserWarning, match="converged"):
            train(model, optimizer, range(3, 4))
    assert all(torch.equal(optimizer.state[p]["basis"], basis) for p, basis in former.items())
    assert all(param.isfinite().all() for param in model.parameters())
    train(model, optimizer, range(4, 5))
    assert all(optimizer.state[p]["refreshed_at"] == 4 for p in former)


@every_with("mode", MODES, PROJECTING, SOLVERS)
def test_rank_deficient_gradients(row: Row, mode: str) -> None:
    for proj_type in ("std", "reverse_std", "left", "right", "full"):
        check_rank_deficient_gradients(row, mode, proj_type)


def check_rank_deficient_gradients(row: Row, mode: str, proj_type: str) -> None:
    model = tiny_model()
    if (row.one_sided and proj_type == "full") or (
        row.left_only and proj_type not in ("std", "left")
    ):
        with pytest.raises(ValueError, match=f"proj_type='{proj_type}'"):
            row.build(model, proj_type=proj_type)
        return
    optimizer = row.build(model, refresh=mode, proj_type=proj_type)
    for step in range(5):
        set_gradients(model, step)
        for param in model.parameters():
            if param.dim() == 2:
                param.grad = param.grad[:, :1] @ param.grad[:1]
        optimizer.step()
    assert all(param.isfinite().all() for param in model.parameters())
    for state in optimizer.state.values():
        for key in ("basis", "basis_right"):
            if key in state and not row.rounded_basis:
                gram = state[key].mT @ state[key]
                torch.testing.assert_close(gram, torch.eye(len(gram)), rtol=0, atol=1e-5)


@refitting("solver", "draw", "once")
def test_refresh_hook_measures(row: Row) -> None:
    model = tiny_model()
    optimizer = row.build(model, rank=16)
    events = []
    handle = optimizer.register_refresh_hook(events.append)
    train(model, optimizer, range(4))
    matrices = sum("refreshed_at" in state for state in optimizer.state.values())
    again = 0 if row.refits == "once" else matrices
    assert [event.step for event in events] == [1] * matrices + [4] * again
    for event in events:
        assert event.name is not None
        assert event.rank == 16
        assert event.captured_energy == pytest.approx(1.0, abs=1e-5)  # full rank keeps all of it
        assert event.seconds > 0
    assert all(event.overlap is None for event in events[:matrices])
    assert all(event.overlap == pytest.approx(1.0, abs=1e-5) for event in events[matrices:])
    handle.remove()
    train(model, optimizer, range(4, 8))
    assert len(events) == matrices + again
    copy.deepcopy(optimizer).register_refresh_hook(events.append)


@refitting("solver", "draw")
def test_staggered_refreshes_are_spread(row: Row) -> None:
    model = tiny_model()
    optimizer = row.build(model, stagger=True, update_proj_gap=3)
    events = []
    optimizer.register_refresh_hook(events.append)
    train(model, optimizer, range(7))
    assert [event.step for event in events] == [1, 1, 1, 2, 3, 4, 5, 6, 7]


def test_peers_keywords_without_effect_are_accepted() -> None:
    from lowrank.optimizers import GaLoreAdamW, GaLoreAdamW8bit

    weight = nn.Parameter(torch.zeros(4, 4))
    group = {"params": [weight], "rank": 2, "update_proj_gap": 5, "scale": 1.0, "proj_type": "std"}
    GaLoreAdamW([{**group}], no_deprecation_warning=True, correct_bias=True)
    GaLoreAdamW8bit([{**group}], percentile_clipping=100, block_wise=True, is_paged=False)
