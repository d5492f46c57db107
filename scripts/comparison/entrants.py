"""Who takes part: our methods by name, and the official packages on the same parameter groups."""

from __future__ import annotations

import importlib.util
import logging
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from lowrank.optimizers import accepts, available, build, param_groups

from .setting import Setting

Make = Callable[[nn.Module, float, float, Setting], torch.optim.Optimizer]


@dataclass(frozen=True)
class Entrant:
    """One row of the table.

    Attributes:
        name: its key.
        make: builds the optimizer from (model, lr, plain_lr, setting).
        method: the method of ours that it is compared with: itself, but for an official package.
        plain: the method whose tuned `plain_lr` it shares.
    """

    name: str
    make: Make
    method: str
    plain: str

    @property
    def official(self) -> bool:
        """Whether it is an official package's."""
        return self.method != self.name


#: What a method needs beside rank and gap.
OPTIONS: Mapping[str, dict[str, Any]] = {
    "apollo_mini_adamw": {"rank": 1},
    "online_subspace_adamw": {"update_proj_gap": 200},
    "online_subspace_adamw_8bit": {"update_proj_gap": 200},
    "online_subspace_adafactor": {"update_proj_gap": 200},
    "online_subspace_lion": {"update_proj_gap": 200},
    "ldadam_adamw": {"update_proj_gap": 1},
    # c = alpha / r = 1, ours
    "low_rank_adamw": {"alpha": 32.0},
    "loqt_adamw": {"scale": 0.25},
    "relora_adamw": {"alpha": 32.0},
    "sltrain_adamw": {"alpha": 32.0, "rank": 28},
    "sltrain_adamw_8bit": {"alpha": 32.0, "rank": 28},
    "coap_adamw": {"scale": 0.25, "update_interval": 10, "reproject_factor": 5},
    "coap_adamw_8bit": {"scale": 0.25, "update_interval": 10, "reproject_factor": 5},
    "coap_adafactor": {"scale": 0.25, "update_interval": 10, "reproject_factor": 5},
    "coap_adafactor_8bit": {"scale": 0.25, "update_interval": 10, "reproject_factor": 5},
}


#: Adafactor with a first moment bears other rates than Adafactor without, and there is no
#: full-rank method to tune them on: each of these tunes its own.
WITH_FIRST_MOMENT = ("flora_adafactor", "coap_adafactor_8bit")


def _plain_family(name: str) -> str:
    """The method that tunes the rate of embeddings, head and norms."""
    if name in WITH_FIRST_MOMENT:
        return name
    if "adafactor" in name:
        return "adafactor"
    return "online_subspace_lion" if name.endswith("_lion") else "adamw"


def _ours(name: str) -> Entrant:
    def make(
        model: nn.Module, lr: float, plain_lr: float, setting: Setting
    ) -> torch.optim.Optimizer:
        options: dict[str, Any] = {"rank": setting.rank, "update_proj_gap": setting.gap}
        if name.startswith("coap"):
            del options["update_proj_gap"]
        options |= OPTIONS.get(name, {})
        if accepts(name, "total_steps"):
            options["total_steps"] = setting.steps
        return build(name, model, lr=lr, plain_lr=plain_lr, weight_decay=0.0, **options)

    return Entrant(name, make, name, _plain_family(name))


@dataclass(frozen=True)
class _Official:
    """An official class and its group keys."""

    package: str
    class_name: str
    method: str
    group: Callable[[Setting], dict[str, Any]]
    options: dict[str, Any] = field(default_factory=dict)

    def make(
        self, model: nn.Module, lr: float, plain_lr: float, setting: Setting
    ) -> torch.optim.Optimizer:
        """Builds it on the groups that ours gets."""
        # Importing some of them imports bitsandbytes, which logs what it lacks on a CPU.
        logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            module = importlib.import_module(self.package)
            projected, *others = param_groups(model, rank=setting.rank, plain_lr=plain_lr)
            groups = [
                {"params": projected["params"], **self.group(setting)},
                *({"params": group["params"], "lr": group["lr"]} for group in others),
            ]
            made: torch.optim.Optimizer = getattr(module, self.class_name)(
                groups, lr=lr, weight_decay=0.0, **self.options
            )
        return made


def _galore_group(setting: Setting) -> dict[str, Any]:
    return {
        "rank": setting.rank,
        "update_proj_gap": setting.gap,
        "scale": 0.25,
        "proj_type": "std",
    }


def _fira_group(setting: Setting) -> dict[str, Any]:
    group = _galore_group(setting)
    return {**group, "alpha": group.pop("scale")}


def _apollo_group(rank: int | None, scale: float, kind: str) -> Callable[[Setting], dict[str, Any]]:
    def group(setting: Setting) -> dict[str, Any]:
        return {
            "rank": rank or setting.rank,
            "proj": "random",
            "proj_type": "std",
            "scale_type": kind,
            "scale": scale,
            "update_proj_gap": setting.gap,
        }

    return group


_FACTORED = {"relative_step": False, "scale_parameter": False}
OFFICIAL = {
    "galore-torch GaLoreAdamW": _Official(
        "galore_torch", "GaLoreAdamW", "galore_adamw", _galore_group
    ),
    "galore-torch GaLoreAdafactor": _Official(
        "galore_torch", "GaLoreAdafactor", "galore_adafactor", _galore_group, _FACTORED
    ),
    "fira FiraAdamW": _Official("fira", "FiraAdamW", "fira_adamw", _fira_group),
    "apollo-torch APOLLOAdamW": _Official(
        "apollo_torch", "APOLLOAdamW", "apollo_adamw", _apollo_group(None, 1.0, "channel")
    ),
    "apollo-torch APOLLO-Mini": _Official(
        "apollo_torch", "APOLLOAdamW", "apollo_mini_adamw", _apollo_group(1, 128.0, "tensor")
    ),
}


def entrants() -> dict[str, Entrant]:
    """All that can take part here: every method of ours and the packages that are installed."""
    found = {name: _ours(name) for name in available()}
    for name, official in OFFICIAL.items():
        if importlib.util.find_spec(official.package) is not None:
            method = official.method
            found[name] = Entrant(name, official.make, method, _plain_family(method))
    return found
