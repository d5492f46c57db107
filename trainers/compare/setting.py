"""What all runs of a comparison have in common, and the file that keeps it."""

from __future__ import annotations

import json
import platform
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from ..config_io import flatten
from ..distributed import choose_device
from ..files import write_text
from ..missing import require
from ..summary import device_name, package_version

NO_METHODS = "--methods is not given; accepted: names, `lowrank methods` lists them"
FORMAT = 1
NAME = "comparison.json"
EQUALS = ("steps", "tokens", "memory")
#: A warmup and a fall need some; fewer tell nothing of a method.
FEWEST_STEPS = 4
#: Seed of the tuning runs, which the table must not have.
TUNING_SEED = 100


@dataclass(frozen=True)
class Setting:
    """A comparison.

    Attributes:
        methods: labels of its entries, the first is what the others are held against.
        seeds: of weights and data order.
        model: a preset's name.
        data: "stdlib", "c4" or a folder.
        steps: optimizer steps of a run (of the first method's, if tokens are to be equal).
        settings: further settings of all runs, a layer of the configuration.
        equal: "steps"; "tokens": a method whose steps are larger takes fewer; "memory": ranks are
            chosen so that weights and state take as much as the first method's.
        tune: whether rates are searched for; else they are the presets', or those of `rates`.
        tune_apart: whether rates of embeddings and head of their own are in the grid.
        tuning_seed: of the tuning runs.
        rates: what was found before, by label: a layer of optimizer settings for each.
        data_sha256: of the data.
        versions: of what computes, and the device.
    """

    methods: tuple[str, ...]
    seeds: tuple[int, ...]
    model: str = "llama_9m"
    data: str = "stdlib"
    steps: int = 450
    settings: Mapping[str, Any] = field(default_factory=dict)
    equal: str = "steps"
    tune: bool = False
    tune_apart: bool = False
    tuning_seed: int = TUNING_SEED
    rates: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    data_sha256: str = ""
    versions: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not self.methods:
            raise ValueError(NO_METHODS)
        if self.steps < FEWEST_STEPS:
            raise ValueError(f"--steps is {self.steps}; accepted: {FEWEST_STEPS} or more")
        if self.equal not in EQUALS:
            raise ValueError(f"--equal is {self.equal!r}; accepted: {', '.join(EQUALS)}")
        if not 0 <= self.tuning_seed < 2**32:
            raise ValueError(
                f"--tuning-seed is {self.tuning_seed}; accepted: a whole number from 0 to 2^32-1"
            )
        if self.tune_apart and not self.tune:
            raise ValueError("--tune-embeddings without --tune; accepted: both, or --tune alone")
        if self.tune and self.tuning_seed in self.seeds:
            raise ValueError(
                f"--seeds has {self.tuning_seed}, on which rates are tuned; accepted: others, or"
                " another --tuning-seed"
            )


def versions(device: str) -> dict[str, str]:
    """What computes: versions, and the device.

    Args:
        device: as `train.device` has it.

    Raises:
        ValueError: this machine doesn't have the device.
        MissingExtraError: `transformers` is not installed.
    """
    return {
        "lowrank": package_version(),
        "torch": str(torch.__version__),
        "transformers": str(require("transformers", "train").__version__),
        "python": platform.python_version(),
        "device": device_name(choose_device(device)),
    }


def read_setting(folder: Path) -> Setting | None:
    """The setting of a comparison's folder; None for a folder that is missing or empty.

    Raises:
        ValueError: the folder holds something else.
    """
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"--output {folder} is a file; accepted: a folder")
    path = folder / NAME
    if not path.is_file():
        others = sorted(item.name for item in folder.iterdir()) if folder.is_dir() else []
        others = [name for name in others if not name.startswith(f".{NAME}") and name != ".lock"]
        if others:
            raise ValueError(
                f"--output {folder} holds something else than a comparison ({others[0]}); choose"
                " another folder"
            )
        return None
    try:
        content = json.loads(path.read_text("utf-8"))
        if content.pop("format") != FORMAT:
            raise ValueError("its format is of another version")
        content |= {key: tuple(content[key]) for key in ("methods", "seeds")}
        return Setting(**content)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} can't be read: {error}; choose another --output") from None


def write_setting(setting: Setting, folder: Path) -> None:
    """Writes a comparison's file, atomically."""
    content = {"format": FORMAT, **asdict(setting)}
    write_text(folder / NAME, json.dumps(content, indent=2) + "\n")


def joined(former: Setting, asked: Setting, folder: Path) -> Setting:
    """A folder's setting with the methods and seeds that are asked for as well.

    Raises:
        ValueError: anything else differs; the message names what.
    """
    before, now = (flatten(json.loads(json.dumps(asdict(item)))) for item in (former, asked))
    # Data may be moved: what they hold counts.
    free = ("methods", "seeds", "data")
    differ = [
        f"{key} {before.get(key)!r}, not {now.get(key)!r}"
        for key in dict.fromkeys([*before, *now])
        if key not in free and before.get(key) != now.get(key)
    ]
    if differ:
        more = f", and {len(differ) - 4} more" if len(differ) > 4 else ""
        raise ValueError(
            f"--output {folder} holds a comparison with {'; '.join(differ[:4])}{more}; accepted:"
            " its settings, or another folder"
        )
    methods = tuple(dict.fromkeys([*former.methods, *asked.methods]))
    seeds = tuple(dict.fromkeys([*former.seeds, *asked.seeds]))
    return replace(former, methods=methods, seeds=seeds, data=asked.data)
