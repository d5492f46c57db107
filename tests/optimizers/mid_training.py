"""What a step and a load owe when an option or a saved state is changed in the middle of training.

`check(row, case)` says what is wrong, or nothing. A case must end in one of two ways:

- training goes on with finite weights, the change has an effect if it has one on a new optimizer,
  and the state has the entries, shapes and dtypes of a new optimizer's with these options, after
  the next refresh at the latest;
- `ValueError` or `TypeError` before anything is written, after which training goes on once the
  option is as before.

What a constructor refuses, a step or a load must refuse, too. Cases may kill the process where a
kernel gets shapes that don't fit, so `isolated.py` runs them.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from support import equal, set_gradients, tiny_model
from table import TABLE, Row, identifier
from torch import Tensor, nn

from lowrank.optimizers import LowRankOptimizer

#: Steps before a change, two of them with a refresh; after a change of options, and of a state,
#: with at least one.
BEFORE, AFTER, LOADED = 4, 5, 3
#: Further steps for an effect that roundings or a schedule hide at first.
LATER = 12
REFUSALS = (ValueError, TypeError)
#: Options that act when a basis is fitted, of which a schedule of "once" has none left.
FITTING = ("refresh", "seed", "rotate", "stagger", "fit_on", "schedule")
#: Options that steer how a result is computed, not which: no effect is needed.
MECHANICAL = ("foreach", "fused", "compile", "capturable", "skip_nonfinite")
#: Options that choose a strategy, and what a group has that its strategy did not bring.
SEAMS = ("projector", "schedule", "basis", "residual")
GIVEN = ("params", "param_names", "rank", "rank_ratio_matrix", "update_proj_gap", "scale")
GIVEN += ("proj_type", "factors", "use_muon")
#: A strategy's option that a class has a default for.
OWNED = ("scale_type",)
#: In these a step count is exact for as long as anyone trains.
COUNTING = (torch.float32, torch.float64, torch.int64)


@dataclass(frozen=True)
class Case:
    """One change.

    Attributes:
        label: says it in a table.
        edit: makes it, on the optimizer or on the state dict that is loaded.
        loads: whether a state dict is changed, rather than the optimizer's groups.
        same: the saved numbers stay (in another dtype, say), so that training that goes on must be
            close to what it would have been.
        undo: names of changed options, for the way back, and the group.
    """

    label: str
    edit: Callable[[Any], None]
    loads: bool = False
    same: bool = False
    undo: tuple[str, ...] = ()
    group: int = 0


def row_of(name: str) -> Row:
    return next(row for row in TABLE if identifier(row) == name)


def build(row: Row) -> tuple[nn.Module, LowRankOptimizer]:
    model = tiny_model()
    options: dict[str, Any] = {"update_proj_gap": 3}
    if row.name.startswith("qgalore"):
        options["cos_threshold"] = 1.0  # so that a lazy gap stays
    return model, row.build(model, **options)


@cache
def _kept_gradients(shapes: tuple[tuple[int, ...], ...], step: int) -> list[Tensor]:
    model = nn.ParameterList([torch.zeros(shape) for shape in shapes])
    set_gradients(model, step)
    return [param.grad for param in model.parameters() if param.grad is not None]


def give_gradients(model: nn.Module, optimizer: LowRankOptimizer, step: int) -> None:
    """As `set_gradients`, whose numbers are kept."""
    optimizer.zero_grad()
    if any(hasattr(module, "weight_gradient") for module in model.modules()):
        set_gradients(model, step)
        return
    params = list(model.parameters())
    kept = _kept_gradients(tuple(tuple(param.shape) for param in params), step)
    for param, grad in zip(params, kept, strict=True):
        param.grad = grad.to(param.dtype, copy=True)


def advance(model: nn.Module, optimizer: LowRankOptimizer, steps: range) -> None:
    for step in steps:
        give_gradients(model, optimizer, step)
        optimizer.step()


def weights_of(model: nn.Module) -> list[Tensor]:
    return [_dense(value) for value in [*model.parameters(), *model.buffers()]]


def _dense(value: Tensor) -> Tensor:
    value = value.detach()
    return value.dequantize() if hasattr(value, "parts") else value.clone()


def snapshot(model: nn.Module, optimizer: LowRankOptimizer) -> list[Any]:
    """Every weight, and every entry of the state by position and name."""
    held: list[Any] = weights_of(model)
    for group in optimizer.param_groups:
        for param in group["params"]:
            for name, value in optimizer.state[param].items():
                held += [name, value.clone() if isinstance(value, Tensor) else value]
    return held


def finite(values: list[Tensor]) -> bool:
    return all(bool(v.isfinite().all()) for v in values if v.is_floating_point())


@cache
def _prepared(name: str) -> tuple[nn.Module, LowRankOptimizer]:
    model, optimizer = build(row_of(name))
    advance(model, optimizer, range(BEFORE))
    return model, optimizer


@cache
def reference(name: str, steps: int = AFTER) -> tuple[list[Tensor], list[Tensor]]:
    """Weights before a change would be made, and after further steps without one."""
    model, optimizer = copy.deepcopy(_prepared(name))
    row_of(name).link(optimizer, model)
    before = weights_of(model)
    advance(model, optimizer, range(BEFORE, BEFORE + steps))
    return before, weights_of(model)


def fresh(
    row: Row, optimizer: LowRankOptimizer, case: Case, model: nn.Module | None = None
) -> LowRankOptimizer | Exception:
    """A new optimizer with the groups' options, or what its constructor raises."""
    groups = [{**group, "params": list(group["params"])} for group in optimizer.param_groups]
    for group in groups:
        if "density" not in case.undo:
            group.pop("density", None)  # a copy has it in groups that were given none
    if set(SEAMS).isdisjoint(case.undo):
        return _made(optimizer, groups, model)
    # Options that the former strategy was completed with are not a person's; nor need those be
    # that the row gave it.
    for own in (tuple(row.options), ()):
        known = {*optimizer.defaults, *GIVEN, *own} - {*OWNED} | {*case.undo}
        first = {key: value for key, value in groups[case.group].items() if key in known}
        made = _made(optimizer, [*groups[: case.group], first, *groups[case.group + 1 :]], model)
        if not isinstance(made, Exception):
            break
    return made


def _made(
    optimizer: LowRankOptimizer, groups: list[dict[str, Any]], model: nn.Module | None
) -> LowRankOptimizer | Exception:
    try:
        made = type(optimizer)(groups)
        if model is not None and hasattr(made, "attach"):
            made.attach(model)
    except Exception as error:
        return error
    return made


def layout(optimizer: LowRankOptimizer) -> list[dict[str, Any]]:
    """Names, shapes and dtypes of the state, parameter by parameter."""

    def of(value: Any) -> tuple[Any, ...]:
        if not isinstance(value, Tensor):
            return ((), "number")
        whole = value.dim() == 0 and value.dtype in COUNTING
        return ((), "number") if whole else (tuple(value.shape), value.dtype)

    return [
        {name: of(value) for name, value in optimizer.state[param].items()}
        for group in optimizer.param_groups
        for param in group["params"]
    ]


def unlike(optimizer: LowRankOptimizer, new: LowRankOptimizer) -> str:
    for own, wanted in zip(layout(optimizer), layout(new), strict=True):
        for name in sorted({*own, *wanted}):
            pair = own.get(name), wanted.get(name)
            rests = any(entry is not None and entry[0] == (0,) for entry in pair)  # LISA's turns
            if pair[0] != pair[1] and not rests:
                return f"state {name} is {own.get(name)}, a new optimizer's {wanted.get(name)}"
    return ""


def check(name: str, case: Case) -> str:
    """What is wrong with how a case ends, or nothing."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model, optimizer = copy.deepcopy(_prepared(name))
        row_of(name).link(optimizer, model)
        act = _check_load if case.loads else _check_groups
        return act(name, case, model, optimizer)


def _short(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).splitlines()[0][:90] if str(error) else ''}"


def _check_groups(name: str, case: Case, model: nn.Module, optimizer: LowRankOptimizer) -> str:
    group = optimizer.param_groups[case.group] if case.undo else {}
    kept = {key: group[key] for key in case.undo if key in group}
    try:
        case.edit(optimizer)
    except REFUSALS:
        return ""  # a weight in eight bits refuses another dtype by itself
    new = fresh(row_of(name), optimizer, case)
    before = snapshot(model, optimizer)
    for count, step in enumerate(range(BEFORE, BEFORE + AFTER)):
        try:
            give_gradients(model, optimizer, step)
            optimizer.step()
        except REFUSALS as error:
            if count:
                return f"refused {count} steps late: {_short(error)}"
            if not equal(before, snapshot(model, optimizer)):
                return f"half-written before {_short(error)}"
            return _goes_on(case, model, optimizer, kept)
        except Exception as error:
            return _short(error)
    if isinstance(new, Exception):
        return f"taken, though a constructor says {_short(new)}"
    if not finite(weights_of(model)):
        return "weights are not finite"
    return unlike(optimizer, new) or _effect(name, case, model, optimizer)


def _goes_on(
    case: Case, model: nn.Module, optimizer: LowRankOptimizer, kept: dict[str, Any]
) -> str:
    if not case.undo:
        return ""
    group = optimizer.param_groups[case.group]
    for key in case.undo:
        group.pop(key, None)
    group.update(kept)
    try:
        advance(model, optimizer, range(BEFORE, BEFORE + 2))
    except Exception as error:
        return f"refused, but with the old option {_short(error)}"
    return "" if finite(weights_of(model)) else "refused, but weights are not finite then"


def _effect(name: str, case: Case, model: nn.Module, changed: LowRankOptimizer) -> str:
    """A change that a new optimizer heeds must not be without effect."""
    _, unchanged = reference(name)
    if not equal(weights_of(model), unchanged) or not case.undo:
        return ""
    other, optimizer = build(row_of(name))
    once = optimizer.param_groups[case.group].get("schedule") == "once"
    exempt = (*MECHANICAL, *(FITTING if once else ()))
    if optimizer.param_groups[case.group].get("projector") == "coap":
        exempt += ("seed",)  # of the first fit's sketch; later fits start from the basis
    if optimizer.param_groups[case.group].get("projector") in ("switched", "block_power"):
        exempt += ("refresh",)  # of the first fit
    if name == "lisa_adamw":
        exempt += ("active",)  # by then LISA has set it to what it may be changed to
    if row_of(name).int8:
        exempt += ("refresh", "quantizer", "eps")  # whose last bits a step of INT8 hides
    if all(key in exempt for key in case.undo):
        return ""
    case.edit(optimizer)
    new = fresh(row_of(name), optimizer, case, other)
    if isinstance(new, Exception):
        return ""
    advance(other, new, range(BEFORE + AFTER))
    if equal(weights_of(other), unchanged):
        return ""
    advance(model, changed, range(BEFORE + AFTER, BEFORE + AFTER + LATER))
    _, unchanged = reference(name, AFTER + LATER)
    no_effect = equal(weights_of(model), unchanged)
    return "no effect, though a new optimizer has one" if no_effect else ""


def _check_load(name: str, case: Case, model: nn.Module, optimizer: LowRankOptimizer) -> str:
    saved = copy.deepcopy(optimizer.state_dict())
    groups = [{k: v for k, v in g.items() if k != "params"} for g in optimizer.param_groups]
    groups = copy.deepcopy(groups)
    case.edit(saved)
    before = snapshot(model, optimizer)
    try:
        optimizer.load_state_dict(saved)
    except REFUSALS as error:
        if not equal(before, snapshot(model, optimizer)):
            return f"state changed before {_short(error)}"
        now = [{k: v for k, v in g.items() if k != "params"} for g in optimizer.param_groups]
        return "" if now == groups else f"options changed before {_short(error)}"
    except Exception as error:
        return f"load: {_short(error)}"
    try:
        advance(model, optimizer, range(BEFORE, BEFORE + LOADED))
    except Exception as error:
        return f"loaded, then {_short(error)}"
    now = weights_of(model)
    if not finite(now):
        return "loaded, then weights are not finite"
    new = fresh(row_of(name), optimizer, case)
    if isinstance(new, Exception):
        return f"loaded, though a constructor says {_short(new)}"
    return unlike(optimizer, new) or (_strayed(name, now) if case.same else "")


def _strayed(name: str, now: list[Tensor]) -> str:
    """Whether weights went elsewhere than they would have, by a fifth of their way."""
    for start, end, own in zip(*reference(name, LOADED), now, strict=True):
        if not start.is_floating_point():
            continue
        way, off = float((end - start).norm()), float((own - end).norm())
        if off > 0.2 * way + 1e-6:
            return f"loaded, then weights are off by {off / max(way, 1e-12):.2f} of their way"
    return ""
