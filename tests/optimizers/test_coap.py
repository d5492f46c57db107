"""COAP: golden rows, the written-out rule, the released code's keywords, 8 bits, resuming."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import references_coap
import torch
from support import matrix, tiny_model
from test_golden import golden_run
from torch import nn

from lowrank.optimizers import (
    CoapAdafactor,
    CoapAdafactor8bit,
    CoapAdamW,
    CoapAdamW8bit,
    build,
)

# shape, update_interval, reproject_factor, large gradients, restore_state, expected
ROWS = (
    ((12, 8), 1000, 5, False, False, (-3.783335e-02, 7.001136e-02, 7.084429e-03, 1.759864e-03)),
    ((8, 12), 1000, 5, False, False, (-8.955672e-02, 7.189367e-02, -5.266927e-03, -1.432158e-03)),
    ((12, 8), 2, 1, False, False, (-1.502431e-02, 4.378957e-02, 3.195897e-03, 1.319684e-03)),
    ((12, 8), 2, 5, True, False, (-3.791076e-02, 7.048775e-02, 7.164121e-03, 1.813911e-03)),
    ((12, 8), 2, 5, True, True, (-3.793675e-02, 7.048117e-02, 7.163525e-03, 1.813099e-03)),
    ((8, 12), 2, 5, True, False, (-9.080803e-02, 7.207255e-02, -4.841618e-03, -1.408979e-03)),
)
ADAFACTOR_ROWS = (
    ((12, 8), (-1.211450e-02, 2.235215e-02, 2.015583e-03, -7.268414e-04)),
    ((8, 12), (-4.157358e-02, 2.349104e-02, -1.791202e-03, -1.629524e-03)),
)


def assert_golden(result: tuple[float, ...], expected: tuple[float, ...]) -> None:
    """To 1e-5; a change of a weight of 0.1 is only known to its fp32 ulps, and sums cancel."""
    assert result == pytest.approx(expected, rel=1e-5, abs=3e-7)


@pytest.mark.parametrize(("shape", "interval", "factor", "large", "restore", "expected"), ROWS)
def test_adamw_golden_rows(
    shape: tuple[int, int],
    interval: int,
    factor: int,
    large: bool,
    restore: bool,
    expected: tuple[float, ...],
) -> None:
    group = {
        "update_interval": interval,
        "reproject_factor": factor,
        "restore_state": restore,
        "scale": 0.25,
    }
    assert_golden(golden_run(CoapAdamW, shape, group, size=1.0 if large else 1e-2), expected)


@pytest.mark.parametrize(("shape", "expected"), ADAFACTOR_ROWS)
def test_adafactor_golden_rows(shape: tuple[int, int], expected: tuple[float, ...]) -> None:
    group = {"update_interval": 2, "reproject_factor": 5, "scale": 0.25}
    result = golden_run(CoapAdafactor, shape, group, size=1.0, beta1=0.9, scale_parameter=False)
    assert_golden(result, expected)


@pytest.mark.parametrize("shape", [(14, 9), (9, 14), (11, 11)], ids=str)
@pytest.mark.parametrize("restore", [False, True])
def test_the_written_out_rule(shape: tuple[int, int], restore: bool) -> None:
    grads = [matrix(*shape, 1) + 0.6 * matrix(*shape, k + 2) for k in range(14)]
    weight = nn.Parameter(0.2 * matrix(*shape, 0))
    expected = references_coap.matrices(
        grads,
        weight.detach(),
        rank=4,
        interval=2,
        factor=3,
        restore=restore,
        lr=0.02,
        scale=0.5,
    )
    group = {"params": [weight], "rank": 4, "scale": 0.5, "restore_state": restore}
    made = CoapAdamW(
        [{**group, "update_interval": 2, "reproject_factor": 3}], lr=0.02, refresh="svd"
    )
    for grad in grads:
        weight.grad = grad.clone()
        made.step()
    torch.testing.assert_close(weight.detach(), expected, rtol=1e-7, atol=1e-9)


def test_official_keywords_sort_parameters() -> None:
    model = nn.ModuleDict(
        {
            "embed": nn.Embedding(40, 16),
            "small": nn.Linear(8, 8),
            "conv": nn.Conv2d(32, 48, 3),
            "tiny": nn.Conv2d(4, 4, 3),
        }
    )
    made = CoapAdamW(
        params=model.parameters(), rank=8, rank_ratio_cnn=2.0, update_interval=4, restore_state=True
    )
    shapes = [[tuple(p.shape) for p in group["params"]] for group in made.param_groups]
    assert shapes[1] == [(40, 16)]
    assert shapes[2] == [(48, 32, 3, 3)]
    assert (8, 8) in shapes[0]
    assert (4, 4, 3, 3) in shapes[0]
    for group in made.param_groups[1:]:
        assert (group["update_proj_gap"], group["moments"]) == (4, "restore")
        assert group["scale"] == 1.0
    grouped = [{"params": [nn.Parameter(torch.zeros(9, 6))], "rank_ratio_matrix": 2}]
    other = CoapAdafactor(grouped_params_with_proj=grouped)
    assert next(iter(other.state.values()))["basis"].shape == (6, 3)
    with pytest.raises(ValueError, match="exactly one"):
        CoapAdamW()
    with pytest.raises(ValueError, match="restore_state=True with moments='reset'"):
        CoapAdamW(
            [{"params": grouped[0]["params"], "rank": 2}], restore_state=True, moments="reset"
        )
    with pytest.raises(ValueError, match="proj_method='svd'"):
        CoapAdamW([{"params": grouped[0]["params"], "rank": 2, "proj_method": "svd"}])


def bases_of(made: Any) -> list[Any]:
    """The shape of each parameter's basis, None for a plain one."""
    states = [made.state[p] for group in made.param_groups for p in group["params"]]
    return [tuple(state["basis"].shape) if "basis" in state else None for state in states]


def test_proj_method_in_a_group_projects_with_the_constructors_rank() -> None:
    def groups(**keys: Any) -> list[dict[str, Any]]:
        weights = [nn.Parameter(torch.zeros(20, 12)) for _ in range(2)]
        return [{"params": weights[:1], "proj_method": "coap", **keys}, {"params": weights[1:]}]

    assert bases_of(CoapAdamW(grouped_params_with_proj=groups(), rank=4)) == [(12, 4), None]
    assert bases_of(CoapAdamW(groups(), rank_ratio_matrix=2)) == [(12, 6), None]
    assert bases_of(CoapAdamW(groups(rank=3), rank=4)) == [(12, 3), None]
    given = groups(restore_state=True)
    CoapAdamW(given, rank=4)
    assert given[0].keys() == {"params", "proj_method", "restore_state"}, "groups are the caller's"
    kernel = nn.Parameter(torch.zeros(40, 40, 3, 3))
    for keys in ({"proj_method": "coap"}, {"rank": 4}):
        made = CoapAdamW([{"params": [kernel], **keys}], rank_ratio_cnn=2.0)
        assert bases_of(made) == [(40, 28)]
    with pytest.raises(ValueError, match="proj_method='coap' in a group without a rank"):
        CoapAdamW(groups())
    with pytest.raises(ValueError, match="rank=4 beside groups none of which is projected"):
        CoapAdamW([{"params": [kernel]}], rank=4)


def test_build_takes_either_name_of_the_interval() -> None:
    for options in ({"update_interval": 7}, {"update_proj_gap": 7}):
        made = build("coap_adamw", tiny_model(), rank=4, **options)
        assert made.param_groups[0]["update_proj_gap"] == 7
        assert made.param_groups[0]["scale"] == 0.25
    assert build("coap_adamw", tiny_model()).param_groups[0]["update_proj_gap"] == 32
    with pytest.raises(ValueError, match="two names"):
        build("coap_adamw", tiny_model(), update_interval=7, update_proj_gap=7)


def test_adafactor_without_a_first_moment_trains() -> None:
    weight = nn.Parameter(0.2 * matrix(14, 9, 0))
    made = CoapAdafactor([{"params": [weight], "rank": 4, "update_interval": 2}], lr=0.01)
    for k in range(5):
        weight.grad = matrix(14, 9, k + 1)
        made.step()
    assert weight.isfinite().all()


@pytest.mark.parametrize("pair", [(CoapAdamW8bit, CoapAdamW), (CoapAdafactor8bit, CoapAdafactor)])
def test_8bit_follows(pair: tuple[Any, Any]) -> None:
    shape, results = (48, 40), []
    start = (0.2 * matrix(*shape, 0)).float()
    for cls, options in zip(pair, ({"min_8bit_size": 0}, {}), strict=True):
        if issubclass(cls, CoapAdafactor):
            options = {**options, "beta1": 0.9, "scale_parameter": False}
        weight = nn.Parameter(start.clone())
        group = {"params": [weight], "rank": 16, "update_interval": 2}
        made = cls([group], lr=0.01, **options)
        for k in range(8):
            weight.grad = (1e-2 * (matrix(*shape, 1) + 0.6 * matrix(*shape, k + 2))).float()
            made.step()
        results.append(weight.detach())
    assert (results[0] - results[1]).norm() < 0.05 * (results[1] - start).norm()


@pytest.mark.parametrize("cls", [CoapAdamW, CoapAdamW8bit, CoapAdafactor, CoapAdafactor8bit])
def test_resuming_between_p_steps_is_exact(cls: Any) -> None:
    own = {"scale_parameter": False, "beta1": 0.9} if issubclass(cls, CoapAdafactor) else {}
    if cls in (CoapAdamW8bit, CoapAdafactor8bit):
        own |= {"min_8bit_size": 0}

    def made(weight: nn.Parameter) -> Any:
        group = {"params": [weight], "rank": 4, "update_interval": 2, "reproject_factor": 3}
        return cls([group], lr=1e-2, normalize_gradient=True, **own)

    pair = [nn.Parameter(matrix(14, 9, 0).float())]
    optimizers = [made(pair[0])]
    for k in range(15):
        if k == 5:
            pair.append(nn.Parameter(pair[0].detach().clone()))
            optimizers.append(made(pair[1]))
            optimizers[1].load_state_dict(copy.deepcopy(optimizers[0].state_dict()))
        for weight, optimizer in zip(pair, optimizers, strict=True):
            weight.grad = matrix(14, 9, k + 1).float()
            optimizer.step()
    assert torch.equal(*pair)
    gram = optimizers[0].state[pair[0]]["basis"]
    assert not torch.allclose(gram.T @ gram, torch.eye(4), atol=1e-3), "P steps have acted"
