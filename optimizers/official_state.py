"""Training that was begun with galore_torch or fira goes on here, in the middle of a run.

Their optimizers keep Python objects in their state, so that `torch.load(..., weights_only=True)`
refuses the files. `read_official` reads them nevertheless without running anything that they name:
the objects become records of their numbers, and neither package needs to be installed.
`load_official_state` then gives a state to an optimizer with the same groups. After it GaLore and
Fira go on as the package would have (with `refresh="svd"` to its numbers).
"""

from __future__ import annotations

import os
import pickle
from collections.abc import Mapping, Sequence
from typing import IO, Any

import torch
from torch import Tensor

from .engine import checks
from .engine.optimizer import LowRankOptimizer
from .engine.sharding import is_dtensor

Group = dict[str, Any]

#: Classes of the objects that the packages keep in their state.
PROJECTORS = (
    "galore_torch.galore_projector.GaLoreProjector",
    "fira.gradient_projection.GradientProjector",
)
#: Methods whose state the packages have in the same form.
METHODS = ("GaLoreAdamW", "GaLoreAdafactor", "FiraAdamW")
#: Their names for entries of ours.
_ENTRIES = {"residual_norm": "scaling_grad"}
#: Entries of theirs that are computed anew at each step.
_UNUSED = ("RMS",)
#: Keys of a projected group that must be equal, by their names of them.
_EQUAL = {
    "rank": ("rank",),
    "update_proj_gap": ("update_proj_gap",),
    "scale": ("scale", "alpha"),
    "proj_type": ("proj_type",),
}


class ProjectorRecord:
    """The numbers of one of the packages' projector objects, by their names."""

    ortho_matrix: Tensor | Sequence[Tensor] | None


def read_official(file: str | os.PathLike[str] | IO[bytes]) -> Any:
    """Reads a checkpoint that was saved with galore_torch or fira; executes nothing of it.

    Args:
        file: a path or an open file, as `torch.save` wrote it: the state dict of an optimizer, or
            something that has one in it.

    Returns:
        What was saved, on the CPU, with a `ProjectorRecord` for each projector.

    Raises:
        OSError: the file can't be read.
        pickle.UnpicklingError: it has objects of other classes.
        ValueError: it is no file of `torch.save`, or not a whole one.
    """
    allowed: list[Any] = [(ProjectorRecord, name) for name in PROJECTORS]
    with torch.serialization.safe_globals(allowed):
        try:
            return torch.load(file, map_location="cpu", weights_only=True)
        except (OSError, pickle.UnpicklingError):
            raise
        except Exception as error:  # Which type torch raises for other bytes depends on these.
            called = file if isinstance(file, str | os.PathLike) else "the open file"
            raise ValueError(
                f"{called} can't be read ({type(error).__name__}): accepted is a whole file that "
                "torch.save wrote"
            ) from error


def load_official_state(optimizer: LowRankOptimizer, state_dict: Mapping[str, Any]) -> None:
    """Loads the state of galore_torch's `GaLoreAdamW` or `GaLoreAdafactor`, or fira's `FiraAdamW`.

    The optimizer must be the class of that name here, with the same groups in the same order, as
    groups written for the packages are accepted unchanged. Rates, betas and the like become those
    of the saved groups, as in `load_state_dict`.

    Args:
        optimizer: changed in place.
        state_dict: of the package's optimizer, as it is or from `read_official`.

    Raises:
        ValueError: the state is of another kind (8-bit moments of bitsandbytes; APOLLO, whose
            random projections are drawn otherwise), or doesn't fit; nothing is changed then.
    """
    kind = type(optimizer).__name__
    if kind not in METHODS:
        raise ValueError(
            f"{kind}: accepted are {', '.join(METHODS)}; other official states have another form "
            "(8-bit codes of bitsandbytes, other random numbers), begin with a new state"
        )
    saved_groups = state_dict.get("param_groups")
    saved_states = state_dict.get("state")
    if not isinstance(saved_groups, list) or not isinstance(saved_states, Mapping):
        raise ValueError(
            "state_dict has no param_groups and state: accepted is the state_dict() of an "
            "optimizer; a checkpoint has it under a key, often 'optimizer'"
        )
    sizes = [len(group["params"]) for group in optimizer.param_groups]
    saved_sizes = [len(group["params"]) for group in saved_groups]
    if sizes != saved_sizes:
        raise ValueError(
            f"the saved state has parameter groups of {saved_sizes} parameters; accepted are "
            f"{sizes}, this optimizer's"
        )
    made = optimizer.state_dict()
    states: dict[int, dict[str, Any]] = {}
    groups = []
    for own, saved, of_params in zip(
        made["param_groups"], saved_groups, optimizer.param_groups, strict=True
    ):
        _check_group(own, saved)
        shared = saved.keys() & own.keys() - {"params", "param_names", "correct_bias"}
        groups.append({**own, **{key: saved[key] for key in shared}})
        for place, key, param in zip(
            own["params"], saved["params"], of_params["params"], strict=True
        ):
            if is_dtensor(param):
                raise ValueError(
                    "a parameter is sharded: accepted is to load the state on one process, and to "
                    "save it with torch.distributed.checkpoint from there"
                )
            called = f"parameter {place}"
            states[place] = _state(called, saved_states.get(key, {}), made["state"][place], own)
    optimizer.load_state_dict({**made, "state": states, "param_groups": groups})


def _check_group(own: Group, saved: Group) -> None:
    """Raises `ValueError` if a saved group is projected otherwise."""
    projected = own.get("rank") is not None
    if projected != (saved.get("rank") is not None):
        raise ValueError(
            f"a saved group {'has no' if projected else 'has a'} rank, and this optimizer's "
            f"{'has one' if projected else 'has none'}: accepted are the groups that were saved"
        )
    if not saved.get("correct_bias", True):
        raise ValueError("correct_bias=False in the saved state: accepted is True")
    for key, names in _EQUAL.items() if projected else ():
        found = next((saved[name] for name in names if name in saved), None)
        if found != own[key]:
            raise ValueError(
                f"{key}={own[key]!r} with a saved state of {found!r}: accepted is that"
            )


def _state(called: str, saved: Mapping[str, Any], fresh: Group, group: Group) -> Group:
    """A parameter's state of ours, with the saved numbers."""
    if not saved.get("step"):
        return fresh
    projector = saved.get("projector")
    known = {"step", "projector", *_UNUSED}
    steps = int(saved["step"])
    checks.integer("step", steps, low=1)
    made = dict(fresh)
    made["step"] = torch.full_like(fresh["step"], steps)
    bases = {} if projector is None else _bases(called, projector, fresh)
    for key, value in fresh.items():
        if key in ("step", "side"):
            continue
        if key == "refreshed_at":
            made[key] = (steps - 1) // group["update_proj_gap"] * group["update_proj_gap"]
            continue
        name = _ENTRIES.get(key, key)
        known.add(name)
        found = bases.get(key, saved.get(name))
        if not isinstance(found, Tensor) or found.shape != value.shape:
            shape = tuple(found.shape) if isinstance(found, Tensor) else "absent"
            raise ValueError(
                f"the saved state of {called} has {name} {shape}: accepted is a tensor of shape "
                f"{tuple(value.shape)}"
            )
        made[key] = found.detach().to(value.dtype)
    unknown = sorted(saved.keys() - known)
    if unknown:
        raise ValueError(
            f"the saved state of {called} has {unknown}, which {METHODS} don't keep: accepted are "
            f"{sorted(known)}"
        )
    return made


def _bases(called: str, projector: Any, fresh: Mapping[str, Any]) -> dict[str, Tensor]:
    """Projection matrices of d x r; the packages keep right ones transposed."""
    found = getattr(projector, "ortho_matrix", None)
    listed = list(found) if isinstance(found, list | tuple) else [found]
    pair = [matrix for matrix in listed if isinstance(matrix, Tensor) and matrix.dim() == 2]
    if "side" not in fresh:
        raise ValueError(f"the saved state of {called} has a projector: accepted is none")
    if len(pair) != len(listed):
        raise ValueError(
            f"the saved state of {called} has a projector without matrices (ortho_matrix): "
            f"accepted are {PROJECTORS}"
        )
    left, right = int(fresh["side"]) == 0, "basis_right" in fresh
    if right and len(pair) == 2:
        return {"basis": pair[0], "basis_right": pair[1].t()}
    if right or len(pair) != 1:
        raise ValueError(
            f"the saved state of {called} has {len(pair)} projection matrices: accepted are "
            f"{1 + right}"
        )
    return {"basis": pair[0] if left else pair[0].t()}
