"""Draws are a function of seed, name and step: other parameters and wrappers change none."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from support import matrix
from torch import Tensor, nn

from lowrank.optimizers import GaLoreAdamW, build
from lowrank.optimizers.engine.seeds import choose, draw_seed, seed_names, unwrapped_name

#: What draws: name of a method, options, precision.
CASES: dict[str, tuple[str, dict[str, Any], torch.dtype]] = {
    "gaussian": ("apollo_adamw", {}, torch.float32),
    "orthonormal": (
        "galore_adamw",
        {"projector": "random", "distribution": "orthonormal"},
        torch.float32,
    ),
    "coordinate": ("galore_adamw", {"projector": "coordinate"}, torch.float32),
    "head": ("galore_plus_adamw", {"heads": 8, "patterns": ("proj",)}, torch.float32),
    "randomized": ("galore_adamw", {"refresh": "randomized", "rotate": False}, torch.float32),
    "warm": ("galore_adamw", {"refresh": "warm"}, torch.float32),
    "rounding": ("galore_adamw", {"stochastic_rounding": True}, torch.bfloat16),
    "int8": ("qgalore_adamw_8bit", {}, torch.float32),
    "sketch of COAP": ("coap_adamw", {}, torch.float32),
    "matrix": ("flora_adafactor", {"beta1": 0.9}, torch.float32),
}


class Layers(nn.Module):
    """Three hidden matrices and a plain one."""

    def __init__(self) -> None:
        super().__init__()
        self.attn = nn.ModuleList(
            nn.ModuleDict({"q_proj": nn.Linear(32, 64, bias=False)}) for _ in range(3)
        )
        self.head = nn.Linear(64, 16, bias=False)


def train(
    case: str, freeze: tuple[int, ...] = (), wrap: Callable[[nn.Module], Any] = lambda model: model
) -> dict[str, Tensor]:
    """Weights after five steps with given gradients, in which two refreshes lie."""
    name, options, dtype = CASES[case]
    torch.manual_seed(0)
    model = Layers().to(dtype)
    for index in freeze:
        model.attn[index].requires_grad_(False)
    wrapped = wrap(model)
    made = build(name, wrapped, lr=1e-2, rank=8, update_proj_gap=3, seed=5, **options)
    for step in range(5):
        for index, param in enumerate(model.parameters()):
            if param.requires_grad:
                grad = 1e-2 * (matrix(*param.shape, index) + matrix(*param.shape, 99 + step))
                param.grad = grad.to(param.dtype)
        made.step()
    return {
        name: param.detach().dequantize() if hasattr(param, "codes") else param.detach().clone()
        for name, param in model.named_parameters()
    }


@pytest.mark.parametrize("case", CASES)
def test_a_frozen_layer_shifts_no_draw(case: str) -> None:
    whole, part = train(case), train(case, freeze=(0,))
    for name in ("attn.1.q_proj.weight", "attn.2.q_proj.weight", "head.weight"):
        assert torch.equal(whole[name], part[name]), name


@pytest.mark.parametrize("case", ["gaussian", "coordinate", "head", "rounding", "matrix"])
@pytest.mark.parametrize(
    "wrap", [nn.DataParallel, torch.compile], ids=["data parallel", "compiled"]
)
def test_wrappers_change_no_draw(case: str, wrap: Callable[[nn.Module], Any]) -> None:
    plain, wrapped = train(case), train(case, wrap=wrap)
    assert all(torch.equal(plain[name], wrapped[name]) for name in plain)


def test_a_batch_draws_the_sketch_of_each_matrix_alone() -> None:
    """Two matrices of one shape whose step counts differ, refitted in one call."""
    options = {"rank": 2, "refresh": "randomized", "rotate": False, "update_proj_gap": 1}
    grads = [matrix(24, 40, stream).float() for stream in range(4)]
    results = []
    for together in (True, False):
        first, second = (nn.Parameter(torch.zeros(24, 40)) for _ in range(2))
        params = [first, second] if together else [second]
        made = GaLoreAdamW([{"params": params, **options}], lr=1e-2)
        first.grad = grads[0]  # a step of the first one alone
        made.step()
        first.grad, second.grad = grads[1], grads[2]
        made.step()
        results.append(made.state[second]["basis"].clone())
    assert torch.equal(*results)


def test_names() -> None:
    for wrapped in (
        "module.layers.0.weight",
        "_orig_mod.module.layers.0.weight",
        "module._orig_mod.layers._fsdp_wrapped_module.0._checkpoint_wrapped_module.weight",
    ):
        assert unwrapped_name(wrapped) == "layers.0.weight"
    assert unwrapped_name("encoder.module.weight") == "encoder.module.weight"
    assert unwrapped_name("module") == "module"
    params = [torch.zeros(1)] * 2
    assert seed_names([{"params": params}, {"params": params}]) == [
        ["param.0", "param.1"],
        ["param.2", "param.3"],
    ]
    named = {"params": params, "param_names": ["a", "module.b"]}
    assert seed_names([named, named]) == [["a", "b"], ["a#2", "b#2"]]


def test_parameters_without_names_have_draws_of_their_own() -> None:
    pair = [nn.Parameter(torch.zeros(16, 24)) for _ in range(2)]
    made = GaLoreAdamW([{"params": pair, "rank": 4, "projector": "coordinate"}], lr=1e-2)
    for param in pair:
        param.grad = matrix(16, 24, 1).float()
    made.step()
    indices = [made.state[param]["basis_index"] for param in pair]
    assert not torch.equal(*indices)


def test_names_that_come_later_change_no_draw() -> None:
    """Unnamed parameters are called by their places once another group has names."""
    first, second = (nn.Parameter(torch.zeros(8, 8)) for _ in range(2))
    made = GaLoreAdamW([{"params": [first], "rank": 2}], lr=1e-2)
    before = seed_names(made.param_groups)
    made.add_param_group({"params": [("named", second)], "rank": 2})
    assert made.param_groups[0]["param_names"] == ["group0.0"]
    assert seed_names(made.param_groups) == [*before, ["named"]]


def test_each_part_of_a_seed_counts() -> None:
    seeds = [
        draw_seed(seed, name, count, use)
        for seed in range(3)
        for name in ("a", "b", "ab")
        for count in range(3)
        for use in ("basis", "rounding")
    ]
    assert len(set(seeds)) == len(seeds)
    # the same in every process and for ever: checkpoints don't hold random bases
    assert draw_seed(5, "layers.0.weight", 7, "basis") == 9025327629577042444


def test_chosen_coordinates_are_uniform() -> None:
    counts = torch.zeros(20)
    for seed in range(4000):
        drawn = choose(5, 20, draw_seed(seed, "w", 0, "basis"), torch.device("cpu"))
        assert len(drawn) == 5
        assert bool((drawn[1:] > drawn[:-1]).all())
        counts[drawn] += 1
    # binomial with mean 1000 and deviation 27
    assert float((counts - 1000).abs().max()) < 110
    assert torch.equal(choose(7, 7, 1, torch.device("cpu")), torch.arange(7))
