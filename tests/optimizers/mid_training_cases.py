"""The changes in the middle of training that `mid_training.py` judges, for each method."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from mid_training import Case, build, row_of
from torch import Tensor

from lowrank.optimizers import LowRankOptimizer

NAN = float("nan")
FLAG = (True, False, "yes")
SWITCH = (None, True, False, "yes")
#: Values to try, right and wrong ones, by option.
VALUES: dict[str, tuple[Any, ...]] = {
    "rank": (2, 8, 1000, None, 0, 2.5, "4"),
    "rank_ratio_matrix": (2.0, 0.5, "2"),
    "update_proj_gap": (2, 5, 0, 2.5, None, "3"),
    "scale": (1.0, 0.5, NAN, None, "1"),
    "proj_type": ("std", "reverse_std", "left", "right", "full", "sideways", None),
    "projector": (
        *("singular", "online", "coap", "random", "coordinate", "cross_head", "dct", "switched"),
        *("block_power", "none", None),
    ),
    "refresh": ("svd", "eigh", "randomized", "warm", "qr", None),
    "schedule": ("every", "lazy", "once", "never", None),
    "basis": (None, "float32", "bfloat16", "int8", "int4", "int3", 4),
    "residual": (
        *("dropped", "norm_scaled", "scaled", "sign", "row_normalised", "column_scaled"),
        *("error_feedback", "kept", None),
    ),
    "moments": ("keep", "reset", "restore", "rotate", "forget", None),
    "projection_dtype": ("bfloat16", "float32", "int8", torch.bfloat16),
    "seed": (5, -1, 1.5, None),
    "betas": ((0.5, 0.9), (0.9,), (0.9, 1.0), (0.9, 0.9, 0.9), None, 0.9),
    "lr": (1e-4, torch.tensor(1e-3), torch.tensor([1e-3, 1e-3]), -1.0, NAN, None, "0.1"),
    "weight_decay": (0.1, -0.1, NAN, None, "0.1"),
    "maximize": FLAG,
    "capturable": FLAG,
    "compile": FLAG,
    "skip_nonfinite": FLAG,
    "stagger": FLAG,
    "stochastic_rounding": FLAG,
    "differentiable": FLAG,
    "foreach": SWITCH,
    "fused": SWITCH,
    "quantizer": ("native", "bitsandbytes", "nearest"),
    "use_muon": FLAG,
    "online_optimizer": ("adamw", "sgd", "lion", "adam8bit", "rmsprop", None),
    "inactive_update": ("sign", "sgd", "adam", None),
    "scale_type": ("channel", "tensor", "row", None),
    "heads": (4, 3, 0, "2", None),
    "fit_on": ("one", "all", "none"),
    "adjust_lr": ("match_rms_adamw", "original", "never", None),
    "sign": ("weight", "subspace", "both", None),
    "reset": ("zero", "random", "magnitude", "none", "some", None),
    "sampling": ("mixed", "singular", "uniform", "greedy", None),
    "quant_format": ("asymmetric", "symmetric", "nf4", "odd", None),
    "distribution": ("gaussian", "orthonormal", "uniform", None),
    "switch_interval": (1e3, 5.0, -1.0, NAN, None, "10"),
    "freeze_steps": (0, -1, 2.5, None, "3"),
    "min_8bit_size": (1 << 20, 0, -1, 2.5, None, "x"),
}
#: In the group of plain matrices, where they may be new.
PLAIN: dict[str, tuple[Any, ...]] = {
    "rank": (2, "4"),
    "betas": ((0.5, 0.9), (0.9,), None),
    "eps": (1e-4, -1.0, None),
    "lr": (1e-4, NAN, None),
    "weight_decay": (0.1, "0.1"),
    "foreach": (True, False),
}
PAIRS: tuple[dict[str, Any], ...] = (
    {"foreach": True, "fused": True},
    {"rank": 2, "moments": "reset"},
    {"rank": 2, "moments": "restore"},
    {"rank": 6, "moments": "rotate"},
    {"rank": 2, "proj_type": "reverse_std"},
    {"rank": 2, "foreach": True},
    {"rank": 6, "fused": False},
    {"capturable": True, "moments": "reset"},
    {"rank": None, "rank_ratio_matrix": 8.0},
)


def values(key: str, current: Any) -> tuple[Any, ...]:
    """Values to try for an option: those of the table, or some that its type suggests."""
    if key in VALUES:
        return VALUES[key]
    if isinstance(current, bool):
        return FLAG
    if isinstance(current, int):
        return (current + 2, max(current - 1, 1), -1, 2.5, None, "3")
    if isinstance(current, float):
        return (current * 0.5, current + 1.0, -1.0, NAN, None, "0.1")
    if isinstance(current, tuple | list):
        return (tuple(0.5 * x for x in current), tuple(current[:1]), 0.1, None, "x")
    if isinstance(current, str):
        return ("unheard-of", None, 3)
    return (0.5, 2, -1.0, NAN, "x")


def _option(index: int, changed: dict[str, Any]) -> Case:
    def edit(optimizer: LowRankOptimizer) -> None:
        optimizer.param_groups[index].update(changed)

    said = ", ".join(f"{key}={value!r}" for key, value in changed.items())
    where = "" if index == 0 else "plain "
    return Case(where + said, edit, undo=tuple(changed), group=index)


def _same(first: Any, second: Any) -> bool:
    if isinstance(first, Tensor) or isinstance(second, Tensor):
        return first is second
    return type(first) is type(second) and bool(first == second)


def option_cases(name: str) -> Iterator[Case]:
    """Each option of the first group in turn, some of the plain group, and some pairs."""
    row = row_of(name)
    _, optimizer = build(row)
    group = optimizer.param_groups[0]
    for key, current in group.items():
        if key in ("params", "param_names", "factors"):
            continue
        for value in values(key, current):
            if not _same(value, current):
                yield _option(0, {key: value})
    for key, tried in PLAIN.items():
        if key in optimizer.param_groups[1] or (row.projects and key == "rank"):
            for value in tried:
                yield _option(1, {key: value})
    for changed in PAIRS:
        if all(key in group for key in changed):
            yield _option(0, changed)
    for dtype in (torch.bfloat16, torch.float64):
        yield Case(f"weights become {dtype}", _cast(dtype))


def _cast(dtype: torch.dtype) -> Callable[[LowRankOptimizer], None]:
    def edit(optimizer: LowRankOptimizer) -> None:
        for group in optimizer.param_groups:
            for param in group["params"]:
                param.grad = None
                param.data = param.data.to(dtype)

    return edit


# Saved states


def _entry(position: int, key: str, change: Callable[[Any], Any]) -> Callable[[Any], None]:
    def edit(saved: dict[str, Any]) -> None:
        state = saved["state"][position]
        state[key] = change(state[key])

    return edit


def _longer(value: Tensor) -> Tensor:
    return torch.cat([value, value[:1]]) if value.dim() else value.expand(2).clone()


def _shorter(value: Tensor) -> Tensor:
    return value[:-1].clone() if value.dim() else value.reshape(1)


def _entry_cases(position: int, key: str, value: Any) -> Iterator[Case]:
    def case(what: str, change: Callable[[Any], Any], same: bool = False) -> Case:
        label = f"state[{position}].{key} {what}"
        return Case(label, _entry(position, key, change), loads=True, same=same)

    yield case("is text", lambda v: "4")
    if not isinstance(value, Tensor):
        yield case("is None", lambda v: None)
        yield case("is a float", float, same=True)
        yield case("is half more", lambda v: v + 0.5)
        yield case("is a tensor", lambda v: torch.tensor(v), same=True)
        yield case("is -7", lambda v: -7)
        yield case("is huge", lambda v: 1 << 70)
        return
    yield case("is longer", _longer)
    yield case("is shorter", _shorter)
    if value.dim() == 2 and value.shape[0] != value.shape[1]:
        yield case("is transposed", lambda v: v.mT.contiguous())
        yield case("is not contiguous", lambda v: v.mT.contiguous().mT, same=True)
    if key == "step":
        yield case("is None", lambda v: None)
        yield case("is an integer", int, same=True)
        yield case("is a float", float, same=True)
        yield case("is negative", lambda v: v - 100)
        yield case("is not a number", lambda v: v * NAN)
    for dtype in (torch.float64, torch.bfloat16, torch.int64):
        if dtype is torch.int64 and value.is_floating_point() and key != "step":
            continue
        kept = dtype is not torch.bfloat16
        yield case(f"is {dtype}", lambda v, to=dtype: v.to(to), same=kept)


def _of(label: str, edit: Callable[[Any], Any], same: bool = False) -> Case:
    def act(saved: dict[str, Any]) -> None:
        edit(saved)

    return Case(label, act, loads=True, same=same)


def load_cases(name: str) -> Iterator[Case]:
    """Each entry of a projected and of a plain parameter's saved state, and the whole's parts."""
    _, optimizer = build(row_of(name))
    saved = optimizer.state_dict()
    plain = saved["param_groups"][1]["params"][0]
    for position in (0, plain):
        for key, value in saved["state"][position].items():
            if position == 0 or key in ("step", "exp_avg"):
                yield from _entry_cases(position, key, value)
            drop = f"state[{position}].{key} is missing"
            yield _of(drop, lambda s, p=position, k=key: s["state"][p].pop(k))
        more = f"state[{position}] has an unknown entry"
        yield _of(more, lambda s, p=position: s["state"][p].update(moment=torch.ones(2)))
        yield _of(f"state[{position}] is missing", lambda s, p=position: s["state"].pop(p))
        yield _of(f"state[{position}] is a list", lambda s, p=position: s["state"].update({p: []}))
    yield _of("an unknown parameter's state", lambda s: s["state"].update({999: {}}), same=True)
    yield _of("no state", lambda s: s.pop("state"))
    yield _of("no groups", lambda s: s.pop("param_groups"))
    yield _of("a group less", lambda s: s["param_groups"].pop())
    yield _of("a parameter less", lambda s: s["param_groups"][0]["params"].pop())
    yield _of("a group without parameters", lambda s: s["param_groups"][0].pop("params"))
    yield _of("parameters in another order", lambda s: s["param_groups"][0]["params"].reverse())
    group = saved["param_groups"][0]
    for key in group:
        if key in ("params", "param_names"):
            continue
        yield _of(f"a group without {key}", lambda s, k=key: s["param_groups"][0].pop(k))
        yield _of(
            f"a group with {key}='unheard-of'",
            lambda s, k=key: s["param_groups"][0].update({k: "unheard-of"}),
        )
    for changed in ({"rank": 2}, {"rank": None}, {"proj_type": "reverse_std"}, {"basis": "int8"}):
        (key,) = changed
        if key in group:
            label = f"a group with {key}={changed[key]!r}"
            yield _of(label, lambda s, c=changed: s["param_groups"][0].update(c))


QUICK_OPTIONS = ("rank=2", "rank=None", "update_proj_gap=2", "scale=1.0", "proj_type='full'")
QUICK_OPTIONS += ("betas=(0.9,)", "lr=nan", "seed=5")
QUICK_LOADS = ("state[0].step is an integer", "state[0].exp_avg is longer")
QUICK_LOADS += ("state[0].exp_avg is torch.float64", "state[0] has an unknown entry")


def cases(name: str, quick: bool) -> list[Case]:
    """All cases of a method, or a few of each kind."""
    found = [*option_cases(name), *load_cases(name)]
    chosen = (*QUICK_OPTIONS, *QUICK_LOADS)
    return [case for case in found if case.label in chosen] if quick else found
