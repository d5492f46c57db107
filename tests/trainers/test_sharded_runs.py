"""The command under FSDP2 on two processes: one run, and what its folder holds."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from processes import PRELOAD as PRELOAD
from processes import Job, Outcome, run_jobs
from tiny_runs import TINY, comparable_metrics, summary

from lowrank.optimizers import build
from lowrank.trainers.checkpoint import verify

pytestmark = pytest.mark.slow

STEPS = 6
#: Embeddings, head and norms under another rule than the method's.
RULE = (
    *("optimizer.plain_rule=adafactor", "optimizer.plain_lr=0.01"),
    *("optimizer.embedding_lr=0.03", "optimizer.head_lr=0.005"),
)
#: By name: what is told, the number of processes, and the settings.
WRONG = {
    "codes": (
        "whose codes can't be divided among processes; accepted: ddp",
        2,
        ("distributed.strategy=fsdp2", "model.weight_bits=8", "model.dtype=bfloat16"),
    ),
    "division": (
        "3 processes can't share a step's 2 sequences evenly",
        3,
        ("train.batch_size=1",),
    ),
}


@pytest.fixture(scope="module")
def runs(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Outcome]]:
    """One process, two under FSDP2, and one that goes on from the middle of the latter."""
    base = tmp_path_factory.mktemp("runs")

    def arguments(name: str, *more: str) -> list[str]:
        flags = [f"--output={base / name}", f"--steps={STEPS}", f"--data={corpus}"]
        return ["pretrain", *flags, *TINY, "checkpoint.keep=9", *more]

    shards = "distributed.data_shards=2"
    sharded = (
        "distributed.strategy=fsdp2",
        "train.clip=0.5",
        "model.activation_checkpointing=true",
    )
    turns = (
        *("distributed.strategy=fsdp2", "optimizer.name=lisa_adamw", "optimizer.active_layers=1"),
        *("optimizer.update_proj_gap=2", "model.num_hidden_layers=3"),
    )
    half = ("checkpoints", "step-00000003")
    jobs = {
        "one": Job(arguments("one", shards, "train.clip=0.5")),
        "two": Job(arguments("two", *sharded), processes=2),
        "backward": Job(
            arguments("backward", *sharded, "train.update_in_backward=true"), processes=2
        ),
        "resumed": Job(
            ["pretrain", f"--resume={base / 'resumed' / 'checkpoints' / 'step-00000003'}"],
            copied=(str(base / "two"), str(base / "resumed")),
        ),
        "ruled": Job(arguments("ruled", "distributed.strategy=fsdp2", *RULE), processes=2),
        "ruled alone": Job(arguments("ruled alone", shards, *RULE)),
        "turns": Job(arguments("turns", *turns), processes=2),
        "turns again": Job(
            ["pretrain", f"--resume={base.joinpath('turns again', *half)}"],
            processes=2,
            copied=(str(base / "turns"), str(base / "turns again")),
        ),
    }
    for name, (_, size, more) in WRONG.items():
        jobs[name] = Job(arguments("wrong", *more, "distributed.data_shards=1"), size)
    outcomes = dict(zip(jobs, run_jobs(list(jobs.values()), base / "jobs"), strict=True))
    for name in jobs.keys() - WRONG.keys():
        assert not any(outcomes[name].statuses), "\n".join(outcomes[name].errors)
    return base, outcomes


def losses(folder: Path) -> list[tuple[object, ...]]:
    return [
        (item["step"], item["kind"], item.get("loss", item.get("val_loss")))
        for item in comparable_metrics(folder)
        if item["kind"] in ("train", "eval")
    ]


@pytest.mark.parametrize("name", ["two", "backward", "resumed"])
def test_losses_are_those_of_one_process(name: str, runs: tuple[Path, dict[str, Outcome]]) -> None:
    base, _ = runs
    found, expected = losses(base / name), losses(base / "one")
    assert [item[:2] for item in found] == [item[:2] for item in expected]
    assert [item[2] for item in found] == pytest.approx([item[2] for item in expected], abs=1e-5)
    norms = [
        [item.get("grad_norm", 0) for item in comparable_metrics(base / n)] for n in ("one", name)
    ]
    assert norms[1] == pytest.approx(norms[0], rel=1e-4)
    one, other = summary(base / "one"), summary(base / name)
    for key in ("tokens", "epochs", "unigram_val_loss", "skipped_documents", "data_shards"):
        assert other[key] == one[key], key
    assert other["strategy"] == ("alone" if name == "resumed" else "fsdp2")
    assert other["state_processes"] == (1 if name == "resumed" else 2)
    shares = [other[key] / one[key] for key in ("optimizer_state_bytes", "adamw_state_bytes")]
    assert all(0.4 < share < 0.7 for share in shares) == (name != "resumed")


def test_another_rule_of_embeddings_and_head_is_that_of_one_process(
    runs: tuple[Path, dict[str, Outcome]],
) -> None:
    base, _ = runs
    found, expected = losses(base / "ruled"), losses(base / "ruled alone")
    assert [item[:2] for item in found] == [item[:2] for item in expected]
    assert [item[2] for item in found] == pytest.approx([item[2] for item in expected], abs=1e-5)
    assert expected != losses(base / "one")
    assert summary(base / "ruled")["strategy"] == "fsdp2"


def test_layers_in_turns_go_on_in_the_middle_of_one(runs: tuple[Path, dict[str, Outcome]]) -> None:
    base, _ = runs
    assert losses(base / "turns again") == losses(base / "turns")
    saved = base.joinpath("turns", "checkpoints", "step-00000003", "optimizer.pt")
    groups = torch.load(saved, weights_only=True)["param_groups"]
    active = {group["block"] for group in groups if group.get("active")}
    model = torch.nn.ModuleList(torch.nn.ModuleDict({"mlp": torch.nn.Linear(8, 8)}) for _ in "abc")
    first = build("lisa_adamw", torch.nn.ModuleDict({"layers": model}), active_layers=1)
    assert len(active) == 1
    assert active != set(first.active_blocks())  # a new optimizer has another layer's moments


def test_one_process_speaks(runs: tuple[Path, dict[str, Outcome]]) -> None:
    _, outcomes = runs
    first, second = outcomes["two"].outputs
    assert "2 processes (fsdp2)" in first
    assert "training for 6 steps of 8 x 32 tokens" in first
    assert second == ""
    assert outcomes["two"].errors == ["", ""]
    assert outcomes["resumed"].errors == [""]
    assert "so distributed.strategy=fsdp2 does nothing" in outcomes["resumed"].outputs[0]


def test_a_checkpoint_is_whole_and_its_weights_are_plain(
    runs: tuple[Path, dict[str, Outcome]],
) -> None:
    from transformers import AutoModelForCausalLM

    base, _ = runs
    names = ("step-00000003", "step-00000006")
    for saved in (base / "two" / "checkpoints" / name for name in names):
        verify(saved)
        files = json.loads((saved / "manifest.json").read_text())["files"]
        assert {"__0_0.distcp", "__1_0.distcp", ".metadata"} <= files.keys()
        state = torch.load(saved / "optimizer.pt", weights_only=True)["state"]
        assert all("sharded tensor" in entry["exp_avg"] for entry in state.values())
    two, one = (
        AutoModelForCausalLM.from_pretrained(base / name / "checkpoints" / names[1])
        for name in ("two", "one")
    )
    for (name, parameter), other in zip(two.named_parameters(), one.parameters(), strict=True):
        torch.testing.assert_close(parameter, other, rtol=0, atol=1e-5, msg=name)


@pytest.mark.parametrize("name", WRONG)
def test_wrong_settings_are_told_once_and_nothing_is_made(
    name: str, runs: tuple[Path, dict[str, Outcome]]
) -> None:
    base, outcomes = runs
    text, size, _ = WRONG[name]
    assert outcomes[name].statuses == [2] * size
    told = [line for error in outcomes[name].errors for line in error.splitlines()]
    assert len(told) == 1, told
    assert text in told[0]
    assert not (base / "wrong").exists()
