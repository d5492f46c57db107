"""DDP that sends projected gradients: weights of plain DDP, bytes by formula, and no wrong use."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable, Iterator
from pathlib import Path

import low_rank_hook_cases as cases
import low_rank_state_cases as state_cases
import pytest
import torch
import torch.distributed as dist
from forked import run
from low_rank_runs import backward, make
from representative import with_representative
from support import tiny_model
from torch.nn.parallel import DistributedDataParallel

from lowrank.optimizers import GaLoreAdamW, available, param_groups, register_low_rank_hook
from lowrank.optimizers.engine.low_rank_comparison import EACH
from lowrank.optimizers.engine.low_rank_gradients import _inverse, places


def each(rank: int, world: int, folder: Path, checks: list[Callable[[int, int], None]]) -> None:
    for check in checks:
        check(rank, world)
        dist.barrier()


@pytest.mark.parametrize("world", with_representative((2, 3, 4), (2,)))
def test_several_processes(world: int, tmp_path: Path) -> None:
    """States and changes don't depend on the number of processes: not again on four."""
    checks = cases.MORE.get(world, cases.ALL)
    run(each, world, tmp_path, [*checks, *(state_cases.ALL if world < 4 else [])])


# One process


@pytest.fixture
def single() -> Iterator[None]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


EXACT = {
    *("coap_adafactor", "coap_adafactor_8bit", "coap_adamw", "coap_adamw_8bit"),
    *("galore_adafactor", "galore_adamw", "galore_adamw_8bit", "galore_muon"),
    *("galore_plus_adamw", "qgalore_adamw_8bit"),
}


@pytest.mark.usefixtures("single")
@pytest.mark.parametrize("name", available())
def test_exact_methods_are_accepted_and_others_refused(name: str) -> None:
    model, made = make(name)
    wrapped = DistributedDataParallel(model)
    if name in EXACT:
        hook = register_low_rank_hook(wrapped, made)
        assert hook.traffic().saved > 0.25
        assert made._shared is not None
        return
    with pytest.raises(ValueError, match="has no matrix whose projected gradient") as raised:
        register_low_rank_hook(wrapped, made)
    reasons = {
        "fira_adamw": "residual='norm_scaled' uses the gradient outside",
        "apollo_adamw": "residual='scaled' uses the gradient outside",
        "frugal_adamw": "residual='sign' uses the gradient outside",
        "online_subspace_adamw": "projector='online' moves the basis",
        "adamw": "it is not projected",
    }
    assert reasons.get(name, "") in str(raised.value)
    assert not wrapped._comm_hooks
    assert made._shared is None


@pytest.mark.usefixtures("single")
def test_a_rank_that_saves_nothing_is_refused() -> None:
    model, made = make("galore_adamw", rank=16)
    with pytest.raises(ValueError, match="its projection has 256 entries, it has 256"):
        register_low_rank_hook(DistributedDataParallel(model), made)


@pytest.mark.usefixtures("single")
def test_wrong_models_and_optimizers() -> None:
    model, made = make("galore_adamw")
    wrapped = DistributedDataParallel(model)
    with pytest.raises(TypeError, match="TinyBlock: accepted is a DistributedDataParallel"):
        register_low_rank_hook(model, made)
    with pytest.raises(TypeError, match="SGD: accepted is an optimizer of lowrank"):
        register_low_rank_hook(wrapped, torch.optim.SGD(model.parameters()))
    with pytest.raises(
        ValueError, match=r"q_proj\.weight is projected and not among the gradients"
    ):
        register_low_rank_hook(wrapped, make("galore_adamw")[1])
    capturable = make("galore_adamw", capturable=True)[1]
    with pytest.raises(ValueError, match="capturable=True with a low-rank hook: accepted is False"):
        register_low_rank_hook(wrapped, capturable)
    register_low_rank_hook(wrapped, made)
    with pytest.raises(ValueError, match="the communication hook register_low_rank_hook already"):
        register_low_rank_hook(wrapped, made)
    builtin = DistributedDataParallel(model)
    builtin._register_builtin_comm_hook(dist.BuiltinCommHookType.ALLREDUCE)
    with pytest.raises(ValueError, match="a second communication hook"):
        register_low_rank_hook(builtin, made)


@pytest.mark.usefixtures("single")
def test_matrices_that_the_model_does_not_synchronise() -> None:
    model, made = make("galore_adamw")
    model._ddp_params_and_buffers_to_ignore = ["mlp.up_proj.weight"]
    with pytest.raises(ValueError, match=r"mlp\.up_proj\.weight is projected and not among"):
        register_low_rank_hook(DistributedDataParallel(model), made)
    model, made = make("galore_adamw")
    model.mlp["up_proj"].weight.requires_grad_(False)
    hook = register_low_rank_hook(DistributedDataParallel(model), made)
    assert hook.traffic().whole == 4 * sum(p.numel() for p in model.parameters() if p.requires_grad)


@pytest.mark.usefixtures("single")
def test_another_optimizer_takes_the_steps() -> None:
    model, made = make("galore_adamw")
    wrapped = DistributedDataParallel(model)
    register_low_rank_hook(wrapped, made)
    for step in range(3):
        backward(wrapped, step, 0, 1, 1)
        if step < 2:  # not the last one, as when a scaler skips it
            made.step()
        made.zero_grad()
    other = GaLoreAdamW(param_groups(model, rank=4), lr=1e-3)
    backward(wrapped, 3, 0, 1, 1)
    other.step()
    with pytest.warns(UserWarning, match="without a step of the GaLoreAdamW by whose projections"):
        backward(wrapped, 4, 0, 1, 1)


@pytest.mark.usefixtures("single")
def test_what_the_hook_says() -> None:
    model = tiny_model()
    matrices = [model.mlp["up_proj"].weight, model.self_attn["q_proj"].weight]
    others = [p for p in model.parameters() if all(p is not m for m in matrices)]
    groups = [
        {"params": matrices[:1], "rank": 4},
        {"params": matrices[1:], "rank": 4, "residual": "norm_scaled"},
        {"params": others},
    ]
    made = GaLoreAdamW(groups, lr=1e-3)
    hook = register_low_rank_hook(DistributedDataParallel(model), made)
    whole = hook.whole()
    assert "mlp.up_proj.weight" not in whole
    assert "residual='norm_scaled'" in whole["self_attn.q_proj.weight"]
    assert whole["norm.bias"] == "it is not projected"
    traffic, entries = hook.traffic(), sum(p.numel() for p in model.parameters())
    between = 4 * (entries - 16 * 24 + 4 * 24)
    assert traffic == (4 * entries, between + EACH, 4 * entries + EACH)
    assert traffic.saved == 1 - traffic.between / traffic.whole
    assert repr(hook) == (
        f"LowRankHook(1 of 8 gradients travel as projections: {traffic.between} bytes between "
        f"refreshes instead of {traffic.whole}, {traffic.saved:.0%} saved)"
    )


@pytest.mark.usefixtures("single")
def test_copies_of_model_and_optimizer() -> None:
    model, made = make("galore_adamw")
    wrapped = DistributedDataParallel(model)
    register_low_rank_hook(wrapped, made)
    assert copy.deepcopy(made)._shared is None
    hook = wrapped._comm_hooks[0][1]
    assert copy.deepcopy(hook) is hook
    with pytest.raises(TypeError, match="can't be pickled"):
        pickle.dumps(hook)


@pytest.mark.usefixtures("single")
def test_groups_added_later_are_projected_too() -> None:
    model = tiny_model()
    first, *rest = param_groups(model, rank=4, update_proj_gap=50)
    later = {key: first[key][1:] for key in ("params", "param_names")}
    made = GaLoreAdamW([{**first, **{k: first[k][:1] for k in later}}, *rest], lr=1e-3)
    wrapped = DistributedDataParallel(model)
    hook = register_low_rank_hook(wrapped, made)
    before = hook.traffic().between
    for step in range(6):
        if step == 3:
            made.add_param_group({**first, **later})
        backward(wrapped, step, 0, 1, 1)
        made.step()
        made.zero_grad()
    assert hook.traffic().next == hook.traffic().between < before


def test_inverse_of_a_gram_matrix() -> None:
    """To fp32's precision, though it is shifted so that no factorisation fails."""
    torch.manual_seed(0)
    basis = torch.linalg.qr(torch.randn(512, 256)).Q + 2e-3 * torch.randn(512, 256)
    gram = basis.mT @ basis
    exact = torch.linalg.inv(gram.double())
    assert float((_inverse(gram) - exact).abs().max()) < 5e-6


def test_a_basis_without_full_rank() -> None:
    model, made = make("coap_adamw")
    weight = model.mlp["up_proj"].weight
    for param in model.parameters():
        param.grad = torch.randn_like(param)
    made.step()
    basis = made.state[weight]["basis"]
    basis[:, 1] = basis[:, 0]
    place, grad = places(made)[id(weight)], torch.randn_like(weight)
    projected = place.project(grad)
    filled = torch.full_like(weight, torch.nan)
    place.expand(projected.flatten(), filled)
    torch.testing.assert_close(place.project(filled), projected, rtol=0.0, atol=3e-2)
    span = torch.linalg.svd(basis).U[:, :3]
    torch.testing.assert_close(filled, grad @ span @ span.mT, rtol=0.0, atol=3e-2)
