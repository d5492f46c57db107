"""Names of unnamed groups, and numbers of NumPy and torch where Python's are meant."""

from __future__ import annotations

import copy
import io
from typing import Any

import numpy as np
import pytest
import torch
from support import set_gradients, tiny_model
from table import Row, every_with, projecting, representative, train
from torch import Tensor, nn

from lowrank.optimizers import (
    AdamW,
    CoapAdamW,
    FrugalAdamW,
    GaLoreAdamW,
    LowRankOptimizer,
    build,
    expected_state_bytes,
    param_groups,
    state_bytes,
)

# Names


def parameter(seed: int = 0, *shape: int) -> nn.Parameter:
    return nn.Parameter(torch.full(shape or (3,), float(seed + 1)))


def names(optimizer: LowRankOptimizer) -> list[list[str]]:
    return [group["param_names"] for group in optimizer.param_groups]


@representative
def test_unnamed_groups_join_named_ones(row: Row) -> None:
    model = tiny_model()
    optimizer = row.build(model)
    extra = [parameter(), parameter(1)]
    count = len(optimizer.param_groups)
    optimizer.add_param_group({"params": extra})
    assert names(optimizer)[-1] == [f"group{count}.0", f"group{count}.1"]
    optimizer.add_param_group({"params": parameter(2)})
    assert names(optimizer)[-1] == [f"group{count + 1}.0"]
    for param in extra:
        param.grad = torch.ones(3)
    set_gradients(model, 0)
    optimizer.step()
    optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))


def test_named_groups_join_unnamed_ones() -> None:
    optimizer = AdamW([parameter(), parameter(1)])
    optimizer.add_param_group({"params": [("bias", parameter(2))]})
    assert names(optimizer) == [["group0.0", "group0.1"], ["bias"]]
    optimizer.add_param_group({"params": iter([parameter(3)]), "param_names": ["last"]})
    assert names(optimizer)[2] == ["last"]


def test_unnamed_groups_alone_have_no_names() -> None:
    optimizer = AdamW([{"params": [parameter()]}, {"params": [parameter(1)]}])
    assert all("param_names" not in group for group in optimizer.param_groups)


@pytest.mark.parametrize("first", ["named", "unnamed"])
def test_the_constructor_takes_groups_of_both_kinds(first: str) -> None:
    groups = [{"params": [("weight", parameter())]}, {"params": [parameter(1)]}]
    optimizer = AdamW(groups if first == "named" else groups[::-1])
    expected = [["weight"], ["group1.0"]] if first == "named" else [["group0.0"], ["weight"]]
    assert names(optimizer) == expected
    model = tiny_model()
    made = GaLoreAdamW([*param_groups(model, rank=4), {"params": [parameter()]}])
    assert names(made)[-1] == ["group3.0"]


def test_names_that_are_taken_are_not_given_again() -> None:
    optimizer = AdamW([("group1.0", parameter()), ("group1.0_", parameter(1))])
    optimizer.add_param_group({"params": [parameter(2)]})
    assert names(optimizer)[1] == ["group1.0__"]


def test_a_refused_group_leaves_no_names_behind() -> None:
    optimizer = AdamW([parameter()])
    for wrong in ({"weight_decay": -1.0}, {"param_names": ["a", "b"]}, {"lr": "fast"}):
        with pytest.raises(ValueError, match=r"weight_decay=-1|2 param_names|lr='fast'"):
            optimizer.add_param_group({"params": [parameter(1)], "param_names": ["a"], **wrong})
        assert len(optimizer.param_groups) == 1
        assert "param_names" not in optimizer.param_groups[0]
    with pytest.raises(ValueError, match="more than one parameter group"):
        optimizer.add_param_group(
            {"params": optimizer.param_groups[0]["params"], "param_names": ["a"]}
        )
    assert "param_names" not in optimizer.param_groups[0]


# Numbers


def saved(optimizer: LowRankOptimizer) -> dict[str, Any]:
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    loaded: dict[str, Any] = torch.load(file, weights_only=True)
    return loaded


def plain(optimizer: LowRankOptimizer, lr: type = float) -> None:
    for group in optimizer.param_groups:
        for key, value in group.items():
            entries = value if isinstance(value, tuple | list) else [value]
            for entry in entries:
                if not isinstance(entry, Tensor):
                    assert type(entry) in (int, float, bool, str, type(None)), (key, value)
        assert isinstance(group["lr"], lr)


NO_BETAS = (
    "adafactor",
    "coap_adafactor",
    "coap_adafactor_8bit",
    "flora_adafactor",
    "galore_adafactor",
    "online_subspace_adafactor",
)

KINDS = {
    "numpy": (np.int64, np.float32, np.bool_),
    "numpy64": (np.int32, np.float64, np.bool_),
    "array": (np.array, np.array, np.array),
    "tensor": (torch.tensor, torch.tensor, torch.tensor),
}


@every_with("kind", tuple(KINDS))
def test_numbers_are_converted_at_the_door(row: Row, kind: str) -> None:
    integer, number, flag = KINDS[kind]
    rate = 0.01 if kind == "tensor" else number(0.01)  # a tensor as rate stays one
    model, twin = tiny_model(), tiny_model()
    options: dict[str, Any] = {"rank": 4, "update_proj_gap": 3, "weight_decay": 0.5}
    given = {
        "rank": integer(4),
        "update_proj_gap": integer(3),
        "weight_decay": number(0.5),
        "maximize": flag(True),
    }
    if row.name not in NO_BETAS:
        options["betas"] = (0.75, 0.5)
        given["betas"] = (number(0.75), number(0.5))
    optimizer = row.build(model, lr=rate, **given)
    other = row.build(twin, lr=float(rate), maximize=True, **options)
    plain(optimizer)
    assert state_bytes(optimizer) == state_bytes(other)
    train(model, optimizer, range(3))
    train(twin, other, range(3))
    for a, b in zip(model.parameters(), twin.parameters(), strict=True):
        assert torch.equal(a, b)
    optimizer.load_state_dict(saved(optimizer))


@projecting
def test_numbers_in_groups_are_converted(row: Row) -> None:
    weight = nn.Parameter(torch.ones(8, 6))
    group = {"params": [weight], "rank": np.int64(2), "scale": np.float32(0.5), "seed": np.int8(3)}
    if row.name == "galore_plus_adamw":
        group |= {"projector": "cross_head", "heads": np.int64(2)}
    optimizer = row.optimizer([group], lr=np.float32(0.1))
    optimizer.add_param_group({"params": [parameter()], "lr": np.float64(0.2), "note": np.int64(1)})
    plain(optimizer)
    saved(optimizer)


def test_translated_keys_take_numpy_numbers() -> None:
    weight = nn.Parameter(torch.ones(8, 6))
    frugal = FrugalAdamW([{"params": [weight], "density": np.float32(0.5)}])
    assert frugal.state[weight]["exp_avg"].shape == (8, 3)
    plain(frugal)
    flag = {"rank": 2, "restore_state": np.bool_(True), "update_interval": np.int64(4)}
    coap = CoapAdamW([{"params": [weight], **flag}])
    assert coap.param_groups[0]["moments"] == "restore"
    plain(coap)
    bytes_ = expected_state_bytes("galore_adamw", tiny_model(), rank=np.int64(4))
    assert bytes_ == expected_state_bytes("galore_adamw", tiny_model(), rank=4)


@representative
def test_numbers_that_a_scheduler_assigns_are_converted_when_read(row: Row) -> None:
    model = tiny_model()
    optimizer = row.build(model)
    train(model, optimizer, range(2))
    group = optimizer.param_groups[0]
    group["lr"] = np.float64(0.003)
    group["weight_decay"] = np.float32(0.5)
    optimizer.load_state_dict(saved(optimizer))  # also before a step has read them
    optimizer.param_groups[0]["lr"] = np.float32(0.5)
    optimizer.param_groups[1]["weight_decay"] = torch.tensor(0.25)
    train(model, optimizer, range(2, 3))
    plain(optimizer)
    assert optimizer.param_groups[0]["lr"] == 0.5
    assert optimizer.param_groups[1]["weight_decay"] == 0.25


def test_a_rate_may_be_a_tensor_and_a_label_anything() -> None:
    rate = torch.tensor(0.1)
    label = torch.tensor(3.0)
    optimizer = AdamW([{"params": [parameter()], "label": label}], lr=rate)
    assert optimizer.param_groups[0]["lr"] is rate
    assert optimizer.param_groups[0]["label"] is label
    plain(optimizer, Tensor)
    saved(optimizer)


WRONG = (
    ({"rank": "8"}, "rank='8'"),
    ({"rank": 8.0}, "rank=8.0"),
    ({"rank": np.float64(8.0)}, "rank=8.0"),
    ({"rank": torch.tensor(8.0)}, "rank=8.0"),
    ({"rank": np.array([8])}, "rank=array"),
    ({"rank": np.bool_(True)}, "rank=True"),
    ({"update_proj_gap": np.str_("3")}, "update_proj_gap='3'"),
    ({"lr": np.array([0.1, 0.2])}, r"lr=array"),
    ({"lr": np.float32("nan")}, "lr=nan"),
    ({"lr": torch.tensor(-1.0)}, "lr=-1.0"),
    ({"betas": np.array([0.9, 0.99])}, "betas=array"),
)


@pytest.mark.parametrize(("options", "message"), WRONG, ids=str)
def test_what_is_no_such_number_stays_an_error(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build("galore_adamw", tiny_model(), **options)
    model = tiny_model()
    optimizer = build("galore_adamw", model)
    optimizer.param_groups[0].update(options)
    set_gradients(model, 0)
    with pytest.raises(ValueError, match=message):
        optimizer.step()
