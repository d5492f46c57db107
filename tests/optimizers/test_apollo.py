"""APOLLO: golden rows, the released package beside ours, and the rule written out."""

from __future__ import annotations

import copy
import importlib.util
import warnings
from typing import Any

import pytest
import references
import references_beyond
import torch
from support import matrix
from test_golden import golden_run
from torch import Tensor, nn

from lowrank import cuda
from lowrank.optimizers import ApolloAdamW, ApolloMiniAdamW, build, state_bytes
from lowrank.optimizers.projectors.random import gaussian

SHAPES = ((14, 9), (9, 14), (11, 11))
ROWS = (
    ((12, 8), "channel", (-7.197880e-01, 5.145181e-01, -4.202883e-02, 4.038640e-02)),
    ((12, 8), "tensor", (-6.267725e-01, 5.075338e-01, -2.933129e-02, 2.895505e-02)),
    ((8, 12), "channel", (-1.038606e00, 8.846853e-01, -4.069196e-02, 3.186709e-02)),
)


def gradients(shape: tuple[int, int], steps: int = 12) -> list[Tensor]:
    # a size that jumps makes the limiter act
    return [
        1e-2 * (1.0 + (k % 4)) * (matrix(*shape, 1) + 0.6 * matrix(*shape, k + 2))
        for k in range(steps)
    ]


def train(made: torch.optim.Optimizer, weight: nn.Parameter, grads: list[Tensor]) -> Tensor:
    for grad in grads:
        weight.grad = grad.to(weight.dtype).clone()
        made.step()
    return weight.detach()


@pytest.mark.parametrize(("shape", "scale_type", "expected"), ROWS)
def test_golden_rows(shape: tuple[int, int], scale_type: str, expected: tuple[float, ...]) -> None:
    group = {"update_proj_gap": 1000, "proj": "svd", "scale": 4.0, "scale_type": scale_type}
    assert golden_run(ApolloAdamW, shape, group) == pytest.approx(expected, rel=1e-5)


@pytest.mark.skipif(
    importlib.util.find_spec("apollo_torch") is None,
    reason='apollo-torch is not installed: pip install "lowrank-pretrain[peers]"',
)
@pytest.mark.parametrize("shape", [(24, 16), (16, 24), (20, 20)], ids=str)
@pytest.mark.parametrize("scale_type", ["channel", "tensor"])
@pytest.mark.parametrize("scale_front", [False, True])
@pytest.mark.parametrize("disable_nl", [False, True])
def test_side_by_side_with_apollo_torch(
    shape: tuple[int, int], scale_type: str, scale_front: bool, disable_nl: bool
) -> None:
    """25 steps, five refreshes of singular vectors, weight decay: 1e-5 relative in fp32."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from apollo_torch import APOLLOAdamW
    group = {
        "rank": 5,
        "update_proj_gap": 5,
        "scale": 4.0,
        "proj_type": "std",
        "proj": "svd",
        "scale_type": scale_type,
    }
    options: dict[str, Any] = {
        "lr": 0.01,
        "weight_decay": 0.05,
        "scale_front": scale_front,
        "disable_nl": disable_nl,
    }
    results = []
    for cls, extra in ((ApolloAdamW, {"refresh": "svd"}), (APOLLOAdamW, {})):
        weight = nn.Parameter((0.2 * matrix(*shape, 0)).float())
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            made = cls([{"params": [weight], **group}], **options, **extra)
            results.append(train(made, weight, gradients(shape, 25)))
    start = (0.2 * matrix(*shape, 0)).float()
    ours, theirs = results
    allowed = 1e-5 * (theirs - start).norm() + 25 * 2**-24 * start.norm()
    assert (ours - theirs).norm() < allowed


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("side", ["std", "left", "right"])
@pytest.mark.parametrize("scale_type", ["channel", "tensor"])
@pytest.mark.parametrize("scale_front", [False, True])
@pytest.mark.parametrize("limit", [1.01, None])
def test_equals_the_written_out_rule(
    shape: tuple[int, int], side: str, scale_type: str, scale_front: bool, limit: float | None
) -> None:
    """With random bases, taken from the projector: the same ones at each of a gap's steps."""
    weight, grads, drawn = nn.Parameter(0.2 * matrix(*shape, 0)), gradients(shape), []
    group = {
        "params": [weight],
        "rank": 4,
        "update_proj_gap": 5,
        "scale": 4.0,
        "proj_type": side,
        "scale_type": scale_type,
        "scale_front": scale_front,
        "limiter": limit,
    }
    start = weight.detach().clone()
    made = ApolloAdamW([group], lr=0.02, weight_decay=0.1)
    composition = made.compose(made.param_groups[0])
    assert composition.projection is not None
    projector = composition.projection.projector
    draw = type(projector)._draw

    def recorded(self: Any, param: Any, refreshed: int) -> Any:
        drawn.append((param.steps_done, draw(self, param, refreshed)[0]))
        return drawn[-1][1:]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(type(projector), "_draw", recorded)
        train(made, weight, grads)
    by_step = dict(drawn)
    for k, basis in drawn:
        assert torch.equal(basis, by_step[k - k % 5])
    assert not torch.equal(by_step[0], by_step[5])
    left = side == "left" or (side == "std" and shape[0] < shape[1])
    expected = references_beyond.apollo(
        grads,
        start,
        lambda k: references_beyond.one_sided(by_step[k], left),
        lr=0.02,
        scale=4.0,
        scale_type=scale_type,
        scale_front=scale_front,
        limiter=limit,
        weight_decay=0.1,
    )
    tolerance = 1e-9 if limit is None else 1e-6  # the limiter's norm is stored in fp32
    torch.testing.assert_close(weight.detach(), expected, rtol=tolerance, atol=tolerance / 10)


def test_singular_bases_follow_the_reference() -> None:
    weight, grads = nn.Parameter(0.2 * matrix(9, 14, 0)), gradients((9, 14))
    bases = [references.galore_bases(grads[k - k % 5], 4, "std") for k in range(len(grads))]
    expected = references_beyond.apollo(
        grads, weight.detach(), bases.__getitem__, lr=0.02, scale=1.0, scale_type="channel"
    )
    group = {"params": [weight], "rank": 4, "update_proj_gap": 5, "proj": "svd"}
    result = train(ApolloAdamW([group], lr=0.02, refresh="svd"), weight, grads)
    torch.testing.assert_close(result, expected, rtol=1e-6, atol=1e-7)


def test_gaussian_bases_cost_no_memory_and_keep_norms() -> None:
    weight = nn.Parameter(torch.zeros(96, 200))
    made = ApolloAdamW([{"params": [weight], "rank": 64}], lr=1e-3)
    assert state_bytes(made) == 2 * 4 * 64 * 200 + 4 + 4  # moments, step, limiter
    weight.grad = torch.randn(96, 200)
    made.step()
    norms = made.state[weight]["exp_avg"].norm() / 0.1 / weight.grad.norm()
    assert norms == pytest.approx(1.0, abs=0.05)


@pytest.mark.parametrize("side", ["std", "full"])
def test_a_captured_step_reads_its_seed_from_the_state(side: str) -> None:
    """What a graph records is the place of the number, which a refresh overwrites."""
    weight = nn.Parameter(torch.zeros(8, 12))
    group = {"params": [weight], "rank": 4, "update_proj_gap": 3, "proj_type": side}
    made = ApolloMiniAdamW([group], lr=1e-3, capturable=True)
    keys = ["basis_seed", "basis_right_seed"][: 1 + (side == "full")]
    numbers, moments = [], []
    for _ in range(4):
        weight.grad = matrix(8, 12, 1).float()
        made.step()
        state = made.state[weight]
        numbers.append([int(state[key]) for key in keys])
        moments.append(state["exp_avg"].clone())
    assert numbers[0] == numbers[1] == numbers[2]
    assert all(a != b for a, b in zip(numbers[0], numbers[3], strict=True))
    assert len(set(numbers[3])) == len(keys)
    assert [made.state[weight][key].dtype for key in keys] == [torch.int64] * len(keys)
    # another number there is another basis, without a refresh
    copied = copy.deepcopy(made)
    (other,) = copied.param_groups[0]["params"]
    copied.state[other]["basis_seed"].fill_(7)
    for optimizer, param in ((made, weight), (copied, other)):
        param.grad = matrix(8, 12, 1).float()
        optimizer.step()
    assert not torch.equal(made.state[weight]["exp_avg"], copied.state[other]["exp_avg"])
    bytes_of_moments = state["exp_avg"].nbytes + state["exp_avg_sq"].nbytes
    assert state_bytes(made) == bytes_of_moments + 4 + 4 + 8 * len(keys)


def test_capturable_draws_the_same_bases() -> None:
    results = []
    for capturable in (False, True):
        weight = nn.Parameter(torch.zeros(8, 12))
        group = {"params": [weight], "rank": 4, "update_proj_gap": 2}
        made = ApolloAdamW([group], lr=1e-3, capturable=capturable)
        for step in range(4):
            weight.grad = matrix(8, 12, step).float()
            made.step()
        results.append(made.state[weight]["exp_avg"])
    assert torch.equal(*results)


def test_a_checkpoint_without_seeds_loads() -> None:
    """Version 0.1.0 kept none under `capturable`; its groups have no `moments_dtype` either."""
    weight = nn.Parameter(torch.zeros(8, 12))
    made = ApolloAdamW([{"params": [weight], "rank": 4}], lr=1e-3, capturable=True)
    weight.grad = matrix(8, 12, 1).float()
    made.step()
    saved = made.state_dict()
    for group in saved["param_groups"]:
        del group["moments_dtype"]
    del saved["state"][0]["basis_seed"]
    made.load_state_dict(saved)
    assert int(made.state[weight]["basis_seed"]) != 0
    made.step()


def test_bases_are_the_same_on_every_device() -> None:
    """Drawn by the package's own generator: known numbers, whatever torch's generators do."""
    drawn = gaussian((1000, 50), 11, torch.empty(0))
    torch.manual_seed(99)
    assert torch.equal(drawn, gaussian((1000, 50), 11, torch.empty(0)))
    assert torch.equal(drawn, gaussian((1000, 50), torch.tensor(11), torch.empty(0)))
    assert torch.equal(drawn, cuda.gaussian((1000, 50), 11) * 50**-0.5)
    assert float(drawn.std()) == pytest.approx(50**-0.5, rel=0.02)
    assert gaussian((4, 2), 11, torch.empty(0, dtype=torch.bfloat16)).dtype == torch.float32
    assert gaussian((4, 2), 11, torch.empty(0, dtype=torch.float64)).dtype == torch.float64


def test_seeds_matrices_and_refreshes_draw_apart() -> None:
    def moments(seed: int, steps: int = 1) -> list[Tensor]:
        pair = [nn.Parameter(torch.zeros(8, 12)) for _ in range(2)]
        group = {"params": pair, "rank": 4, "update_proj_gap": 2, "seed": seed}
        made = ApolloAdamW([group], lr=1e-3)
        for _ in range(steps):
            for weight in pair:
                weight.grad = matrix(8, 12, 1).float()
            made.step()
        return [made.state[weight]["exp_avg"] for weight in pair]

    first, second = moments(0)
    assert not torch.equal(first, second)
    assert torch.equal(first, moments(0)[0])
    assert not torch.equal(first, moments(1)[0])
    # within a gap the moment of a constant gradient keeps its direction, across gaps it does not
    within, across = moments(0, 2)[0], moments(0, 3)[0]
    torch.testing.assert_close(within / within.norm(), first / first.norm())
    assert (across / across.norm() - first / first.norm()).norm() > 0.1


def test_mini_is_rank_one_with_one_factor_a_tensor() -> None:
    model = nn.ModuleDict({"attn": nn.Linear(8, 12, bias=False)})
    made = build("apollo_mini_adamw", model)
    group = made.param_groups[0]
    assert (group["rank"], group["scale"], group["scale_type"]) == (1, 128.0, "tensor")
    assert made.state[model["attn"].weight]["exp_avg"].shape == (12, 1)
    assert isinstance(made, ApolloMiniAdamW)
    weight, before = model["attn"].weight, model["attn"].weight.detach().clone()
    weight.grad = matrix(12, 8, 1).float()
    made.step()
    change = weight.detach() - before
    torch.testing.assert_close(change / change.norm(), -weight.grad / weight.grad.norm())


def test_official_keywords() -> None:
    weight = nn.Parameter(torch.zeros(4, 6))
    group = {"params": [weight], "rank": 2}
    made = ApolloAdamW([{**group, "proj": "svd", "disable_nl": True}], scale_front=True)
    read = made.param_groups[0]
    assert (read["projector"], read["limiter"], read["scale_front"]) == ("singular", None, True)
    assert ApolloAdamW([{**group}], disable_nl=True).param_groups[0]["limiter"] is None
    with pytest.raises(ValueError, match="proj='magic'"):
        ApolloAdamW([{**group, "proj": "magic"}])
    with pytest.raises(ValueError, match="proj='svd' with projector='random'"):
        ApolloAdamW([{**group, "proj": "svd", "projector": "random"}])
    with pytest.raises(ValueError, match=r"disable_nl=True with limiter=1\.1"):
        ApolloAdamW([{**group}], disable_nl=True, limiter=1.1)
    with pytest.raises(ValueError, match=r"scale=-1\.0"):
        ApolloAdamW([{**group, "scale": -1.0}])
    with pytest.raises(ValueError, match="scale_type='row'"):
        ApolloAdamW([{**group, "scale_type": "row"}])
    with pytest.raises(ValueError, match="basis with distribution='gaussian'"):
        ApolloAdamW([{**group, "basis": "float32"}])


def test_no_whole_temporary() -> None:
    weight = nn.Parameter(torch.zeros(512, 1024))
    made = ApolloAdamW([{"params": [weight], "rank": 8}], lr=0.01, skip_nonfinite=False)
    weight.grad = torch.randn(512, 1024)
    made.step()
    with torch.profiler.profile(profile_memory=True) as profile:
        made.step()
    assert max(event.cpu_memory_usage for event in profile.events()) < 512 * 1024 * 4 / 4
