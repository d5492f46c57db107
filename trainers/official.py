"""Official packages as optimizers of a run: ``official:METHOD``.

Each trains the parameter groups that ours of the same method gets, at the options that ours is
given, as far as the package has them.
"""

from __future__ import annotations

import importlib
import importlib.util
import logging
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from torch import nn

from lowrank.optimizers import available, param_groups
from lowrank.optimizers.engine import checks

from .joined import JoinedOptimizer

PREFIX = "official:"
_GROUP = {"rank": 128, "update_proj_gap": 200, "scale": 0.25, "proj_type": "std"}


@dataclass(frozen=True)
class Package:
    """An official class, and how ours of the same method names its options.

    Attributes:
        distribution: the name to install.
        module: the name to import.
        class_name: the optimizer's class.
        projector: module and class of the objects that it keeps in its state under "projector".
        keywords: of the constructor, passed on where they are given.
        fixed: further keywords of the constructor.
        group: further keys of the projected group, and other names of ours.
        scale: the projected group's key for `scale`.
        defaults: of the projected group.
    """

    distribution: str
    module: str
    class_name: str
    projector: tuple[str, str]
    keywords: tuple[str, ...] = ("betas", "eps")
    fixed: Mapping[str, Any] = field(default_factory=dict)
    group: Mapping[str, Any] = field(default_factory=dict)
    scale: str = "scale"
    defaults: Mapping[str, Any] = field(default_factory=lambda: _GROUP)

    @property
    def installed(self) -> bool:
        """Whether it can be imported here."""
        return importlib.util.find_spec(self.module) is not None

    @property
    def version(self) -> str:
        """The installed version, "unknown" where it has no metadata."""
        try:
            return version(self.distribution)
        except PackageNotFoundError:
            return "unknown"


_GALORE = ("galore_torch.galore_projector", "GaLoreProjector")
_APOLLO = ("apollo_torch.random_projector", "GradientProjector")
_RANDOM = {"proj": "random", "scale_type": "channel"}
#: By the method of ours.
PACKAGES: Mapping[str, Package] = {
    "galore_adamw": Package("galore-torch", "galore_torch", "GaLoreAdamW", _GALORE),
    "galore_adafactor": Package(
        "galore-torch",
        "galore_torch",
        "GaLoreAdafactor",
        _GALORE,
        keywords=("eps", "clip_threshold", "decay_rate", "beta1"),
        fixed={"relative_step": False, "scale_parameter": False},
    ),
    "fira_adamw": Package(
        "fira",
        "fira",
        "FiraAdamW",
        ("fira.gradient_projection", "GradientProjector"),
        scale="alpha",
    ),
    "apollo_adamw": Package(
        "apollo-torch",
        "apollo_torch",
        "APOLLOAdamW",
        _APOLLO,
        group=_RANDOM,
        defaults={**_GROUP, "scale": 1.0},
    ),
    "apollo_mini_adamw": Package(
        "apollo-torch",
        "apollo_torch",
        "APOLLOAdamW",
        _APOLLO,
        group={**_RANDOM, "scale_type": "tensor"},
        defaults={**_GROUP, "rank": 1, "scale": 128.0},
    ),
}
#: Other names by which they may be asked for, in small letters.
_NAMES = {
    "galoreadamw": "galore_adamw",
    "galore-torch": "galore_adamw",
    "galoreadafactor": "galore_adafactor",
    "fira": "fira_adamw",
    "firaadamw": "fira_adamw",
    "apollo-torch": "apollo_adamw",
    "apolloadamw": "apollo_adamw",
    "apollo-mini": "apollo_mini_adamw",
}


def is_official(name: str) -> bool:
    """Whether an optimizer's name asks for an official package."""
    return name.startswith(PREFIX)


def method_of(name: str) -> str:
    """The method of ours that an optimizer's name stands for: itself, but for a package.

    Raises:
        ValueError: there is no such method, or no official package of it.
    """
    if not is_official(name):
        if name not in available():
            raise checks.unknown_name("optimizer", name, available())
        return name
    asked = name.removeprefix(PREFIX)
    found = _NAMES.get(asked.lower(), asked)
    if found not in PACKAGES:
        raise checks.unknown_name("official package", asked, PACKAGES)
    return found


def canonical_name(name: str) -> str:
    """The one name of an optimizer: packages by the name of our method.

    Raises:
        ValueError: there is no such optimizer.
    """
    method = method_of(name)
    return PREFIX + method if is_official(name) else method


def missing(name: str) -> str | None:
    """Why an optimizer can't be had here, None if it can."""
    if not is_official(name):
        return None
    package = PACKAGES[method_of(name)]
    if package.installed:
        return None
    return (
        f"{package.module} is not installed: pip install --no-deps {package.distribution}, or"
        " ./scripts/peers"
    )


def build_official(
    name: str, model: nn.Module, lr: float, options: Mapping[str, Any]
) -> JoinedOptimizer:
    """Builds an official package's optimizer on the groups that ours gets.

    Args:
        name: ``official:METHOD``.
        model: the model.
        lr: learning rate.
        options: as `build` takes them for our method.

    Raises:
        ValueError: the package isn't installed, or has no such option.
    """
    reason = missing(name)
    if reason is not None:
        raise ValueError(f"optimizer.name is {name!r}, but {reason}")
    package = PACKAGES[method_of(name)]
    accepted = {*package.defaults, *package.keywords, "plain_lr", "weight_decay"}
    for key in options:
        if key not in accepted:
            raise checks.unknown_name(f"option of {name}", key, accepted)
    sizes = {key: options.get(key, value) for key, value in package.defaults.items()}
    projected, *others = param_groups(
        model, rank=sizes["rank"], plain_lr=options.get("plain_lr"), weight_decay=None
    )
    made = {**package.group, **sizes}
    made[package.scale] = made.pop("scale")
    decay = float(options.get("weight_decay", 0.0))
    groups: list[dict[str, Any]] = [{"params": projected["params"], **made}]
    for group in others:
        groups.append({k: v for k, v in group.items() if k in ("params", "lr", "weight_decay")})
    keywords = {key: options[key] for key in package.keywords if key in options}
    # Importing some of them imports bitsandbytes, which logs what it lacks on a CPU.
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        module = importlib.import_module(package.module)
        optimizer = getattr(module, package.class_name)(
            groups, lr=lr, weight_decay=decay, **keywords, **package.fixed
        )
    place, kind = package.projector

    def projector() -> Any:
        return getattr(importlib.import_module(place), kind)(sizes["rank"])

    return JoinedOptimizer([optimizer], {"projector": projector})
