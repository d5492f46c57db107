"""`model.initial` with weights, settings or a tokenizer that the run can't take as they are."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_runs import comparable_metrics

from lowrank.trainers.checkpoint import CheckpointStore
from lowrank.trainers.config import ModelConfig
from lowrank.trainers.data.tokenizer_backend import save_backend
from lowrank.trainers.data.tokenizer_bpe import train
from lowrank.trainers.data.tokenizer_bytes import ByteTokenizer
from lowrank.trainers.models import build_model
from lowrank.trainers.parts import save_network

pytestmark = pytest.mark.filterwarnings("always:model.initial=")
Run = Callable[[list[str]], tuple[int, str, str]]
Tiny = Callable[..., list[str]]
#: The shape of a tiny run.
SHAPE = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "vocab_size": 257,
}
#: Dense weights, quantised ones, and layers that are made from the first weights.
METHODS = (
    "adamw",
    "galore_adamw",
    "qgalore_adamw_8bit",
    "relora_adamw",
    "sltrain_adamw",
    "loqt_adamw",
    "sst_adamw",
    "switchlora_adamw",
    "lisa_adamw",
)
NORM, HEAD = "model.norm.weight", "lm_head.weight"


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    """A checkpoint that a tiny run may begin with."""
    folder = tmp_path / "saved"
    folder.mkdir()
    save_network(build_model(ModelConfig(**SHAPE), 32, 9, torch.device("cpu")).network, folder)
    ByteTokenizer().save(folder)
    return folder


def rewrite(folder: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    path = folder / "model.safetensors"
    tensors = {name: tensor.clone() for name, tensor in load_file(path).items()}
    change(tensors)
    path.unlink()
    save_file(tensors, path)


def configure(folder: Path, **changed: object) -> None:
    path = folder / "config.json"
    content: dict[str, Any] = {**json.loads(path.read_text()), **changed}
    path.write_text(json.dumps({key: value for key, value in content.items() if value != "gone"}))


def begin(tiny: Tiny, run: Run, folder: Path, *more: str) -> tuple[int, str]:
    """Exit status and errors of a step from the weights of `folder`."""
    status, _, errors = run(tiny(folder.parent / "run", 1, f"model.initial={folder}", *more))
    return status, errors


@pytest.mark.parametrize(
    ("name", "dtype", "said"),
    [(NORM, torch.int32, "I32"), (HEAD, torch.int8, "I8"), (HEAD, torch.float8_e4m3fn, "F8_E4M3")],
)
def test_numbers_that_are_no_weights_are_refused(
    tiny: Tiny, run: Run, saved: Path, name: str, dtype: torch.dtype, said: str
) -> None:
    rewrite(saved, lambda tensors: tensors.update({name: tensors[name].to(dtype)}))
    status, errors = begin(tiny, run, saved)
    assert (status, errors.count("\n")) == (2, 1)
    assert f"has {name} in {said}: accepted is F64, F32, F16 or BF16" in errors


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
def test_other_floating_numbers_are_taken(
    tiny: Tiny, run: Run, saved: Path, dtype: torch.dtype
) -> None:
    rewrite(saved, lambda items: items.update({k: v.to(dtype) for k, v in items.items()}))
    assert begin(tiny, run, saved) == (0, "")


@pytest.mark.parametrize("value", [float("nan"), float("-inf"), 1e39])
def test_values_that_are_not_finite_are_counted(
    tiny: Tiny, run: Run, saved: Path, value: float
) -> None:
    def change(tensors: dict[str, torch.Tensor]) -> None:
        tensors[HEAD] = tensors[HEAD].double()
        tensors[HEAD][5:7, 3] = value

    rewrite(saved, change)
    status, errors = begin(tiny, run, saved)
    assert (status, errors.count("\n")) == (2, 1)
    assert f"has {HEAD} with 2 of 8,224 values that are not finite in float32" in errors


def test_the_configuration_of_the_same_network_is_no_news(
    tiny: Tiny, run: Run, saved: Path
) -> None:
    free = {"max_position_embeddings": 4096, "use_cache": False, "dtype": "bfloat16"}
    configure(saved, **free, bos_token_id=3, initializer_range=0.5, architectures=["Other"])
    assert begin(tiny, run, saved) == (0, "")


def test_the_older_form_of_a_configuration_is_known(tiny: Tiny, run: Run, saved: Path) -> None:
    older = {"rope_parameters": "gone", "head_dim": "gone", "num_key_value_heads": None}
    configure(saved, **older, rope_theta=10000, rope_scaling=None)
    assert begin(tiny, run, saved) == (0, "")


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"rms_norm_eps": 0.01}, "rms_norm_eps=0.01 (here 1e-06);"),
        (
            {"rope_parameters": "gone", "rope_theta": 5e5, "hidden_act": "gelu"},
            "hidden_act=gelu (here silu), rope_theta=500000.0 (here 10000.0);",
        ),
        (
            {"rope_parameters": {"rope_type": "default", "rope_theta": 7.0}},
            "rope_theta=7.0 (here 10000.0);",
        ),
        ({"rope_theta": 7.0}, "rope_theta=7.0 (here 10000.0);"),
        (
            {"rope_parameters": "gone", "rope_scaling": {"type": "linear", "factor": 2.0}},
            "rope_parameters={'factor': 2.0, 'rope_type': 'linear'} (here {'rope_type':",
        ),
        (
            {"num_attention_heads": 4, "num_key_value_heads": 1, "head_dim": 8},
            "num_attention_heads=4 (here 2), num_key_value_heads=1 (here 2), head_dim=8 (here 16);",
        ),
        (
            {"model_type": "mistral", "sliding_window": 16, "attention_bias": True},
            "model_type=mistral (here llama), attention_bias=True (here False), sliding_window=16",
        ),
        ({"num_attention_heads": 3}, "num_attention_heads=3 (here 2)"),
    ],
)
def test_a_configuration_of_another_meaning_is_told(
    tiny: Tiny, run: Run, saved: Path, changed: dict[str, object], said: str
) -> None:
    configure(saved, **changed)
    status, errors = begin(tiny, run, saved)
    assert (status, errors.count("\n")) == (0, 1)
    assert errors.startswith(f"warning: model.initial='{saved}': its config.json says {said}")


@pytest.mark.parametrize("content", [None, "{", "[]", "{}", '{"rope_parameters": [1]}'])
def test_without_a_usable_configuration_nothing_is_said(
    tiny: Tiny, run: Run, saved: Path, content: str | None
) -> None:
    (saved / "config.json").unlink()
    if content is not None:
        (saved / "config.json").write_text(content)
    assert begin(tiny, run, saved) == (0, "")


def test_another_tokenizer_is_told_and_the_advice_works(tiny: Tiny, run: Run, saved: Path) -> None:
    save_backend(train(iter(["text"]), 257), saved)
    status, errors = begin(tiny, run, saved)
    assert (status, errors.count("\n")) == (0, 1)
    # The bytes are sorted otherwise there, and the end of a text comes first.
    assert "has another tokenizer: 257 of the 257 ids that this run's has mean another" in errors
    (advice,) = [word for word in errors.split() if word.startswith("data.tokenizer=")]
    shutil.rmtree(saved.parent / "run")
    assert begin(tiny, run, saved, advice) == (0, "")


def test_a_broken_tokenizer_is_passed_over(tiny: Tiny, run: Run, saved: Path) -> None:
    (saved / "tokenizer.json").write_text("{}")
    assert begin(tiny, run, saved) == (0, "")


@pytest.mark.parametrize("method", METHODS)
def test_resuming_needs_no_folder(
    tiny: Tiny, run: Run, saved: Path, monkeypatch: pytest.MonkeyPatch, method: str
) -> None:
    whole, cut = saved.parent / "whole", saved.parent / "cut"
    settings = ("optimizer.lr=0.01", f"model.initial={saved}")
    assert run(tiny(whole, 5, *settings, optimizer=method))[0] == 0
    save = CheckpointStore.save

    def stop(store: CheckpointStore, step: int, *rest: Any) -> Path:
        save(store, step, *rest)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(CheckpointStore, "save", stop)
        assert run(tiny(cut, 5, *settings, optimizer=method))[0] == 130
    shutil.rmtree(saved)
    status, _, errors = run(["pretrain", f"--resume={cut}", "--device=cpu"])
    assert (status, "model.initial" in errors) == (0, False)
    assert comparable_metrics(cut) == comparable_metrics(whole)
    assert f"initial: {saved}" in (cut / "config.yaml").read_text()


def test_a_run_with_nothing_to_resume_needs_the_folder(tiny: Tiny, run: Run, saved: Path) -> None:
    shutil.rmtree(saved)
    status, errors = begin(tiny, run, saved, "--resume=auto")
    assert status == 2
    assert "there is no model.safetensors; accepted is the folder of a checkpoint" in errors


@pytest.mark.parametrize(
    ("file", "said"),
    [
        ("model.safetensors.index.json", "model.safetensors.index.json, a model in shards, is not"),
        ("pytorch_model.bin", "pytorch_model.bin, a file of pickled tensors, is not read"),
        ("pytorch_model-00001-of-00002.bin", "a file of pickled tensors, is not read"),
    ],
)
def test_other_files_of_weights_are_named(
    tiny: Tiny, run: Run, saved: Path, file: str, said: str
) -> None:
    (saved / "model.safetensors").rename(saved / file)
    status, errors = begin(tiny, run, saved)
    assert (status, errors.count("\n")) == (2, 1)
    assert said in errors
    assert 'save_pretrained(FOLDER, max_shard_size="100GB")' in errors


def test_tied_embeddings_are_named_and_the_advice_works(tiny: Tiny, run: Run, saved: Path) -> None:
    rewrite(saved, lambda tensors: tensors.pop(HEAD))
    status, errors = begin(tiny, run, saved)
    assert (status, errors.count("\n")) == (2, 1)
    assert f"has no {HEAD}: its embeddings are tied" in errors
    embedding = "model.embed_tokens.weight"
    rewrite(saved, lambda tensors: tensors.update({HEAD: tensors[embedding].clone()}))
    assert begin(tiny, run, saved) == (0, "")
