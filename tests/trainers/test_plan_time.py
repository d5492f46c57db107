"""Modelled times: counted work, what it takes a card, and what wrong use says."""

import functools
import json
import re
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
from support import ROOT
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from lowrank.trainers.cli import main
from lowrank.trainers.plan.cards import CARDS, card_bytes
from lowrank.trainers.plan.counted import count_steps
from lowrank.trainers.plan.driverless import driverless
from lowrank.trainers.plan.launches import LaunchCounter, Launches, count_step
from lowrank.trainers.plan.network import new_network
from lowrank.trainers.plan.planner import asked
from lowrank.trainers.plan.speed import DATA_SHEETS, Speed, card_speed, measured_speed
from lowrank.trainers.plan.time_table import ranking_of_times
from lowrank.trainers.plan.timing import (
    NotModelled,
    collectives,
    part_of,
    rank_times,
    step_time,
)
from lowrank.trainers.plan.work import Work

_aten = torch.ops.aten
M, N, RANK = 512, 1376, 128


@functools.cache
def counted(method: str, matrices: int) -> Launches:
    return count_step(method, (N, M), matrices, rank=RANK, memory=card_bytes("H100"))


def total(found: Launches) -> tuple[float, float, float]:
    """Launches, bytes and operations of products."""
    launches = moved = flops = 0.0
    for work, number in found.work.items():
        launches += number * work.launches
        moved += number * work.moved
        flops += number * work.flops
    return launches, moved, flops


@pytest.mark.parametrize("method", ["galore_adamw", "fira_adamw", "apollo_adamw"])
def test_work_has_the_launches_of_the_documented_rows(method: str) -> None:
    page = (ROOT / "docs" / "gpu_steps.md").read_text("utf-8")
    row = re.search(rf"^\| `{method}` \| 60m \| 128 \| (.*) \|$", page, re.MULTILINE)
    assert row is not None
    _, operations, filled, products, passes, _ = row[1].split(" | ")
    launches, _, _ = total(counted(method, 16))
    each = (float(products) + float(passes)) * 16
    written_once = 1 if method == "apollo_adamw" else 0  # one list of all 16, not of all 32
    documented = int(operations.split(", ")[-1]) + int(filled) + each
    assert launches == counted(method, 16).launches
    assert launches == pytest.approx(documented, abs=1 + written_once)


def test_a_step_of_galore_is_that_of_the_algebra() -> None:
    """P^T G, Adam on r x n, W -= P N: 4 m n r operations, each of them moves a tensor once."""
    found = counted("galore_adamw", 1)
    weight, low, basis = (2 * a * b for a, b in ((M, N), (RANK, N), (M, RANK)))
    by_name = Counter[str]()
    for work, number in found.work.items():
        by_name[work.name] += number * work.moved
    assert total(found)[2] == 4.0 * M * N * RANK
    projecting, writing = basis + weight + low, basis + low + 2 * weight
    assert by_name["mm"] + by_name["addmm_"] == projecting + writing
    # The gradient is read and the direction written in bf16, two moments read and written in fp32.
    assert by_name["lowrank::adam"] == pytest.approx(2 * low + 4 * 2 * low, rel=0.001)
    rest = total(found)[1] - sum(by_name[name] for name in ("mm", "addmm_", "lowrank::adam"))
    assert 0 < rest <= 3.01 * low  # whether it is finite: read, and masked in place


def test_an_operation_takes_the_longest_of_what_bounds_it() -> None:
    speed = Speed("x", 1e12, {"bf16": 1e14, "fp32": 1e13}, kernel=2e-6, launch=5e-6)
    assert speed.seconds(Work("a", 3, 10)) == pytest.approx(6e-6)
    assert speed.seconds(Work("a", 1, 5_000_000_000)) == pytest.approx(5e-3)
    assert speed.seconds(Work("a", 1, 10, 1e12, "bf16")) == pytest.approx(1e-2)
    assert speed.seconds(Work("a", 1, 10, 1e12, "fp32", 0.1)) == pytest.approx(1.0)
    found = Launches(operations=4, reads=2, work={Work("a", 2, 10): 2})
    part = part_of("step", found, speed)
    assert part.device == pytest.approx(8e-6)
    assert part.host == pytest.approx(4 * 5e-6 + 2 * speed.read)
    assert part.seconds == part.host


def moved_by(call: Callable[..., Any], *shapes: tuple[int, ...]) -> float:
    """Bytes of one operation on fp32 tensors of a GPU."""
    with FakeTensorMode(), driverless(torch.device("cuda")):
        tensors = [torch.empty(shape, device="cuda") for shape in shapes]
        with LaunchCounter((0, 0), 0) as counter:
            call(*tensors)
    return total(counter.found)[1]


def test_bytes_of_operations() -> None:
    one, tall, few = (8, 8), (1000, 8), (5,)
    assert moved_by(torch.add, one, one) == 3 * 256
    assert moved_by(torch.square, one) == 2 * 256
    assert moved_by(lambda x, y: x.mul_(y), one, one) == 3 * 256  # two read, one written
    assert moved_by(lambda x, y: _aten.copy_(x, y), one, one) == 2 * 256
    assert moved_by(lambda x: x.zero_(), one) == 256
    assert moved_by(lambda x: x.mul(x), one) == 2 * 256
    assert moved_by(lambda x, y: torch.mm(x, x, out=y), one, one) == 2 * 256
    assert moved_by(lambda x: _aten.clone(_aten.expand(x, (8, 8))), (1, 8)) == 32 + 256
    # Five rows are read and written, and five positions of eight bytes read, after they were made.
    made = 5 * (4 + 8)
    assert moved_by(lambda x, y: x.index_select(0, y.long()), tall, few) == made + 5 * (8 + 2 * 32)


def test_more_bandwidth_is_never_slower() -> None:
    found = counted("fira_adamw", 16)
    last = float("inf")
    for bandwidth in (1e11, 1e12, 1e13, 1e15):
        own = measured_speed("x", bandwidth, {"bf16": 1e14, "fp32": 1e13})
        now = part_of("step", found, own).device
        assert now <= last
        last = now
    faster, slower = (part_of("step", found, card_speed(card)) for card in ("H200", "H100"))
    assert faster.device < slower.device


def test_a_step_is_the_sum_of_its_parts() -> None:
    made = step_time("llama_9m", "galore_adamw", card="H100", sequence=64)
    assert made.refreshing is not None
    assert made.gap == 50
    assert made.refresh == pytest.approx((made.refreshing.seconds - made.step.seconds) / 50)
    assert made.seconds == made.passes.seconds + made.step.seconds + made.refresh
    assert made.worst == made.passes.seconds + made.refreshing.seconds > made.seconds
    told = made.to_dict()
    assert told["modelled"] is True
    assert told["tokens_per_second"] == pytest.approx(64 / made.seconds)
    assert told["parts"]["optimizer step"]["launches"] == made.step.launches
    json.dumps(told)


class Deep(nn.Module):
    """Blocks of two shapes."""

    def __init__(self, depth: int) -> None:
        super().__init__()
        with torch.device("meta"):
            self.layers = nn.ModuleList(
                nn.ModuleDict(
                    {"mlp": nn.Linear(48, 32, bias=False), "self_attn": nn.Linear(32, 32)}
                )
                for _ in range(depth)
            )


def test_few_blocks_stand_for_many(monkeypatch: pytest.MonkeyPatch) -> None:
    options = {"lr": 1e-3, "rank": 4, "update_proj_gap": 10}
    count = functools.partial(count_steps, "galore_adamw", lambda: Deep(13), options=options)
    few = count()
    monkeypatch.setattr("lowrank.trainers.plan.counted.DEPTHS", (4, 13))
    many = count()
    assert few.refreshing is not None
    assert many.refreshing is not None
    assert few.gap == many.gap == 10
    for one, other in ((few.usual, many.usual), (few.refreshing, many.refreshing)):
        assert total(one) == pytest.approx(total(other), rel=0.02)
        assert one.launches == pytest.approx(other.launches, abs=3)


def test_several_processes_take_time_for_collectives() -> None:
    speed = card_speed("H100")
    assert speed.link is not None

    def sent(**more: Any) -> float | None:
        setting = asked("llama_9m", "galore_adamw", sequence=64, options={"rank": 4}, **more)
        network = new_network(setting.source, torch.device("meta"))
        params = sum(param.nbytes for param in network.parameters())
        found, _ = collectives(setting, network, speed)
        return None if found is None else found * speed.link / params

    assert sent() is None
    assert sent(world=4, strategy="ddp") == pytest.approx(2 * 3 / 4)
    # Weights twice and gradients once, and something of the optimizer's own.
    fsdp = sent(world=4, strategy="fsdp2")
    assert fsdp is not None
    assert 3 * 3 / 4 < fsdp < 4 * 3 / 4


def test_cards_have_sound_rates() -> None:
    assert DATA_SHEETS.keys() <= CARDS.keys()
    for bandwidth, bf16, tf32, fp32, fp64, link in DATA_SHEETS.values():
        assert bf16 >= tf32 >= fp32 >= fp64 > 0
        assert 0.1 < bandwidth < 10
        assert link >= 16


def test_measured_rates() -> None:
    speed = measured_speed("x", 1e12, {"bf16": 4e14, "fp32": 5e13}, 4e-6)
    assert speed.flops == {"bf16": 4e14, "fp32": 5e13, "tf32": 5e13, "fp64": 5e13}
    assert speed.launch == 4e-6
    with pytest.raises(ValueError, match="flops\\['bf16'\\]=None"):
        measured_speed("x", 1e12, {"fp32": 5e13})
    with pytest.raises(ValueError, match="bandwidth=0"):
        measured_speed("x", 0, {"bf16": 4e14, "fp32": 5e13})


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "card=None with times: accepted is the name of a card, such as H100"),
        (["--card=H1000"], "card='H1000' is not known; did you mean 'H100'?"),
        (["--card=T4"], "card='T4': its speed is not known; accepted for times are"),
        (["--device=cpu"], "device='cpu' with times: modelled are GPUs"),
        (["--memory=80GB"], "memory='80GB' with times: accepted is a card"),
        (["--card=H100", "--update-in-backward"], "update_in_backward=True with times"),
        (["--card=H100", "--measure"], "--measure with --time"),
        (["--card=H100", "--all", "--plot=x.png"], "--plot with --time"),
        (["--card=H100", "--option=rank=5000"], "rank=5000"),
        (["--card=H100", "--all", "--option=rnk=5"], "option 'rnk': no optimizer has it"),
        (["--card=H100", "--optimizer=sltrain_adamw"], "replaces layers: modelled are times"),
    ],
)
def test_wrong_use_is_one_line(arguments: list[str], message: str, capsys: Any) -> None:
    assert main(["plan", "--time", "--sequence=64", *arguments]) == 2
    said = capsys.readouterr()
    assert message in said.err
    assert said.err.count("\n") == 1
    assert not said.out


def test_the_table_of_a_method(capsys: Any) -> None:
    command = ["plan", "--time", "--model=llama_9m", "--card=4090", "--sequence=64"]
    assert main([*command, "--optimizer=galore_adamw"]) == 0
    told = capsys.readouterr().out
    assert "on 4090 (modelled, not measured)" in told
    for part in ("forward + backward", "optimizer step", "step with refresh", "a step on average"):
        assert re.search(rf"^{re.escape(part)} .*\d", told, re.MULTILINE)
    assert "tokens a second; the optimizer takes" in told
    assert "assumed: shares of the data sheet's rates: 85% for copies" in told


def test_quantised_weights_and_what_does_not_fit_are_said(
    capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    command = ["plan", "--time", "--model=llama_9m", "--card=4090", "--sequence=64"]
    assert main([*command, "--optimizer=qgalore_adamw_8bit"]) == 0
    told = capsys.readouterr().out
    assert "weights in 8 bits" in told
    assert "note: the passes are those of dense weights" in told
    assert "more than the card's memory" not in told
    monkeypatch.setitem(CARDS, "4090", 100)
    names = ("galore_adamw_8bit", "adamw")
    monkeypatch.setattr("lowrank.trainers.plan.planner.available", lambda: names)
    assert main([*command, "--all"]) == 0
    told = capsys.readouterr().out
    assert "in 8 bits" not in told
    assert "note: adamw: weights, gradients and the optimizer's state alone take more" in told


def test_methods_are_ranked_by_the_whole_step(monkeypatch: pytest.MonkeyPatch) -> None:
    names = ("galore_adamw", "sltrain_adamw", "adamw")
    monkeypatch.setattr("lowrank.trainers.plan.planner.available", lambda: names)
    found = rank_times("llama_9m", card="H100", sequence=64, options={"rank": 4})
    assert [one.optimizer for one in found] == ["adamw", "galore_adamw", "sltrain_adamw"]
    assert isinstance(found[-1], NotModelled)
    told = ranking_of_times(found)
    assert [line.split()[0] for line in told.splitlines()[:3]] == ["optimizer", *names[2::-2]]
    assert [line.split()[1] for line in told.splitlines()[:3]] == ["rank", "-", "4"]
    assert "not modelled: sltrain_adamw: replaces layers" in told
