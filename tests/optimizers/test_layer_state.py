"""What a converted model saves: other options are refused, earlier versions' files load."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from support import set_gradients, tiny_model
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_model_state_dict, set_model_state_dict

from lowrank.optimizers import build, convert
from lowrank.optimizers.layers import SwitchedLinear

#: Each method's options that its layers' function depends on, and others that shapes don't tell.
CHANGED: dict[str, tuple[dict[str, Any], dict[str, Any], str]] = {
    "alpha": ({"alpha": 8.0}, {"alpha": 16.0}, "relora_adamw"),
    "heads": ({"rank": 4, "heads": 1}, {"rank": 2, "heads": 2}, "relora_adamw"),
    "plain": ({"alpha": 8.0}, {"alpha": 16.0}, "low_rank_adamw"),
    "sparse": ({"alpha": 8.0}, {"alpha": 16.0}, "sltrain_adamw"),
    "scale": ({"scale": 0.5}, {"scale": 0.25}, "loqt_adamw"),
}
NAMES = ("loqt_adamw", "low_rank_adamw", "relora_adamw", "sltrain_adamw", "sst_adamw")
NAMES += ("switchlora_adamw", "qgalore_adamw_8bit")
names = pytest.mark.parametrize("name", NAMES)


def converted(name: str, seed: int = 0, **options: Any) -> nn.Module:
    return convert(name, tiny_model(seed), **{"rank": 4, **options})


def earlier(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """A state dict as version 0.1 made it."""
    return {k: v for k, v in state.items() if not k.endswith(("_extra_state", "group_size"))}


@pytest.mark.parametrize("assign", [False, True])
@pytest.mark.parametrize("what", CHANGED)
def test_another_option_is_refused_with_both_values(what: str, assign: bool) -> None:
    saved, other, name = CHANGED[what]
    state = converted(name, **saved).state_dict()
    model = converted(name, seed=1, **other)
    before = copy.deepcopy(model.mlp["up_proj"].state_dict())
    option = next(key for key in ("heads", "scale", "alpha") if key in saved)
    said = rf"{option}={saved[option]:g}, and this layer has {option}={other[option]:g}"
    with pytest.raises(RuntimeError, match=said):
        model.load_state_dict(state, assign=assign)
    after = model.mlp["up_proj"].state_dict()
    assert all(torch.equal(value, before[key]) for key, value in after.items())


@names
@pytest.mark.parametrize("version", ["now", "earlier"])
def test_state_dicts_load_strictly(name: str, version: str) -> None:
    model, other = converted(name), converted(name, seed=1)
    state = model.state_dict()
    other.load_state_dict(earlier(state) if version == "earlier" else state)
    loaded = other.state_dict()
    assert loaded.keys() == state.keys()
    assert all(torch.equal(value, state[key]) for key, value in loaded.items())
    tokens = torch.randint(0, 32, (2, 5))
    assert torch.equal(model(tokens), other(tokens))


@names
def test_state_dicts_are_plain_tensors_that_files_hold(name: str, tmp_path: Path) -> None:
    files = pytest.importorskip("safetensors.torch")
    model, other = converted(name), converted(name, seed=1)
    state = model.state_dict()
    assert all(type(value) is Tensor for value in state.values())
    files.save_file({k: v.contiguous() for k, v in state.items()}, tmp_path / "saved")
    other.load_state_dict(files.load_file(tmp_path / "saved"))
    torch.save(state, tmp_path / "pickled")
    other.load_state_dict(torch.load(tmp_path / "pickled", weights_only=True))


@names
def test_distributed_checkpoints_find_every_tensor(name: str) -> None:
    model, other = converted(name), converted(name, seed=1)
    set_model_state_dict(other, get_model_state_dict(model))
    tokens = torch.randint(0, 32, (2, 5))
    assert torch.equal(model(tokens), other(tokens))


@pytest.mark.parametrize("offload", [False, True])
def test_host_tensors_are_saved_loaded_cast_and_copied(offload: bool) -> None:
    first = converted("switchlora_adamw", offload=offload)
    optimizer = build("switchlora_adamw", first, switch_interval=10.0, rank=4)
    for step in range(6):
        set_gradients(first, step)
        optimizer.step()
    second = converted("switchlora_adamw", seed=1, offload=not offload)
    second.load_state_dict(first.state_dict())
    layer, other = first.mlp["up_proj"], second.mlp["up_proj"]
    assert torch.equal(layer.selected, other.selected)
    assert torch.equal(layer.candidates_a, other.candidates_a)
    buffers = set() if offload else {"candidates_a", "candidates_b"}
    assert {name for name, _ in layer.named_buffers()} == buffers
    twin = copy.deepcopy(layer).bfloat16()
    assert twin.candidates_a.dtype == torch.bfloat16
    assert twin.selected.dtype == torch.int64
    assert layer.candidates_a.dtype == torch.float32
    state = layer.state_dict()
    with pytest.raises(RuntimeError, match=r"Missing key.*selected"):
        other.load_state_dict({k: v for k, v in state.items() if k != "selected"})
    with pytest.raises(RuntimeError, match=r"selected is saved with shape \(2, 3\)"):
        other.load_state_dict({**state, "selected": state["selected"][:, :3]})


def test_an_offloaded_layer_goes_from_the_meta_device_to_the_cpu() -> None:
    filled = SwitchedLinear(nn.Linear(8, 6), 0, rank=2, offload=True)
    layer = SwitchedLinear(nn.Linear(8, 6, device="meta"), 0, rank=2, offload=True)
    assert layer.candidates_a.is_meta
    layer.to_empty(device="cpu").load_state_dict(filled.state_dict())
    x = torch.ones(1, 8)
    assert torch.equal(layer(x), filled(x))
    assert torch.equal(layer.candidates_b, filled.candidates_b)
    assert layer.to("meta").candidates_a.is_meta
