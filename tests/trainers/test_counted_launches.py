"""What steps ask of a GPU: few launches, whatever the number of matrices, and no number back."""

from __future__ import annotations

from typing import Any

import pytest
from support import capturing

from lowrank.optimizers import available
from lowrank.optimizers.engine.method import TABLE
from lowrank.trainers.plan.cards import card_bytes
from lowrank.trainers.plan.launches import count_step, list_launches

LLAMA_60M = (1376, 512)
LLAMA_7B = (11008, 4096)
#: Launches of a step of one shape that are no products with, or passes over, single matrices.
BOUNDS = {
    **{"galore_adamw": 12, "galore_adamw_8bit": 12, "qgalore_adamw_8bit": 12, "coap_adamw": 12},
    **{"frugal_adamw": 30, "online_subspace_adamw": 30, "galore_muon": 30, "galore_adafactor": 30},
    **{"fira_adamw": 30, "apollo_adamw": 30, "online_subspace_lion": 30},
}


@pytest.mark.parametrize("name", BOUNDS)
def test_launches_do_not_grow_with_the_matrices(name: str) -> None:
    few, many = (count_step(name, LLAMA_60M, count, rank=128) for count in (2, 16))
    assert few.operations == many.operations <= BOUNDS[name], many.by_name
    assert few.products / 2 == many.products / 16
    assert many.passes <= 8 * few.passes
    assert many.reads == 0
    assert not many.sends


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=() if name == "galore_muon" else pytest.mark.slow)
        for name in BOUNDS
    ],
)
def test_a_shape_of_7b_at_rank_1024_takes_one_batch(name: str) -> None:
    found = count_step(name, LLAMA_7B, 64, rank=1024, memory=card_bytes("H100"))
    assert found.operations <= BOUNDS[name], found.by_name
    assert found.pieces <= 3
    assert found.scratch <= card_bytes("H100") // 16


def test_full_rank_muon_takes_few_operations_besides_products() -> None:
    found = count_step("muon", LLAMA_7B, 8, memory=card_bytes("H100"))
    assert (found.reads, found.products) == (0, 15)  # each of all eight
    assert found.operations <= 10
    assert found.pieces == 0


@pytest.mark.parametrize("name", ["galore_adamw", "fira_adamw", "online_subspace_lion"])
def test_a_matrix_of_7b_is_cut_into_few_pieces(name: str) -> None:
    least = 0 if name == "galore_adamw" else 1  # one product a matrix, uncut
    assert least <= count_step(name, LLAMA_7B, 2, rank=1024).pieces <= 3


def test_launches_of_list_operations() -> None:
    assert list_launches([], 1) == (0, 0)
    assert list_launches([5] * 110, 1) == (1, 0)
    assert list_launches([5] * 111, 1) == (2, 0)
    assert list_launches([5] * 64, 2) == (1, 0)
    assert list_launches([0, 5], 2) == (1, 0)
    assert list_launches([(1 << 16) * 321], 3) == (2, 1)  # the first has as much as one takes


def test_the_counter_counts() -> None:
    found = count_step("adamw", LLAMA_60M, 2)
    assert found.reads == 0
    assert sum(found.by_name.values()) == found.operations + found.products + found.passes
    assert count_step("ldadam_adamw", LLAMA_60M, 2, rank=128).reads > 0  # each step refits


#: One of each kind; the others are slow tests.
QUICK = {"adamw", "fira_adamw", "frugal_adamw", "galore_adamw", "online_subspace_adamw_8bit"}
CAPTURABLE = [
    pytest.param(name, marks=() if name in QUICK else pytest.mark.slow)
    for name in available()
    if TABLE[name].optimizer.supports_capturable
]


@pytest.mark.parametrize("name", CAPTURABLE)
def test_steps_between_refreshes_can_be_captured(name: str) -> None:
    """No number is read, nothing is copied from the host, and no size depends on data."""
    options: dict[str, Any] = {"heads": 2} if name == "galore_plus_adamw" else {}
    if name == "frugal_adamw":
        options["moments"] = "keep"
    with capturing():
        found = count_step(name, (512, 384), 2, rank=16, capturable=True, **options)
    assert (found.reads, found.sends) == (0, 0), found.by_name


@pytest.mark.parametrize(
    "options", [{"weight_bits": 8}, {"weight_bits": 4}, {"dense": True}], ids=str
)
@pytest.mark.parametrize("name", ["galore_adamw", "fira_adamw", "adamw", "adamw_8bit"])
def test_steps_that_round_stochastically_can_be_captured(
    name: str, options: dict[str, Any]
) -> None:
    given = {"stochastic_rounding": True} if "dense" in options else options
    given = {**given, "device_rate": True, "weight_decay": 0.1}
    if "adamw" not in name.split("_", 1)[0]:
        given["rank"] = 16
    with capturing():
        found = count_step(name, (512, 384), 2, capturable=True, **given)
    assert (found.reads, found.sends) == (0, 0), found.by_name
    assert found.by_name["lowrank::step_seeds"] == (0 if options.get("weight_bits") == 4 else 1)


@pytest.mark.parametrize("name", ["adamw_8bit", "racs_adamw", "foam_adamw", "scale_sgd"])
def test_plain_parameters_read_nothing(name: str) -> None:
    assert count_step(name, (512, 384), 2).reads == 0


@pytest.mark.parametrize(
    "name", ["galore_adamw", "apollo_adamw", "frugal_adamw", "coap_adamw", "qgalore_adamw_8bit"]
)
def test_reads_of_a_refresh_do_not_grow_with_the_matrices(name: str) -> None:
    few, many = (
        count_step(name, (512, 384), count, rank=16, stagger=False, refreshing=True)
        for count in (2, 4)
    )
    assert 0 < few.reads == many.reads, many.by_name
