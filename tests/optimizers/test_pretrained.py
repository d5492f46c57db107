"""Converted Hugging Face models in files that `from_pretrained` reads."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from lowrank.optimizers import build, dense_state_dict, merge

transformers = pytest.importorskip("transformers")

CONVERTING = (
    "relora_adamw",
    "sltrain_adamw",
    "switchlora_adamw",
    "sst_adamw",
    "loqt_adamw",
    "low_rank_adamw",
    "qgalore_adamw_8bit",
)
TOKENS = torch.arange(6)[None]


def llama(seed: int = 0) -> Any:
    torch.manual_seed(seed)
    config = transformers.LlamaConfig(
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=1,
        num_attention_heads=2,
        vocab_size=32,
    )
    return transformers.LlamaForCausalLM(config)


def trained(name: str) -> Any:
    model = llama()
    optimizer = build(name, model, lr=1e-2, rank=4)
    model(TOKENS, labels=TOKENS).loss.backward()
    optimizer.step()
    return model


def assert_same_function(folder: Path, model: nn.Module) -> None:
    again = type(model).from_pretrained(folder)
    torch.testing.assert_close(again(TOKENS).logits, model(TOKENS).logits, rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", CONVERTING)
def test_from_pretrained_gives_the_same_function(name: str, tmp_path: Path) -> None:
    from safetensors.torch import load_file

    model = trained(name)
    model.save_pretrained(tmp_path)
    assert_same_function(tmp_path, model)
    # The same file holds the parts, from which training goes on to the bit.
    other = llama(seed=1)
    build(name, other, rank=4)
    missing = other.load_state_dict(load_file(tmp_path / "model.safetensors"), strict=False)
    assert not missing.unexpected_keys
    ours, theirs = model.state_dict(), other.state_dict()
    assert all(torch.equal(ours[key], theirs[key]) for key in ours)


def test_other_ways_of_saving(tmp_path: Path) -> None:
    model = trained("relora_adamw")
    transformers.Trainer(
        model=model, args=transformers.TrainingArguments(tmp_path / "t", report_to=[])
    ).save_model(tmp_path / "trainer")
    assert_same_function(tmp_path / "trainer", model)
    model.save_pretrained(tmp_path / "given", state_dict=model.state_dict())
    assert_same_function(tmp_path / "given", model)
    model.save_pretrained(tmp_path / "dense", state_dict=dense_state_dict(model))
    assert_same_function(tmp_path / "dense", model)
    copied = copy.deepcopy(model)
    with torch.no_grad():
        model.lm_head.weight.zero_()
    copied.save_pretrained(tmp_path / "copied")
    assert_same_function(tmp_path / "copied", copied)
    merge(copied).save_pretrained(tmp_path / "merged")
    assert_same_function(tmp_path / "merged", copied)


def test_a_spread_layer_is_refused(tmp_path: Path) -> None:
    model = trained("relora_adamw")
    layer = model.model.layers[0].mlp.up_proj
    whole = model.state_dict()
    layer.lora_a.data = torch.empty(0)  # as ZeRO leaves it
    with pytest.raises(ValueError, match=r"mlp\.up_proj is spread over processes"):
        model.save_pretrained(tmp_path, state_dict=whole)
    assert not list(tmp_path.iterdir())
