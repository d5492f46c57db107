"""Orders of events in a training, as hypothesis draws them, and the model that they are held to.

The model is: saving and loading, copying and pickling change nothing. So a training with such
events must end with the bits of one in which they are left out.
"""

from __future__ import annotations

import copy
import io
import math
import pickle
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from hypothesis import strategies as st
from support import TinyBlock, hashed, set_gradients, trained
from table import Row
from torch import nn

from lowrank.optimizers import LowRankOptimizer

#: Events that keep a training, which the model leaves out.
KEEPING = ("save", "copy", "pickle")
#: The others; most are steps, so that bases are refitted (every third step) and read again.
OTHERS = ("step", "step", "step", "nan", "zero", "missing", "rate", "group", "cast", "decay")


@dataclass(frozen=True)
class Setting:
    """A small model and how it is trained."""

    hidden: int
    inner: int
    rank: int
    dtype: torch.dtype
    options: tuple[tuple[str, Any], ...]


Event = tuple[str, int]
settings_of = st.builds(
    Setting,
    hidden=st.sampled_from((8, 12, 16)),
    inner=st.sampled_from((5, 8, 17, 24)),
    rank=st.sampled_from((2, 3, 4, 7, 1)),
    dtype=st.sampled_from((torch.float32, torch.float32, torch.bfloat16)),
    options=st.sampled_from(((), (("weight_decay", 0.1),), (("maximize", True),))),
)
events_of = st.lists(
    st.tuples(st.sampled_from((*OTHERS, *KEEPING)), st.integers(0, 7)), min_size=4, max_size=14
)


class Training:
    """A model, a parameter beside it, and their optimizer."""

    def __init__(self, row: Row, setting: Setting) -> None:
        self.row, self.setting = row, setting
        self.model, self.optimizer = self._made(seed=0)
        self.beside = self._beside()
        self.added, self.steps = False, 0

    def _made(self, seed: int) -> tuple[nn.Module, LowRankOptimizer]:
        own = self.setting
        torch.manual_seed(seed)
        model = TinyBlock(own.hidden, own.inner, 12).to(own.dtype)
        options = {**self.row.options, **dict(own.options)}
        rank = max(own.rank, 2) if self.row.name == "switchlora_adamw" else own.rank
        fixed = {"rank": rank} if "rank" not in self.row.options else {}
        return model, self.row.build(model, **{**options, **fixed})

    def _beside(self) -> nn.Parameter:
        return nn.Parameter(hashed(42, 9).reshape(7, 6).to(self.setting.dtype))

    def run(self, event: Event) -> None:
        """Carries an event out."""
        kind, number = event
        getattr(self, f"_{kind}")(number)

    def _gradients(self) -> list[nn.Parameter]:
        self.steps += 1
        set_gradients(self.model, self.steps)
        values = hashed(self.beside.numel(), 77 + self.steps)
        self.beside.grad = (1e-2 * values).reshape(self.beside.shape).to(self.beside)
        # Of layers that give their gradient another way there is none to disturb.
        return [param for param in (*trained(self.model), self.beside) if param.grad is not None]

    def _step(self, number: int) -> None:
        self._gradients()
        self.optimizer.step()

    def _nan(self, number: int) -> None:
        params = self._gradients()
        chosen = params[number % len(params)]
        assert chosen.grad is not None
        chosen.grad.view(-1)[number % chosen.grad.numel()] = (math.nan, math.inf)[number % 2]
        self.optimizer.step()

    def _zero(self, number: int) -> None:
        for param in self._gradients()[number % 2 :: 2]:
            assert param.grad is not None
            param.grad.zero_()
        self.optimizer.step()

    def _missing(self, number: int) -> None:
        for param in self._gradients()[number % 3 :: 3]:
            param.grad = None
        self.optimizer.step()

    def _rate(self, number: int) -> None:
        for group in self.optimizer.param_groups:
            group["lr"] = group["lr"] * (0.5, 0.9, 1.1, 1.0)[number % 4]

    def _decay(self, number: int) -> None:
        group = self.optimizer.param_groups[number % len(self.optimizer.param_groups)]
        group["weight_decay"] = 0.01 * number

    def _group(self, number: int) -> None:
        if not self.added:
            self.optimizer.add_param_group({"params": [self.beside], "lr": 0.01 * (number + 1)})
            self.added = True

    def _cast(self, number: int) -> None:
        """A parameter in another dtype is refused, and nothing is changed by the attempt."""
        param = next(p for p in trained(self.model) if p.dim() == 1)
        held = param.data
        if self.steps == 0 or not self.optimizer.state[param]["step"].any():
            return  # an untrained state follows its parameter
        param.data = held.double()
        set_gradients(self.model, self.steps)
        with pytest.raises(ValueError, match="float64"):
            self.optimizer.step()
        param.grad = None
        param.data = held

    def _save(self, number: int) -> None:
        """Everything through a file into new objects."""
        file = io.BytesIO()
        content = {
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "beside": self.beside.detach(),
        }
        torch.save(content, file)
        file.seek(0)
        saved = torch.load(file, weights_only=True)
        self.model, self.optimizer = self._made(seed=1)
        self.beside = self._beside()
        if self.added:
            self.optimizer.add_param_group({"params": [self.beside]})
        self.model.load_state_dict(saved["model"])
        self.beside.data.copy_(saved["beside"])
        self.optimizer.load_state_dict(saved["optimizer"])

    def _copy(self, number: int) -> None:
        made = copy.deepcopy((self.model, self.optimizer, self.beside))
        self.model, self.optimizer, self.beside = made
        self.row.link(self.optimizer, self.model)

    def _pickle(self, number: int) -> None:
        made = pickle.loads(pickle.dumps((self.model, self.optimizer, self.beside)))
        self.model, self.optimizer, self.beside = made
        self.row.link(self.optimizer, self.model)

    def result(self) -> dict[str, Any]:
        """Everything that a training has come to, as nested plain values."""
        return {
            "model": dict(self.model.state_dict()),
            "optimizer": self.optimizer.state_dict(),
            "beside": self.beside.detach(),
        }


def differences(one: Any, other: Any, path: str = "") -> list[str]:
    """Where two results differ, to the bit."""
    if isinstance(one, torch.Tensor):
        same = isinstance(other, torch.Tensor) and one.dtype == other.dtype
        return [] if same and _equal(one, other) else [path]
    if isinstance(one, dict):
        if not isinstance(other, dict) or one.keys() != other.keys():
            return [f"{path} keys"]
        return [at for key in one for at in differences(one[key], other[key], f"{path}.{key}")]
    if isinstance(one, list | tuple):
        if len(one) != len(other):
            return [f"{path} length"]
        pairs = enumerate(zip(one, other, strict=True))
        return [at for n, (a, b) in pairs for at in differences(a, b, f"{path}.{n}")]
    return [] if one == other else [f"{path}: {one!r} and {other!r}"]


def _equal(one: torch.Tensor, other: torch.Tensor) -> bool:
    return torch.equal(one, other) or (
        one.is_floating_point() and torch.equal(one.nan_to_num(), other.nan_to_num())
    )


def check(row: Row, setting: Setting, events: list[Event]) -> None:
    """Fails unless the events that keep a training change nothing of it."""
    kept, left_out = Training(row, setting), Training(row, setting)
    for event in events:
        kept.run(event)
        if event[0] not in KEEPING:
            left_out.run(event)
    found = differences(left_out.result(), kept.result())
    assert not found, f"{found[:5]} after {events}"
