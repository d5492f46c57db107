"""The whole command on a tiny model, in this process."""

import json
import shutil
import sys
import types
from collections.abc import Callable
from importlib.machinery import ModuleSpec
from pathlib import Path
from typing import Any

import pytest
import torch
from representative import with_representative
from tiny_runs import comparable_metrics, summary, write_corpus

from lowrank.optimizers import available
from lowrank.trainers import loop
from lowrank.trainers.weights import weights_sha256

Run = Callable[[list[str]], tuple[int, str, str]]
Tiny = Callable[..., list[str]]


class Crash(BaseException):
    """Stands for the process's sudden end."""


def crash_after(monkeypatch: pytest.MonkeyPatch, step: int) -> None:
    """Lets the run die at the start of the step after `step`."""
    take = loop.Loop._step

    def dying(self: loop.Loop) -> None:
        if self._parts.state.step >= step:
            raise Crash
        take(self)

    monkeypatch.setattr(loop.Loop, "_step", dying)


def crash(run: Run, arguments: list[str], step: int) -> None:
    with pytest.MonkeyPatch.context() as patch:
        crash_after(patch, step)
        with pytest.raises(Crash):
            run(arguments)


def kinds(folder: Path, kind: str) -> list[dict[str, Any]]:
    return [item for item in comparable_metrics(folder) if item["kind"] == kind]


def checkpoints(folder: Path) -> list[str]:
    return sorted(path.name for path in (folder / "checkpoints").iterdir())


def test_a_run_leaves_everything_it_promises(tiny: Tiny, whole_run: Run, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    status, output, errors = whole_run(tiny(folder, 10))
    assert (status, errors) == (0, "")
    assert "Validation loss" in output
    assert (folder / "report.html").read_text().lower().startswith("<!doctype html")
    content = summary(folder)
    promised = (
        "optimizer model parameters steps tokens initial_val_loss val_loss unigram_val_loss"
        " val_perplexity bits_per_byte tokens_per_second weight_bytes optimizer_state_bytes"
        " peak_memory_bytes device torch_version weights_sha256 adamw_state_bytes skipped_steps"
        " skipped_documents epochs wall_seconds lowrank_version python_version data"
    )
    assert set(promised.split()) <= set(content)
    assert content["steps"] == 10
    assert content["tokens"] == 10 * 2 * 2 * 32
    assert content["weight_bytes"] == 4 * int(str(content["parameters"]))
    assert [item["step"] for item in kinds(folder, "train")] == list(range(1, 11))
    assert [item["step"] for item in kinds(folder, "eval")] == [0, 4, 8, 10]
    assert [item["step"] for item in kinds(folder, "refresh")] == [1, 4, 7, 10]
    assert {item["matrices"] for item in kinds(folder, "refresh")} == {7}
    assert checkpoints(folder)[-1] == "step-00000010"


def test_the_checkpoint_is_a_hugging_face_model(tiny: Tiny, run: Run, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = tmp_path / "run"
    run(tiny(folder, 3))
    saved = folder / "checkpoints" / "step-00000003"
    model = AutoModelForCausalLM.from_pretrained(saved)
    assert weights_sha256(model) == summary(folder)["weights_sha256"]
    assert AutoTokenizer.from_pretrained(saved)("text")["input_ids"]
    for name in ("optimizer.pt", "trainer.pt"):
        assert torch.load(saved / name, weights_only=True)


def test_training_learns(tiny: Tiny, run: Run, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    run(tiny(folder, 60, "optimizer.lr=0.02", "train.clip=1", "eval.every=0"))
    content = summary(folder)
    assert float(str(content["val_loss"])) < float(str(content["initial_val_loss"])) - 2


def test_the_same_settings_give_the_same_run(tiny: Tiny, run: Run, tmp_path: Path) -> None:
    for name in ("one", "two"):
        run(tiny(tmp_path / name, 5))
    run(tiny(tmp_path / "other", 5, "--seed=7"))
    assert comparable_metrics(tmp_path / "one") == comparable_metrics(tmp_path / "two")
    hashes = [summary(tmp_path / name)["weights_sha256"] for name in ("one", "two", "other")]
    assert hashes[0] == hashes[1] != hashes[2]


#: One of each kind of state; the contract's tests resume every method.
RESUMED = (
    *("galore_adamw_8bit", "qgalore_adamw_8bit", "fira_adamw", "coap_adafactor"),
    *("online_subspace_adamw", "flora_adafactor"),
)


@pytest.mark.parametrize("optimizer", with_representative(available(), RESUMED, marks=()))
def test_resumed_equals_uninterrupted(optimizer: str, tiny: Tiny, run: Run, tmp_path: Path) -> None:
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    # A moment that moves at each third step grows without bound, which Flora warns of.
    gap = {
        "flora_adafactor": ["optimizer.update_proj_gap=8"],
        "lisa_adamw": ["model.num_hidden_layers=3", "optimizer.active_layers=1"],
    }.get(optimizer, [])
    _, _, said = run(tiny(whole, 10, *gap, optimizer=optimizer))  # of options without effect
    arguments = tiny(broken, 10, "--resume=auto", *gap, optimizer=optimizer)
    crash(run, arguments, 2)  # before there is a checkpoint
    crash(run, arguments, 5)
    crash(run, arguments, 7)
    status, _, errors = run(arguments)
    assert status == 0
    assert set(errors.splitlines()) <= set(said.splitlines())
    assert comparable_metrics(broken) == comparable_metrics(whole)
    assert summary(broken)["weights_sha256"] == summary(whole)["weights_sha256"]
    assert summary(broken)["unigram_val_loss"] == summary(whole)["unigram_val_loss"]


@pytest.mark.parametrize(
    "settings",
    [
        ("model.dtype=bfloat16",),
        ("model.autocast=true",),
        ("data.packing=pad", "train.accumulation=3"),
        ("optimizer.refresh=randomized",),
        ("optimizer.refresh=warm", "schedule.name=wsd"),
        ("data.shuffle_block=0", "model.activation_checkpointing=true"),
    ],
)
def test_resume_is_exact_under_other_settings(
    settings: tuple[str, ...], tiny: Tiny, run: Run, tmp_path: Path
) -> None:
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    run(tiny(whole, 8, *settings))
    arguments = tiny(broken, 8, "--resume=auto", *settings)
    crash(run, arguments, 5)
    run(arguments)
    assert comparable_metrics(broken) == comparable_metrics(whole)
    assert summary(broken)["weights_sha256"] == summary(whole)["weights_sha256"]


def test_resume_is_exact_with_loader_processes(tiny: Tiny, run: Run, tmp_path: Path) -> None:
    test_resume_is_exact_under_other_settings(("data.workers=2",), tiny, run, tmp_path)


def test_a_damaged_checkpoint_is_named_and_passed_over(
    tiny: Tiny, run: Run, tmp_path: Path
) -> None:
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    run(tiny(whole, 10))
    arguments = tiny(broken, 10, "--resume=auto")
    crash(run, arguments, 8)
    damaged = broken / "checkpoints" / "step-00000008" / "optimizer.pt"
    damaged.write_bytes(damaged.read_bytes()[:-10])
    status, output, _ = run(arguments)
    assert status == 0
    assert "step-00000008 is damaged: optimizer.pt" in output
    assert comparable_metrics(broken) == comparable_metrics(whole)
    assert summary(broken)["weights_sha256"] == summary(whole)["weights_sha256"]


def test_resuming_needs_no_settings_and_takes_one_checkpoint(
    tiny: Tiny, run: Run, tmp_path: Path
) -> None:
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    run(tiny(whole, 10))
    crash(run, tiny(broken, 10, "checkpoint.keep=9"), 8)
    assert "step-00000006" in checkpoints(broken)
    status, output, _ = run(["pretrain", "--resume", str(broken / "checkpoints" / "step-00000003")])
    assert status == 0
    assert "past step 3" in output
    assert comparable_metrics(broken) == comparable_metrics(whole)
    assert summary(broken)["weights_sha256"] == summary(whole)["weights_sha256"]


def test_a_finished_run_stays_as_it_is(tiny: Tiny, run: Run, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    run(tiny(folder, 4))
    before = (folder / "summary.json").read_bytes(), (folder / "metrics.jsonl").read_bytes()
    status, output, _ = run(tiny(folder, 4, "--resume=auto"))
    assert status == 0
    assert "Validation loss" in output
    after = (folder / "summary.json").read_bytes(), (folder / "metrics.jsonl").read_bytes()
    assert before == after


def test_a_run_killed_before_its_summary_still_gets_it(
    tiny: Tiny, run: Run, tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    run(tiny(folder, 4))
    before = summary(folder)
    (folder / "summary.json").unlink()
    run(tiny(folder, 4, "--resume=auto"))
    after = summary(folder)
    assert after.keys() == before.keys()
    changed = {key for key in after if after[key] != before[key]}
    assert changed <= {"wall_seconds", "peak_memory_bytes"}


@pytest.mark.parametrize(
    ("change", "key"),
    [
        ("optimizer.lr=0.5", "optimizer.lr"),
        ("optimizer.rank=4", "optimizer.rank"),
        ("train.batch_size=4", "train.batch_size"),
        ("--steps=20", "train.steps"),
        ("--seed=1", "train.seed"),
        ("model.hidden_size=64", "model.hidden_size"),
        ("data.packing=pad", "data.packing"),
        ("--optimizer=adamw", "optimizer.name"),
    ],
)
def test_settings_that_would_make_another_run_are_refused(
    change: str, key: str, tiny: Tiny, run: Run, tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    crash(run, tiny(folder, 10), 4)
    before = (folder / "metrics.jsonl").read_bytes(), checkpoints(folder)
    status, _, errors = run(tiny(folder, 10, change, "--resume=auto"))
    assert status == 2
    assert errors.count("\n") == 1
    assert f"lowrank: {key} is " in errors
    assert ((folder / "metrics.jsonl").read_bytes(), checkpoints(folder)) == before


def test_the_device_of_the_run_is_kept(tiny: Tiny, run: Run, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    crash(run, tiny(folder, 10), 4)
    saved = folder / "config.yaml"
    saved.write_text(saved.read_text().replace("device: cpu", "device: cuda:99"))
    for resume in (folder, folder / "checkpoints" / "step-00000004"):
        status, _, errors = run(["pretrain", f"--resume={resume}"])
        assert status == 2
        assert "cuda" in errors
    assert run(["pretrain", f"--resume={folder}", "--device=cpu"])[0] == 0


def test_settings_that_only_keep_and_show_may_change(tiny: Tiny, run: Run, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    crash(run, tiny(folder, 10), 4)
    status, _, errors = run(tiny(folder, 10, "--resume=auto", "checkpoint.every=2"))
    assert (status, errors) == (0, "")


def test_changed_data_is_refused(tiny: Tiny, run: Run, tmp_path: Path, corpus: Path) -> None:
    folder, data = tmp_path / "run", tmp_path / "data"
    shutil.copytree(corpus, data)
    crash(run, tiny(folder, 10, f"--data={data}"), 4)
    write_corpus(data, documents=50)
    status, _, errors = run(tiny(folder, 10, f"--data={data}", "--resume=auto"))
    assert status == 2
    assert errors.count("\n") == 1


def test_a_used_folder_is_refused_without_resume(tiny: Tiny, run: Run, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    run(tiny(folder, 2))
    status, _, errors = run(tiny(folder, 2))
    assert status == 2
    assert "already holds a run" in errors


def test_a_run_that_goes_on_elsewhere_is_not_joined(tiny: Tiny, run: Run, tmp_path: Path) -> None:
    import fcntl

    folder = tmp_path / "run"
    crash(run, tiny(folder, 10), 4)
    with (folder / ".lock").open("w") as stream:
        fcntl.flock(stream, fcntl.LOCK_EX)
        status, _, errors = run(tiny(folder, 10, "--resume=auto"))
    assert status == 2
    assert "in use by another run" in errors


def test_a_wrong_start_leaves_no_folder(tiny: Tiny, run: Run, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    status, _, errors = run(tiny(folder, 2, "optimizer.rnk=3"))
    assert status == 2
    assert "rank" in errors
    assert not folder.exists()


def test_default_folders_are_numbered_and_auto_takes_the_last(
    tiny: Tiny, run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    arguments = [item for item in tiny(tmp_path, 4) if not item.startswith("--output")]
    run(arguments)
    crash(run, arguments, 3)
    assert run([*arguments, "--resume=auto"])[0] == 0
    names = sorted(path.name for path in (tmp_path / "runs").iterdir())
    assert names == ["llama_9m-galore_adamw-001", "llama_9m-galore_adamw-002"]
    for name in names:
        assert summary(tmp_path / "runs" / name)["steps"] == 4


@pytest.mark.parametrize("resume", ["nowhere", "empty"])
def test_resuming_what_is_not_there(
    resume: str, run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    status, _, errors = run(["pretrain", "--resume", resume])
    assert status == 2
    assert errors.startswith(f"lowrank: --resume {resume}")


def stand_in_for_wandb(monkeypatch: pytest.MonkeyPatch, init: Callable[..., Any]) -> None:
    """What is called matters here, not the library; a slow test uses the real one."""
    module = types.ModuleType("wandb")
    module.__spec__ = ModuleSpec("wandb", None)  # other libraries look whether it is there
    vars(module).update(init=init, errors=types.SimpleNamespace(Error=KeyError))
    monkeypatch.setitem(sys.modules, "wandb", module)


def test_wandb_gets_the_numbers(
    tiny: Tiny, run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    logged: list[tuple[int, dict[str, Any]]] = []
    finished: list[int] = []
    session = types.SimpleNamespace(
        log=lambda values, step: logged.append((step, values)),
        finish=lambda exit_code: finished.append(exit_code),
    )
    stand_in_for_wandb(monkeypatch, lambda **options: session)
    assert run(tiny(tmp_path / "run", 3, "log.wandb=true"))[0] == 0
    assert finished == [0]
    assert [step for step, values in logged if "train/loss" in values] == [1, 2, 3]
    assert any("eval/val_loss" in values for _, values in logged)


def test_wandb_that_cannot_start_is_one_line(
    tiny: Tiny, run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(**options: object) -> None:
        raise KeyError("no key")

    stand_in_for_wandb(monkeypatch, fail)
    status, _, errors = run(tiny(tmp_path / "run", 3, "log.wandb=true"))
    assert status == 2
    assert errors.count("\n") == 1
    assert "WANDB_MODE=offline" in errors


@pytest.mark.slow
def test_wandb_works_offline(
    tiny: Tiny, run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    assert run(tiny(tmp_path / "run", 2, "log.wandb=true"))[0] == 0
    assert list((tmp_path / "run" / "wandb").glob("offline-run-*/*.wandb"))


def test_missing_wandb_names_the_extra(
    tiny: Tiny, run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)
    status, _, errors = run(tiny(tmp_path / "run", 3, "log.wandb=true"))
    assert status == 2
    assert 'pip install "lowrank-pretrain[wandb]"' in errors


def test_report_is_written_again(tiny: Tiny, run: Run, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    run(tiny(folder, 2))
    status, output, _ = run(["report", str(folder)])
    assert status == 0
    assert str(folder / "report.html") in output
    assert "llama_9m" in (folder / "report.html").read_text()
    assert run(["report", str(tmp_path)])[0] == 2


def test_summary_is_json_any_reader_takes(tiny: Tiny, run: Run, tmp_path: Path) -> None:
    run(tiny(tmp_path / "run", 2))

    def refuse(name: str) -> None:
        raise AssertionError(name)

    json.loads((tmp_path / "run" / "summary.json").read_text(), parse_constant=refuse)
