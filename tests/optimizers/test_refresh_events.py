"""What refresh hooks are told where bases are not orthonormal, or no plain matrix is projected."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from support import hashed, set_gradients, tiny_model
from torch import nn

from lowrank.optimizers import CoapAdamW, build


@pytest.mark.parametrize("shape", [(40, 32, 3, 3), (96, 20, 3, 1)], ids=str)
def test_events_of_convolutions_are_about_the_subspaces(shape: tuple[int, ...]) -> None:
    """Large P steps, so that the factors are far from orthonormal."""
    weight = nn.Parameter(torch.zeros(shape))
    group = {"params": [weight], "rank_ratio_cnn": 4.0, "update_interval": 1}
    made = CoapAdamW([group], reproject_factor=50, coap_lr=200.0, normalize_gradient=True)
    events: list[Any] = []
    made.register_refresh_hook(events.append)
    for k in range(8):
        weight.grad = hashed(weight.numel(), k + 1).reshape(shape).float()
        made.step()
    state = made.state[weight]
    bases = [state[key] for key in ("basis", "basis_right") if key in state]
    assert any((b.T @ b - torch.eye(b.shape[1])).abs().max() > 0.5 for b in bases)
    kept = weight.grad
    for axis, basis in enumerate(bases):
        kept = torch.tensordot(kept, torch.linalg.qr(basis).Q, dims=([axis], [0])).movedim(-1, axis)
    energy = (kept.norm() / weight.grad.norm()).item() ** 2
    assert energy < 0.5
    assert events[-1].captured_energy == pytest.approx(energy, rel=1e-4)
    assert all(0 <= event.overlap <= 1 + 1e-5 for event in events[1:])
    assert events[-1].shape == (shape[0], weight.numel() // shape[0])
    assert events[-1].rank == min(basis.shape[1] for basis in bases)


@pytest.mark.parametrize("basis", ["int8", "int4"])
def test_rounded_bases_of_heads_are_told_of(basis: str) -> None:
    """One head's basis projects the whole matrix head by head, when its event is measured too."""
    energies: dict[str | None, list[float]] = {None: [], basis: []}
    for stored, found in energies.items():
        model = tiny_model()
        options = {"heads": 2, "rank": 4, "update_proj_gap": 2, "basis": stored}
        made = build("galore_plus_adamw", model, lr=1e-2, **options)
        made.register_refresh_hook(lambda event, to=found: to.append(event.captured_energy))
        for k in range(5):
            set_gradients(model, k)
            made.step()
    assert energies[basis] == pytest.approx(energies[None], abs=0.05)
