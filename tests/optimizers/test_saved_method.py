"""A loaded state never turns an optimizer into another method."""

from __future__ import annotations

import itertools
import warnings
from typing import Any

import pytest
import torch
from support import set_gradients, tiny_model
from torch import nn

from lowrank.optimizers import FiraAdamW, GaLoreAdamW, LowRankOptimizer, build, param_groups

PROJECTING = (
    "galore_adamw",
    "fira_adamw",
    "apollo_adamw",
    "apollo_mini_adamw",
    "coap_adamw",
    "online_subspace_adamw",
    "frugal_adamw",
)


def made(name: str, model: nn.Module | None = None, **options: Any) -> LowRankOptimizer:
    return build(name, model or tiny_model(), **{"rank": 4, "update_proj_gap": 3, **options})


@pytest.mark.parametrize(("saved", "loads"), itertools.permutations(PROJECTING, 2))
def test_a_state_of_another_method_names_both(saved: str, loads: str) -> None:
    first, second = made(saved), made(loads)
    state, before = first.state_dict(), second.state_dict()
    for marked in (True, False):  # earlier versions recorded no class
        if not marked:
            for group in state["param_groups"]:
                del group["method"]
            if {saved, loads} == {"apollo_adamw", "apollo_mini_adamw"}:
                continue
        with pytest.raises(ValueError, match=type(second).__name__) as caught:
            second.load_state_dict(state)
        assert type(first).__name__ in str(caught.value)
        assert second.state_dict()["param_groups"] == before["param_groups"]


def test_other_rules_of_the_same_projection() -> None:
    state = made("galore_adamw_8bit").state_dict()
    with pytest.raises(ValueError, match="is of GaLoreAdamW8bit, and this optimizer is GaLoreA"):
        made("galore_adamw").load_state_dict(state)


def test_options_that_make_the_method_within_one_class() -> None:
    def galore(residual: str) -> GaLoreAdamW:
        return GaLoreAdamW(param_groups(tiny_model(), rank=4), residual=residual)

    with pytest.raises(ValueError, match="saved residual='dropped', here residual='norm_scaled'"):
        galore("norm_scaled").load_state_dict(galore("dropped").state_dict())
    galore("norm_scaled").load_state_dict(galore("norm_scaled").state_dict())


def test_a_group_that_was_not_projected() -> None:
    params = [nn.Parameter(torch.ones(8, 6))]
    plain = GaLoreAdamW([{"params": params, "rank": None}, {"params": []}])
    projected = GaLoreAdamW([{"params": params, "rank": 4}, {"params": []}])
    with pytest.raises(ValueError, match="saved rank=None, here rank=4"):
        projected.load_state_dict(plain.state_dict())


def test_rank_and_gap_are_as_saved_with_a_warning() -> None:
    model = tiny_model()
    first = made("fira_adamw", model, rank=3)
    set_gradients(model, 0)
    first.step()
    second = made("fira_adamw", tiny_model(), update_proj_gap=5)
    with pytest.warns(UserWarning, match="rank=3 .here rank=4., update_proj_gap=3 .here") as seen:
        second.load_state_dict(first.state_dict())
    assert seen[0].filename == __file__
    assert second.param_groups[0]["rank"] == 3
    assert second.param_groups[0]["update_proj_gap"] == 3


def test_equal_options_load_without_a_word() -> None:
    class Own(FiraAdamW):
        """A user's subclass goes on from its base class's state."""

    state = made("fira_adamw").state_dict()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        made("fira_adamw").load_state_dict(state)
        groups = param_groups(tiny_model(), rank=4, update_proj_gap=3)
        own = Own(groups)
        own.load_state_dict(state)
    assert all("method" not in group for group in own.param_groups)
