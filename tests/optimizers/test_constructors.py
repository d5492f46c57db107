"""Constructors: the official signatures, what they say to wrong calls, and whose the groups are."""

from __future__ import annotations

import copy
import inspect
import pickle
from typing import Any

import pytest
import torch
from support import tiny_model
from table import train
from torch import nn

from lowrank import optimizers
from lowrank.optimizers import (
    AdamW,
    AdamW8bit,
    ApolloAdamW,
    CoapAdamW,
    FiraAdamW,
    FrugalAdamW,
    GaLoreAdamW,
    GaLoreAdamW8bit,
    OnlineSubspaceAdamW,
    ReLoRAAdamW,
    param_groups,
)
from lowrank.optimizers.engine.keywords import Keyword
from lowrank.optimizers.engine.method import TABLE

ADAM = ["lr", "betas", "eps", "weight_decay"]
ADAM8 = [*ADAM, "amsgrad", "optim_bits", "args", "min_8bit_size", "percentile_clipping"]
ADAFACTOR = ["lr", "eps", "clip_threshold", "decay_rate", "beta1", "weight_decay"]
ADAFACTOR += ["scale_parameter", "relative_step", "warmup_init"]
COAP = ["proj_method", "rank", "rank_ratio_matrix", "rank_ratio_cnn", "restore_state"]
COAP += ["update_interval", "reproject_factor", "scale"]
FIRST = "grouped_params_with_proj"
#: The positional arguments of the official packages' constructors, after `params`.
OFFICIAL = {
    "GaLoreAdamW": [*ADAM, "correct_bias", "no_deprecation_warning"],
    "GaLoreAdamW8bit": [*ADAM8, "block_wise", "is_paged"],
    "GaLoreAdafactor": ADAFACTOR,
    "QGaLoreAdamW8bit": [*ADAM8, "block_wise", "is_paged"],
    "FiraAdamW": [*ADAM, "correct_bias", "no_deprecation_warning"],
    "APOLLOAdamW": [*ADAM, "correct_bias", "scale_front", "disable_nl", "no_deprecation_warning"],
    "CoapAdamW": [FIRST, *ADAM, "correct_bias", "no_deprecation_warning", *COAP],
    "CoapAdafactor": [FIRST, *ADAFACTOR, *COAP],
    "GaLoreLion": ["lr", "betas", "weight_decay"],
    "AdamW": [*ADAM, "amsgrad"],
    "AdamW8bit": [*ADAM8, "block_wise", "is_paged"],
    "Adafactor": ADAFACTOR,
}


def weight() -> nn.Parameter:
    return nn.Parameter(torch.zeros(6, 4))


def group(**keys: Any) -> dict[str, Any]:
    return {"params": [weight()], "rank": 2, **keys}


@pytest.mark.parametrize("name", OFFICIAL)
def test_the_order_is_the_official_one(name: str) -> None:
    parameters = inspect.signature(getattr(optimizers, name)).parameters.values()
    by_position = [p.name for p in parameters if p.kind is p.POSITIONAL_OR_KEYWORD]
    assert by_position[: len(OFFICIAL[name]) + 1] == ["params", *OFFICIAL[name]]


@pytest.mark.parametrize("row", TABLE.values(), ids=lambda row: row.name)
def test_signature_and_help_hold_every_keyword(row: Any) -> None:
    signature = inspect.signature(row.optimizer)
    help_ = inspect.getdoc(row.optimizer) or ""
    for name, keyword in row.optimizer.constructor.keywords.items():
        assert signature.parameters[name].default == keyword.default
        assert keyword.doc, name
        assert f"    {name}: " in help_
    assert "Raises:" in help_


def test_arguments_by_position_are_read_in_order() -> None:
    made = GaLoreAdamW([group()], 1e-2, (0.9, 0.95), 1e-7, 0.1, False)
    read = made.param_groups[0]
    keys = (*ADAM, "correct_bias")
    assert [read[key] for key in keys] == [1e-2, (0.9, 0.95), 1e-7, 0.1, False]
    grouped = CoapAdamW(None, [group()], 0.5)
    assert grouped.param_groups[0]["lr"] == 0.5


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: GaLoreAdamW(), r"GaLoreAdamW needs params"),
        (lambda: GaLoreAdamW([group()], 0.1, lr=0.1), "lr by position and by name"),
        (lambda: AdamW([weight()], *range(6)), r"5 further arguments .*amsgrad.*6 were given"),
    ],
)
def test_calls_that_do_not_fit_raise(call: Any, message: str) -> None:
    with pytest.raises(TypeError, match=message):
        call()


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda: GaLoreAdamW([weight()], rank=8),
            r"^rank=8 is not a keyword of GaLoreAdamW: .*param_groups\(model, rank=8\)",
        ),
        (lambda: FiraAdamW([weight()], alpha=0.5), r"param_groups\(model, alpha=0\.5\)"),
        (lambda: AdamW([weight()], rank=8), "rank=8 is not a keyword of AdamW: .*not project"),
        (lambda: ReLoRAAdamW([weight()], rank=8), r"convert\(name, model, rank=8\)"),
        (lambda: GaLoreAdamW([group()], wieght_decay=0.1), "did you mean 'weight_decay'"),
        (lambda: AdamW8bit([weight()], amsgrad=True), "amsgrad=True: accepted are False"),
        (lambda: AdamW([weight()], amsgrad=True), "amsgrad=True: accepted are False"),
        (lambda: GaLoreAdamW([group()], limiter=1.1), "limiter=1.1: accepted with residual="),
        (lambda: CoapAdamW([group()], [group()]), "exactly one"),
        (lambda: CoapAdamW([group()], proj_method="svd"), "proj_method='svd'"),
    ],
)
def test_wrong_options_say_where_they_belong(call: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        call()
    assert len(str(caught.value)) < 250


def test_keywords_without_effect_are_taken_and_say_so() -> None:
    GaLoreAdamW8bit([group()], amsgrad=False, percentile_clipping=100, block_wise=True)
    GaLoreAdamW8bit([group()], optim_bits=32, args=None, is_paged=False)
    GaLoreAdamW([group()], no_deprecation_warning=False)
    for keys in ({"percentile_clipping": 5}, {"is_paged": True}, {"block_wise": False}):
        with pytest.warns(UserWarning, match="has no effect") as caught:
            made = GaLoreAdamW8bit([group()], **keys)
        assert caught[0].filename == __file__
        assert not keys.keys() & made.param_groups[0].keys()


def test_groups_stay_the_callers() -> None:
    for cls, keys in (
        (ApolloAdamW, {"proj": "svd", "disable_nl": True}),
        (OnlineSubspaceAdamW, {"proj_type": "continuous_sgd"}),
        (FiraAdamW, {"alpha": 0.5}),
        (CoapAdamW, {"restore_state": True, "update_interval": 3}),
    ):
        given = group(**keys)
        before = dict(given)
        first, second = cls([given]), cls([given])
        assert given == before
        assert first.param_groups[0].keys() == second.param_groups[0].keys()


def test_a_failed_group_stays_as_it_was() -> None:
    made = ApolloAdamW([group()])
    bad = group(proj="svd", projector="random")
    before = dict(bad)
    with pytest.raises(ValueError, match="two names of one thing"):
        made.add_param_group(bad)
    assert bad == before
    assert len(made.param_groups) == 1


def test_frugals_density_is_of_marked_groups_alone() -> None:
    plain, marked = {"params": [weight()]}, {"params": [weight()], "is_proj_params": True}
    made = FrugalAdamW([plain, marked], density=0.5)
    assert [g.get("rank_ratio_matrix") for g in made.param_groups] == [None, pytest.approx(2.0)]
    made.load_state_dict(made.state_dict())
    again = FrugalAdamW(made.param_groups)
    assert [g.get("rank_ratio_matrix") for g in again.param_groups] == [None, pytest.approx(2.0)]
    for copied in (copy.deepcopy(made), pickle.loads(pickle.dumps(made))):
        copied.add_param_group({"params": [weight()], "is_proj_params": True})
        assert copied.param_groups[-1]["rank_ratio_matrix"] == pytest.approx(2.0)


class Mine(GaLoreAdamW):
    """A user's class with a constructor of its own."""

    def __init__(self, params: Any, speed: float = 1.0, **options: Any) -> None:
        super().__init__(params, lr=0.01 * speed, **options)


class Named(GaLoreAdamW):
    """A user's class with a keyword of its own, which is a group key too."""

    own_keywords = (Keyword("note", "none", "of the group."),)


def test_users_subclasses() -> None:
    model = tiny_model()
    made = Mine(param_groups(model, rank=4), 2.0, weight_decay=0.1)
    assert made.param_groups[0]["lr"] == 0.02
    assert list(inspect.signature(Mine).parameters) == ["params", "speed", "options"]
    assert list(inspect.signature(Named).parameters)[-1] == "strategy_options"
    assert Named([group()], note="hidden").param_groups[0]["note"] == "hidden"
    assert Named([group()]).param_groups[0]["note"] == "none"
    for copied in (copy.deepcopy(made), pickle.loads(pickle.dumps(made))):
        assert type(copied) is Mine
        assert copied.param_groups[0]["weight_decay"] == 0.1
    train(model, made, range(3))
    assert all(param.isfinite().all() for param in model.parameters())
