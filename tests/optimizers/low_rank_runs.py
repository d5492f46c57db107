"""Runs of one process, and of several under DDP that sends projected gradients, and their bytes."""

from __future__ import annotations

import contextlib
from typing import Any

import torch
import torch.distributed as dist
from support import tiny_model, weights
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from lowrank.optimizers import LowRankOptimizer, available, build, register_low_rank_hook
from lowrank.optimizers.engine.geometry import Side
from lowrank.optimizers.engine.low_rank_comparison import CHANGED, EACH
from lowrank.optimizers.engine.low_rank_gradients import Place, examine

GAP = 3
#: What a method needs here besides rank and gap.
OPTIONS: dict[str, dict[str, Any]] = {
    "coap_adafactor": {"beta1": 0.9, "reproject_factor": 2},
    "coap_adafactor_8bit": {"min_8bit_size": 0, "reproject_factor": 2},
    "coap_adamw": {"reproject_factor": 3, "normalize_gradient": True},
    "coap_adamw_8bit": {"min_8bit_size": 0, "reproject_factor": 2},
    "flora_adafactor": {"update_proj_gap": 40},
    "galore_adamw_8bit": {"min_8bit_size": 0},
    "galore_plus_adamw": {"heads": 2},
    "qgalore_adamw_8bit": {"min_8bit_size": 0, "weight_bits": None, "queue_size": 2},
}
#: Further options, each with a method.
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "both sides": ("galore_adamw", {"proj_type": "full"}),
    "staggered": ("galore_adamw", {"stagger": True, "update_proj_gap": 6}),
    "rotated": ("galore_adamw", {"moments": "rotate", "basis": "int8"}),
    "reset": ("galore_adamw", {"moments": "reset", "maximize": False}),
    "bf16 basis": ("galore_adamw", {"basis": "bfloat16"}),
    "coordinates": ("galore_adamw", {"projector": "coordinate"}),
    "gaussian": ("galore_adamw", {"projector": "random"}),
    "int4 heads": ("galore_plus_adamw", {"heads": 2, "basis": "int4"}),
    "sign": ("online_subspace_lion", {"projector": "singular", "schedule": "every"}),
}


def make(
    name: str, lr: float = 1e-3, dtype: torch.dtype = torch.float32, **options: Any
) -> tuple[nn.Module, LowRankOptimizer]:
    model = tiny_model(dtype=dtype)
    given = {"rank": 4, "update_proj_gap": GAP, **OPTIONS.get(name, {}), **options}
    return model, build(name, model, lr=lr, **given)


def exact_methods() -> list[str]:
    """The methods of which any gradient may travel as a projection."""
    return [
        name
        for name in available()
        if any(isinstance(found, int) for found in examine(make(name)[1]).values())
    ]


# A run, by one process or several


def batch(step: int, part: int) -> Tensor:
    generator = torch.Generator().manual_seed(10 * step + part)
    return torch.randint(0, 32, (12, 5), generator=generator)


def loss_of(model: nn.Module, tokens: Tensor) -> Tensor:
    logits = model(tokens[:, :-1])
    if logits.dtype == torch.bfloat16:
        logits = logits.float()
    return nn.functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())


def backward(model: nn.Module, step: int, rank: int, world: int, parts: int) -> None:
    """The gradient of the mean over all processes, in several parts."""
    for part in range(parts):
        own = batch(step, part).chunk(world)[rank]
        wrapped = isinstance(model, DistributedDataParallel) and part < parts - 1
        with model.no_sync() if wrapped else contextlib.nullcontext():
            (loss_of(model, own) / parts).backward()


def span(made: LowRankOptimizer, group: dict[str, Any], param: Tensor) -> tuple[Any, Any] | None:
    """Geometry and orthonormal bases of a matrix that the next step doesn't refit, else None."""
    plan = made._plans[id(group)]
    if (
        group.get("rank") is None
        or group["residual"] != "dropped"
        or group["projector"] == "online"
    ):
        return None
    state, position = made.state[param], [id(p) for p in plan.params].index(id(param))
    projected = [own for other in made.param_groups if other.get("rank") for own in other["params"]]
    count, index = len(projected), [id(own) for own in projected].index(id(param))
    gap = state.get("gap", group["update_proj_gap"])
    phase = index * gap // count if group["stagger"] else 0
    now, last = int(state["step"]), state["refreshed_at"]
    if last < 0 or (now + phase) // gap > (last + phase) // gap:
        return None
    place = Place(plan, position, index, now, state)
    bases = place.projector.bases(place._of(param.grad if param.grad is not None else param))
    wide = torch.float64 if param.dtype == torch.float64 else torch.float32
    return place.geometry, tuple(torch.linalg.qr(basis.to(wide)).Q for basis in bases)


def project_gradients(made: LowRankOptimizer) -> None:
    """What `.grad` is with the hook, by its definition: the orthogonal projection."""
    for group in made.param_groups:
        for param in group["params"]:
            found = span(made, group, param)
            if found is None:
                continue
            geometry, bases = found
            grad = param.grad.to(bases[0].dtype)
            if hasattr(geometry, "heads"):
                blocks = grad.view(geometry.heads, -1, grad.shape[1])
                grad = (bases[0] @ (bases[0].mT @ blocks)).flatten(0, 1)
            else:
                if geometry.side is not Side.RIGHT:
                    grad = bases[0] @ (bases[0].mT @ grad)
                if geometry.side is not Side.LEFT:
                    grad = grad @ bases[-1] @ bases[-1].mT
            param.grad.copy_(grad)


def alone(name: str, steps: int, parts: int, clip: float | None, **options: Any) -> list[Tensor]:
    """The weights of one process on all the data; with a clip by the projected norm."""
    model, made = make(name, **options)
    for step in range(steps):
        backward(model, step, 0, 1, parts)
        if clip is not None:
            project_gradients(made)
            nn.utils.clip_grad_norm_(model.parameters(), clip)
        made.step()
        made.zero_grad()
    return weights(model)


class Sent:
    """Records the bytes of all-reduces while it lasts."""

    def __init__(self) -> None:
        self.tensors: list[tuple[int, torch.dtype]] = []
        self.plain = dist.all_reduce

    @property
    def bytes(self) -> int:
        return sum(size for size, _ in self.tensors)

    def __enter__(self) -> Sent:
        def recorded(tensor: Tensor, *args: Any, **kwargs: Any) -> Any:
            self.tensors.append((tensor.nbytes, tensor.dtype))
            return self.plain(tensor, *args, **kwargs)

        dist.all_reduce = recorded
        return self

    def __exit__(self, *_: Any) -> None:
        dist.all_reduce = self.plain


def expected_bytes(made: LowRankOptimizer) -> int:
    """Of the next step: r max(m, n) entries of a projected m x n matrix that is not refitted."""
    total = 0
    for group in made.param_groups:
        for param in group["params"]:
            found, entries = span(made, group, param), param.numel()
            if found is not None:
                geometry, bases = found
                ranks = [basis.shape[1] for basis in bases]
                if len(ranks) == 2:
                    entries = ranks[0] * ranks[1]
                elif geometry.side is Side.LEFT:
                    entries = getattr(geometry, "heads", 1) * ranks[0] * param.shape[1]
                else:
                    entries = ranks[0] * param.shape[0]
                assert entries < param.numel()
            total += entries * param.element_size()
    return total


def together(
    name: str,
    steps: int,
    parts: int,
    clip: float | None,
    ddp: dict[str, Any] | None = None,
    hooked: bool = True,
    **options: Any,
) -> list[Tensor]:
    """The weights of several processes with the hook, the bytes of each step checked."""
    rank, world = dist.get_rank(), dist.get_world_size()
    model, made = make(name, **options)
    wrapped = DistributedDataParallel(model, **(ddp or {}))
    hook = register_low_rank_hook(wrapped, made) if hooked else None
    whole = sum(p.numel() * p.element_size() for p in model.parameters())
    compared, quiet = False, 0
    for step in range(steps):
        if hook is not None:
            expected = expected_bytes(made)
            if expected < whole and not compared:
                expected, compared = expected + CHANGED, True
            expected += EACH
            assert hook.traffic().next == expected, (name, step)
            assert hook.traffic().whole == whole
        with Sent() as sent:
            backward(wrapped, step, rank, world, parts)
        if hook is not None:
            assert sent.bytes == expected, (name, step, sent.tensors)
            quiet += sent.bytes == hook.traffic().between
        if clip is not None:
            nn.utils.clip_grad_norm_(model.parameters(), clip)
        made.step()
        made.zero_grad()
    if hook is not None:
        assert hook.traffic().between < 0.75 * whole
        assert quiet >= steps // 3, (name, quiet)
    return weights(model)


def same_on_all(own: list[Tensor]) -> None:
    everyone: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, own)
    for other in everyone[1:]:
        assert all(map(torch.equal, everyone[0], other))


def close(first: list[Tensor], second: list[Tensor], atol: float = 1e-5) -> None:
    start = weights(tiny_model(dtype=first[0].dtype))
    moved = max(float((a - b).abs().max()) for a, b in zip(first, start, strict=True))
    assert moved > 50 * atol  # or the comparison says nothing
    for a, b in zip(first, second, strict=True):
        torch.testing.assert_close(a, b, rtol=0.0, atol=atol)
