"""Where people plug optimizers in: compile, distributed checkpoints, DDP, the HF Trainer."""

from __future__ import annotations

import copy
import os
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from forked import start
from representative import with_representative
from support import set_gradients, tiny_model, weights
from table import TABLE, Row, every_with, identifier, train
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)

from lowrank.optimizers import build

every = pytest.mark.parametrize("row", TABLE, ids=identifier)


@every_with("flatten", [True, False])
def test_distributed_checkpoint_state_round_trips(row: Row, flatten: bool) -> None:
    options = StateDictOptions(flatten_optimizer_state_dict=flatten)
    model = tiny_model()
    optimizer = row.build(model)
    train(model, optimizer, range(4))
    saved = copy.deepcopy(get_optimizer_state_dict(model, optimizer, options=options))
    twin = row.prepare(tiny_model())
    twin.load_state_dict(model.state_dict())
    other = row.build(twin)
    set_optimizer_state_dict(twin, other, saved, options=options)
    train(model, optimizer, range(4, 8))
    train(twin, other, range(4, 8))
    for a, b in zip(model.parameters(), twin.parameters(), strict=True):
        assert torch.equal(a, b)


@every
def test_asking_for_the_state_dict_first_changes_nothing(row: Row) -> None:
    """DCP takes a step to create missing state; ours is there from the start."""
    model, twin = tiny_model(), tiny_model()
    optimizer, other = row.build(model), row.build(twin)
    get_optimizer_state_dict(model, optimizer)
    train(model, optimizer, range(4))
    train(twin, other, range(4))
    for a, b in zip(model.parameters(), twin.parameters(), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize(
    "name", with_representative(("adamw", "galore_adamw", "galore_adamw_8bit"), ("galore_adamw",))
)
def test_compiled_update_equals_eager_and_ignores_lr_changes(name: str) -> None:
    row = next(row for row in TABLE if row.name == name)
    eager, compiled = tiny_model(), tiny_model()
    first, second = row.build(eager), row.build(compiled, compile=True)
    torch._dynamo.reset()
    counts = []
    for step in range(8):
        for optimizer in (first, second):
            for group in optimizer.param_groups:
                group["lr"] = 1e-2 / (1 + step)
        train(eager, first, range(step, step + 1))
        train(compiled, second, range(step, step + 1))
        counts.append(torch._dynamo.utils.counters["stats"]["unique_graphs"])
    assert counts[0] > 0
    assert counts[-1] == counts[0]
    for a, b in zip(eager.parameters(), compiled.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=row.slack)


def _ddp_worker(rank: int, world: int, folder: str, names: list[str]) -> None:
    os.environ.update(MASTER_ADDR="127.0.0.1", GLOO_SOCKET_IFNAME="lo")
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/store-{world}", rank=rank, world_size=world
    )
    results = {}
    for name in names:
        row = next(row for row in TABLE if identifier(row) == name)
        model = row.prepare(tiny_model())
        wrapped = nn.parallel.DistributedDataParallel(model) if world > 1 else model
        optimizer = row.build(model)
        for step in range(7):
            generator = torch.Generator().manual_seed(step)
            tokens = torch.randint(0, 32, (4, 6), generator=generator)
            own = tokens.chunk(world)[rank]
            loss = nn.functional.cross_entropy(wrapped(own).flatten(0, 1), own.flatten())
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        results[name] = [param.detach().clone() for param in model.parameters()]
    torch.save(results, f"{folder}/{world}-{rank}.pt")
    dist.destroy_process_group()


@pytest.mark.slow
def test_ddp_ranks_agree_to_the_bit_and_equal_one_process() -> None:
    names = [identifier(row) for row in TABLE]
    with tempfile.TemporaryDirectory() as folder:
        start(_ddp_worker, (2, folder, names), 2)
        start(_ddp_worker, (1, folder, names), 1)
        first, second, single = (torch.load(f"{folder}/{x}.pt") for x in ("2-0", "2-1", "1-0"))
    for row in TABLE:
        for a, b, c in zip(*(run[identifier(row)] for run in (first, second, single)), strict=True):
            assert torch.equal(a, b)
            torch.testing.assert_close(a, c, rtol=1e-3, atol=2e-2 if row.bits8 else 2e-3)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["galore_adamw", "galore_adafactor", "qgalore_adamw_8bit-int8"])
def test_hugging_face_trainer_resumes_exactly(name: str, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    row = next(row for row in TABLE if identifier(row) == name)
    config = transformers.LlamaConfig(
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=1,
        num_attention_heads=2,
        vocab_size=32,
    )
    tokens = torch.randint(0, 32, (32, 8), generator=torch.Generator().manual_seed(0))
    data = [{"input_ids": row_, "labels": row_} for row_ in tokens]

    def run(folder: Path, steps: int, resume: bool) -> dict[str, Any]:
        torch.manual_seed(0)
        model = transformers.LlamaForCausalLM(config)
        optimizer = row.build(model)
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda k: 1 / (1 + k))
        arguments = transformers.TrainingArguments(
            output_dir=str(folder),
            max_steps=steps,
            per_device_train_batch_size=4,
            save_steps=4,
            report_to=[],
            use_cpu=True,
            disable_tqdm=True,
            logging_strategy="no",
        )
        trainer = transformers.Trainer(
            model=model, args=arguments, train_dataset=data, optimizers=(optimizer, scheduler)
        )
        trainer.train(resume_from_checkpoint=resume)
        return {key: value.clone() for key, value in model.state_dict().items()}

    straight = run(tmp_path / "straight", 8, resume=False)
    run(tmp_path / "broken", 4, resume=False)
    resumed = run(tmp_path / "broken", 8, resume=True)
    for key, value in straight.items():
        assert torch.equal(value, resumed[key]), key


@pytest.mark.parametrize("name", ["galore_adamw", "qgalore_adamw_8bit", "relora_adamw"])
def test_compiled_step_equals_eager(name: str) -> None:
    """Dynamo leaves `step` alone, so that no count or schedule becomes a constant of a graph."""

    def run(*, compiled: bool) -> list[torch.Tensor]:
        model = tiny_model()
        optimizer = build(name, model, lr=1e-2, rank=4, update_proj_gap=2)
        step = torch.compile(optimizer.step, backend="eager") if compiled else optimizer.step
        for k in range(3):
            set_gradients(model, k)
            step()
        return weights(model)

    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    eager, compiled = run(compiled=False), run(compiled=True)
    assert all(torch.equal(a, b) for a, b in zip(eager, compiled, strict=True))
    # The frames of torch's wrapper around `step` are traced, and none of this package.
    assert torch._dynamo.utils.counters["frames"]["total"] < 10


def test_model_with_gradients_from_another_dtype() -> None:
    """A gradient in another precision than its weight is taken in the weight's."""
    row = next(row for row in TABLE if row.name == "galore_adamw")
    model = tiny_model(dtype=torch.bfloat16)
    optimizer = row.build(model)
    set_gradients(model, 0)
    for param in model.parameters():
        param.grad_dtype = None
        param.grad = param.grad.float()
    optimizer.step()
    assert all(param.isfinite().all() for param in model.parameters())
