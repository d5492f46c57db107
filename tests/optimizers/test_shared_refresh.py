"""Refits shared among processes: equal to the bit, a part each, and none ever waits in vain."""

from __future__ import annotations

import copy
import math
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from forked import run
from representative import with_representative
from support import matrix
from torch import Tensor, nn

from lowrank.optimizers import FrugalAdamW, GaLoreAdamW, LowRankOptimizer, build
from lowrank.optimizers.engine import shared_refresh

#: Methods and options whose bases are sent.
CASES: dict[str, tuple[str, dict[str, Any], torch.dtype]] = {
    "eigh": ("galore_adamw", {}, torch.float32),
    "both sides": ("galore_adamw", {"proj_type": "full"}, torch.float32),
    "randomized": ("galore_adamw", {"refresh": "randomized"}, torch.bfloat16),
    "staggered": ("fira_adamw", {"stagger": True}, torch.float32),
    "rotated": ("galore_adamw", {"moments": "rotate", "basis": "int8"}, torch.float32),
    "lazy": (
        "qgalore_adamw_8bit",
        {"weight_bits": None, "queue_size": 2, "cos_threshold": -1.0},
        torch.bfloat16,
    ),
    "coap": ("coap_adamw", {"reproject_factor": 2}, torch.float32),
    "heads": ("galore_plus_adamw", {"heads": 4}, torch.float32),
    "online": ("online_subspace_adamw", {}, torch.float32),
}
#: State entries that bases and schedules own.
BASES = ("basis", "leading", "similarit", "gap", "refreshed_at")


class Layers(nn.Module):
    """Seven matrices of three shapes, and a plain one."""

    def __init__(self) -> None:
        super().__init__()
        self.attn = nn.ModuleList(
            nn.ModuleDict(
                {
                    "q_proj": nn.Linear(24, 24, bias=False),
                    "k_proj": nn.Linear(24, 16, bias=False),
                }
            )
            for _ in range(3)
        )
        self.mlp = nn.Linear(24, 40, bias=False)
        self.head = nn.Linear(40, 8)


def make(case: str, gap: int = 2) -> tuple[Layers, LowRankOptimizer]:
    name, options, dtype = CASES[case]
    torch.manual_seed(0)
    model = Layers().to(dtype)
    made = build(name, model, lr=1e-2, rank=4, update_proj_gap=gap, seed=3, **options)
    return model, made


def set_gradients(model: nn.Module, step: int, ulp: bool = False) -> None:
    """The same on all processes, but for a unit in the last place of one entry of each."""
    for index, param in enumerate(model.parameters()):
        shape = (param.shape[0], param.numel() // param.shape[0])
        grad = 1e-2 * (matrix(*shape, index) + matrix(*shape, 50 * step + index + 99))
        param.grad = grad.view(param.shape).to(param.dtype)
        if ulp:
            entry = param.grad.view(-1)[:1]
            entry.copy_(torch.nextafter(entry, torch.ones_like(entry)))


def basis_entries(made: LowRankOptimizer) -> list[Any]:
    return [
        (key, value)
        for state in made.state.values()
        for key, value in sorted(state.items())
        if key.startswith(BASES) and not key.startswith("basis_exp_avg")
    ]


def same(first: Any, second: Any) -> bool:
    return all(
        a[0] == b[0] and (torch.equal(a[1], b[1]) if isinstance(a[1], Tensor) else a[1] == b[1])
        for a, b in zip(first, second, strict=True)
    )


def projected_plans(made: LowRankOptimizer) -> list[Any]:
    plans = [made._plans[id(group)] for group in made.param_groups]
    return [plan for plan in plans if plan.core.projection is not None]


class Counts:
    """Counts fits and what is sent while it lasts."""

    def __init__(self, made: LowRankOptimizer) -> None:
        self.fits = self.sent = self.agreed = 0
        kinds = {type(plan.core.projection.projector) for plan in projected_plans(made)}
        self.projectors = [(kind, kind.fit) for kind in kinds]
        self.saved = dist.broadcast, dist.all_reduce

    def __enter__(self) -> Counts:
        broadcast, all_reduce = self.saved

        def counted(fit: Any) -> Any:
            def spy(projector: Any, params: Any) -> Any:
                self.fits += len(params)
                return fit(projector, params)

            return spy

        def sent(tensor: Tensor, *args: Any, **kwargs: Any) -> Any:
            self.sent += tensor.nbytes
            return broadcast(tensor, *args, **kwargs)

        def agreed(*args: Any, **kwargs: Any) -> Any:
            self.agreed += 1
            return all_reduce(*args, **kwargs)

        dist.broadcast, dist.all_reduce = sent, agreed
        for kind, fit in self.projectors:
            kind.fit = counted(fit)
        return self

    def __exit__(self, *_: Any) -> None:
        dist.broadcast, dist.all_reduce = self.saved
        for kind, fit in self.projectors:
            kind.fit = fit


def stored_bytes(made: LowRankOptimizer) -> int:
    """Bytes of all bases by formula, and of the vectors that a lazy schedule reads."""
    total = 0
    for plan in projected_plans(made):
        projection = plan.core.projection
        for param, geometry in zip(plan.params, plan.geometries, strict=True):
            shapes = [*geometry.basis_shapes.values()]
            for shape in shapes:
                total += projection.projector.storage.state_bytes(shape, param.element_size())
            total += 4 * shapes[0][0] * projection.schedule.COLUMNS_READ
    return total


# In each process


def check_cases(rank: int, world: int) -> None:
    for case in CASES:
        bases = []
        for shared in (False, True):
            model, made = make(case)
            if shared:
                made.share_refreshes()
            with Counts(made) as counts:
                for step in range(6):
                    set_gradients(model, step, ulp=rank == world - 1)
                    made.step()
            everyone: list[Any] = [None] * world
            dist.all_gather_object(everyone, basis_entries(made))
            bases.append(all(same(everyone[0], other) for other in everyone[1:]))
            sizes = [len(plan.params) for plan in projected_plans(made)]
            assert sum(sizes) == 7
            refreshes = 1 if case == "online" else 3
            if shared and case not in ("staggered", "lazy"):
                part = sum(len(range(rank, size, world)) for size in sizes)
                assert counts.fits == refreshes * part, case
                assert counts.sent == refreshes * stored_bytes(made), case
            elif shared and case == "lazy":  # gaps that grew, equally on all processes
                assert counts.sent % stored_bytes(made) == 0
            elif not shared:
                assert counts.fits >= 7, case
                assert counts.sent == 0
        if case != "online":
            assert bases[1], case
        # What sharing is for: without it the last bits part (where a basis isn't rounded coarsely).
        if case in ("eigh", "both sides", "coap"):
            assert not bases[0], case


def check_equals_one_process(rank: int, world: int) -> None:
    """With equal gradients sharing changes nothing, moments and lazy gaps included."""
    for case in CASES:
        results = []
        for shared in (False, True):
            model, made = make(case)
            if shared:
                made.share_refreshes()
            for step in range(6):
                set_gradients(model, step)
                made.step()
            states = [sorted(state.items()) for state in made.state.values()]
            results.append((list(model.parameters()), [e for state in states for e in state]))
        assert all(map(torch.equal, *(params for params, _ in results))), case
        assert same(results[0][1], results[1][1]), case


def check_gradients_that_differ(rank: int, world: int) -> None:
    """None, zero and non-finite ones on one process: no one waits, and all keep the same bases."""
    for kind in ("none", "nan", "zero"):
        model, made = make("eigh")
        made.share_refreshes()
        target = model.attn[0]["q_proj"].weight
        for step in range(5):
            set_gradients(model, step)
            # Every process in turn is the one without, the owner of the matrix among them.
            if step < world and rank == step:
                if kind == "none":
                    target.grad = None
                else:
                    target.grad.fill_(math.nan if kind == "nan" else 0.0)
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                made.step()
            said = [str(w.message) for w in caught if "on another process" in str(w.message)]
            if kind == "none" and step == 0:
                assert bool(said) == (rank != 0)
                assert made.state[target]["refreshed_at"] == -1
            everyone: list[Any] = [None] * world
            dist.all_gather_object(everyone, made.state[target]["basis"])
            assert all(torch.equal(everyone[0], other) for other in everyone)
        assert bool(made.state[target]["basis"].any())


def check_errors(rank: int, world: int) -> None:
    model, made = make("eigh")
    made.share_refreshes()
    set_gradients(model, 0)
    projector = made._plans[id(made.param_groups[0])].core.projection.projector
    plain = type(projector).fit

    def failing(*args: Any) -> Any:
        raise MemoryError("no memory for the fit")

    if rank == 1:
        type(projector).fit = failing
    with pytest.raises(RuntimeError, match="failed on process 1") as raised:
        made.step()
    assert isinstance(raised.value.__cause__, MemoryError if rank == 1 else type(None))
    type(projector).fit = plain

    made.step()  # and goes on
    if rank == 1:
        made._shared.count_step()
    made.step()  # a quiet one
    with pytest.raises(RuntimeError, match="took 4 to 5 steps"):
        made.step()

    model, made = make("eigh", gap=3 if rank == 1 else 2)
    made.share_refreshes()
    set_gradients(model, 0)
    with pytest.raises(ValueError, match="groups of different options or parameters"):
        made.step()


def check_quiet_steps(rank: int, world: int) -> None:
    """Nothing is said in steps between refreshes."""
    model, made = make("eigh", gap=5)
    made.share_refreshes()
    with Counts(made) as counts:
        for step in range(20):
            set_gradients(model, step)
            made.step()
            # options and matrices are compared once; then three small tables a refresh
            assert counts.agreed == 1 + 3 * (1 + step // 5)
        made.param_groups[0]["update_proj_gap"] = 2
        made.step()
    assert counts.agreed > 13
    assert made.state[made.param_groups[0]["params"][0]]["refreshed_at"] == 20


def check_part_of_the_processes(rank: int, world: int) -> None:
    """Two of three share; the third trains something else meanwhile."""
    pair = dist.new_group([0, 2])
    if rank == 1:
        return
    model, made = make("eigh")
    made.share_refreshes(pair)
    for step in range(4):
        set_gradients(model, step, ulp=rank == 2)
        made.step()
    everyone: list[Any] = [None] * 2
    dist.all_gather_object(everyone, basis_entries(made), group=pair)
    assert same(*everyone)


def each(rank: int, world: int, folder: Path, checks: list[Callable[[int, int], None]]) -> None:
    for check in checks:
        check(rank, world)
        dist.barrier()


@pytest.mark.parametrize("world", with_representative((2, 3), (3,)))
def test_several_processes(world: int, tmp_path: Path) -> None:
    checks = [
        check_cases,
        check_equals_one_process,
        check_gradients_that_differ,
        check_errors,
        check_quiet_steps,
    ]
    if world == 3:
        checks.append(check_part_of_the_processes)
    run(each, world, tmp_path, checks)


# One process


@pytest.fixture
def alone() -> Iterator[None]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.usefixtures("alone")
@pytest.mark.parametrize("check", [check_equals_one_process, check_quiet_steps])
def test_alone(check: Callable[[int, int], None]) -> None:
    check(0, 1)


@pytest.mark.usefixtures("alone")
def test_copies_share_nothing() -> None:
    _, made = make("eigh")
    made.share_refreshes()
    assert copy.deepcopy(made)._shared is None


@pytest.mark.usefixtures("alone")
def test_random_bases_are_not_sent(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: Any, **kwargs: Any) -> Any:
        raise AssertionError

    weight = nn.Parameter(torch.zeros(8, 12))
    for kind in ("coordinate", "random"):
        made = FrugalAdamW([{"params": [weight], "rank": 2, "projector": kind}], lr=1e-2)
        made.share_refreshes()
        monkeypatch.setattr(dist, "all_reduce", fail)
        weight.grad = matrix(8, 12, 1).float()
        made.step()
        monkeypatch.undo()


@pytest.mark.usefixtures("alone")
def test_a_gradient_that_comes_late_is_fitted_at_once() -> None:
    pair = [nn.Parameter(torch.zeros(8, 12)) for _ in range(2)]
    made = GaLoreAdamW([{"params": pair, "rank": 2, "update_proj_gap": 50}], lr=1e-2)
    made.share_refreshes()
    for step in range(6):
        pair[0].grad = matrix(8, 12, step).float()
        if step >= 3:
            pair[1].grad = matrix(8, 12, step).float()
        made.step()
        assert made.state[pair[1]]["refreshed_at"] == (0 if step >= 3 else -1)
        assert bool(pair[1].any()) == (step >= 3)


def test_it_needs_processes() -> None:
    _, made = make("eigh")
    with pytest.raises(RuntimeError, match=r"without torch\.distributed"):
        made.share_refreshes()
    assert shared_refresh.LONGEST_QUIET >= 1
