"""What every optimizer's state owes: saving, loading, copying and its size."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from support import TinyBlock, equal, tiny_model, trained, weights
from table import DTYPES, Row, assert_same, every, every_with, representative, train
from torch import Tensor

from lowrank.optimizers import build, expected_state_bytes, state_bytes


@every
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_state_is_made_at_construction_and_plain(row: Row, dtype: torch.dtype) -> None:
    model = tiny_model(dtype=dtype)
    optimizer = row.build(model)
    assert set(optimizer.state) == set(trained(model))
    keys = {param: sorted(state) for param, state in optimizer.state.items()}
    before = weights(model)
    for state in optimizer.state.values():
        assert all(isinstance(value, Tensor | int) for value in state.values())
    assert all(torch.equal(a, b) for a, b in zip(before, trained(model), strict=True))
    train(model, optimizer, range(4))
    assert keys == {param: sorted(state) for param, state in optimizer.state.items()}


@every_with("dtype", DTYPES)
def test_resume_through_a_file_is_exact(row: Row, dtype: torch.dtype) -> None:
    straight = tiny_model(dtype=dtype)
    optimizer = row.build(straight)
    train(straight, optimizer, range(9))

    model = tiny_model(dtype=dtype)
    optimizer = row.build(model)
    for start, stop in ((0, 2), (2, 5), (5, 9)):
        train(model, optimizer, range(start, stop))
        file = io.BytesIO()
        torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, file)
        file.seek(0)
        saved = torch.load(file, weights_only=True)
        model = row.prepare(tiny_model(seed=1, dtype=dtype))
        model.load_state_dict(saved["model"])
        optimizer = row.build(model)
        optimizer.load_state_dict(state_dict=saved["optimizer"])
    assert_same(straight, model)


@every
def test_load_keeps_each_tensors_dtype(row: Row) -> None:
    model = tiny_model(dtype=torch.bfloat16)
    optimizer = row.build(model)
    train(model, optimizer, range(2))
    saved = copy.deepcopy(optimizer.state_dict())
    other = row.build(tiny_model(dtype=torch.bfloat16))
    other.load_state_dict(saved)
    loaded = other.state_dict()["state"]
    for key, state in saved["state"].items():
        for name, value in state.items():
            if isinstance(value, Tensor):
                assert loaded[key][name].dtype == value.dtype
                assert torch.equal(loaded[key][name], value)
                assert loaded[key][name].data_ptr() != value.data_ptr() or not value.numel()
            else:
                assert loaded[key][name] == value


@representative
def test_load_of_a_state_that_does_not_fit_changes_nothing(row: Row) -> None:
    optimizer = row.build(tiny_model())
    before = copy.deepcopy(optimizer.state_dict())
    other = row.build(TinyBlock(hidden=8))
    with pytest.raises(ValueError, match="accepted"):
        optimizer.load_state_dict(other.state_dict())
    broken = copy.deepcopy(before)
    del broken["state"][0]["step"]
    with pytest.raises(ValueError, match="step"):
        optimizer.load_state_dict(broken)
    for key, state in before["state"].items():
        for name, value in state.items():
            now = optimizer.state_dict()["state"][key][name]
            assert torch.equal(now, value) if isinstance(value, Tensor) else now == value


@every_with("how", ["pickle", "deepcopy"])
def test_copies_continue_alike(row: Row, how: str) -> None:
    model = tiny_model()
    optimizer = row.build(model)
    train(model, optimizer, range(2))
    pair = (model, optimizer)
    twin_model, twin = (
        copy.deepcopy(pair) if how == "deepcopy" else pickle.loads(pickle.dumps(pair))
    )
    row.link(twin, twin_model)
    train(model, optimizer, range(2, 6))
    train(twin_model, twin, range(2, 6))
    assert_same(model, twin_model)


@representative
def test_older_pickle_gets_new_defaults(row: Row) -> None:
    optimizer = row.build(tiny_model())
    state = optimizer.__getstate__()
    for group in state["param_groups"]:
        del group["skip_nonfinite"]
    optimizer.__setstate__(state)
    assert all(group["skip_nonfinite"] is True for group in optimizer.param_groups)


@every
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_state_bytes_equal_the_formula(row: Row, dtype: torch.dtype) -> None:
    model = tiny_model(dtype=dtype)
    options = {"rank": 4, **row.options}
    optimizer = row.build(model)
    expected = expected_state_bytes(row.name, model, **options)
    assert state_bytes(optimizer) == expected
    train(model, optimizer, range(4))
    if not row.turns:  # layers of different sizes
        assert state_bytes(optimizer) == expected
    assert expected_state_bytes(row.name, model.to("meta"), **options) == expected


@every
def test_every_state_tensor_owns_its_storage(row: Row) -> None:
    model = tiny_model()
    optimizer = row.build(model)
    train(model, optimizer, range(4))
    storages = [
        value.untyped_storage()
        for state in optimizer.state.values()
        for value in state.values()
        if isinstance(value, Tensor) and value.numel()
    ]
    assert len({storage.data_ptr() for storage in storages}) == len(storages)
    for state in optimizer.state.values():
        for value in state.values():
            if isinstance(value, Tensor):
                assert value.untyped_storage().nbytes() == value.numel() * value.element_size()


@every
def test_every_tensor_of_a_loaded_state_has_its_dtype(row: Row) -> None:
    optimizer = row.build(tiny_model())
    saved = copy.deepcopy(optimizer.state_dict())
    for key, state in saved["state"].items():
        for entry, value in state.items():
            if not isinstance(value, Tensor):
                continue
            for dtype in (torch.int64, torch.float64, torch.uint8):
                if dtype == value.dtype:
                    continue
                wrong = {**saved["state"], key: {**state, entry: value.to(dtype)}}
                with pytest.raises(ValueError, match=f"has {entry} of dtype {dtype}; accepted is"):
                    optimizer.load_state_dict({**saved, "state": wrong})


BROKEN = (
    ({"step": 3}, "has step as a int; accepted is a tensor"),
    ({"step": torch.tensor([3.0])}, r"has step of shape \(1,\); accepted is \(\)"),
    ({"step": torch.tensor(-1.0)}, "has step=-1.0; accepted is a whole number"),
    ({"step": torch.tensor(float("nan"))}, "has step=nan"),
    ({"step": torch.tensor(2.5)}, "has step=2.5"),
    ({"refreshed_at": 2.0}, "has refreshed_at=2.0; accepted is an integer"),
    ({"refreshed_at": True}, "has refreshed_at=True; accepted is an integer"),
    ({"refreshed_at": -2}, "has refreshed_at=-2; accepted is an integer of at least -1"),
    ({"refreshed_at": 99}, "has refreshed_at=99 after 4 steps"),
    ({"side": 0}, "has side=0; accepted is 1"),
    ({"basis_rows": 99}, "has basis_rows=99; accepted is 16"),
    ({"gap": 0}, "has gap=0; accepted is an integer of at least 1"),
    ({"gap": 1 << 70}, "has gap=1180591620717411303424; accepted"),
)


@pytest.mark.parametrize(("entries", "message"), BROKEN, ids=str)
def test_loaded_numbers_are_those_of_a_state(entries: dict[str, Any], message: str) -> None:
    model = tiny_model()
    optimizer = build("qgalore_adamw_8bit", model, rank=4, weight_bits=None)
    train(model, optimizer, range(4))
    saved = copy.deepcopy(optimizer.state_dict())
    saved["state"][0].update(entries)
    with pytest.raises(
        ValueError, match=rf"the saved state of self_attn\.q_proj\.weight {message}"
    ):
        optimizer.load_state_dict(saved)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s.pop("state"), "has no state"),
        (lambda s: s.pop("param_groups"), "has no param_groups"),
        (lambda s: s["param_groups"][0].pop("params"), "has no params"),
        (lambda s: s["state"].update({99: {}}), r"entries for \[99\], which are in no group"),
        (lambda s: s["state"].update({0: []}), "is a list; accepted is a dict"),
        (lambda s: s["param_groups"][0].update(rank="4"), "rank='4'"),
        (lambda s: s["param_groups"][1].update(lr=-1.0), "lr=-1.0"),
        (lambda s: s["param_groups"][0]["param_names"].pop(), "3 parameters and 2 param_names"),
    ],
    ids=lambda value: value if isinstance(value, str) else "file",
)
def test_a_file_that_is_no_state_changes_nothing(
    change: Callable[[dict[str, Any]], object], message: str
) -> None:
    model = tiny_model()
    optimizer = build("galore_adamw", model, rank=4)
    train(model, optimizer, range(2))
    before = copy.deepcopy(optimizer.state_dict())
    saved = copy.deepcopy(before)
    change(saved)
    with pytest.raises(ValueError, match=message):
        optimizer.load_state_dict(saved)
    assert equal(before, optimizer.state_dict())
    train(model, optimizer, range(2, 3))
