"""What LLaMA-7B takes on one GPU, and what is computed again so that it takes no more."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from lowrank.trainers.config import ModelConfig
from lowrank.trainers.models import LanguageModel, build_model
from lowrank.trainers.plan import plan
from lowrank.trainers.recompute import again, recompute_between_products

MINI: dict[str, Any] = {"rank": 1, "plain_rule": "adamw_8bit"}


@pytest.mark.parametrize(
    ("optimizer", "bits", "options", "aim"),
    [
        ("qgalore_adamw_8bit", 8, {"rank": 1024}, 12.5e9),
        ("qgalore_adamw_8bit", 8, {"rank": 1024, "refresh": "randomized"}, 12.5e9),
        ("apollo_mini_adamw", 8, MINI, 8.6e9),
        ("apollo_mini_adamw", 4, MINI, 5.5e9),
    ],
)
def test_the_peak_of_7b(optimizer: str, bits: int, options: dict[str, Any], aim: float) -> None:
    found = plan(
        "llama_7b",
        optimizer,
        weight_bits=bits,
        checkpointing=True,
        update_in_backward=True,
        options=options,
    )
    assert found.peak <= aim, found.phases


def small(**changes: Any) -> LanguageModel:
    config = ModelConfig(
        hidden_size=32,
        intermediate_size=80,
        num_hidden_layers=2,
        num_attention_heads=2,
        vocab_size=61,
        **changes,
    )
    return build_model(config, 16, 0, torch.device("cpu"))


def passes(model: LanguageModel) -> tuple[list[Tensor | None], int]:
    """The loss with all gradients, and bytes that were saved for the backward pass."""
    saved: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        saved[storage.data_ptr()] = storage.nbytes()
        return tensor

    tokens = torch.randint(61, (3, 17), generator=torch.Generator().manual_seed(0))
    with saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = model(tokens[:, :-1], tokens[:, 1:])
    loss.backward()
    return [loss, *(param.grad for param in model.parameters())], sum(saved.values())


@pytest.mark.parametrize(
    "changes", [{"dtype": "bfloat16"}, {"dtype": "float32"}, {"autocast": True}], ids=str
)
def test_what_is_computed_again_is_the_same_to_the_bit(changes: dict[str, Any]) -> None:
    plain, changed = small(**changes), small(**changes)
    recompute_between_products(changed.network)
    copied = copy.deepcopy(changed)
    (expected, before), (found, after) = passes(plain), passes(changed)
    size = 4 if changes.get("dtype") == "float32" else 2
    gates, norms = 2 * 48 * 80 * size, 5 * 48 * 32 * 4 if "bfloat16" in changes.values() else 0
    assert after + gates + norms <= before
    for own, other in zip(found, expected, strict=True):
        assert own is not None
        assert other is not None
        assert torch.equal(own, other)
    for own, other in zip(passes(copied)[0], expected, strict=True):
        assert own is not None
        assert other is not None
        assert torch.equal(own, other)
    untouched = [param.grad for param in changed.parameters()]
    assert all(map(torch.equal, untouched, found[1:]))  # a copy has its own parameters


def test_checkpointed_models_compute_it_again_unless_they_are_compiled() -> None:
    for changes, expected in (
        ({}, False),
        ({"activation_checkpointing": True}, True),
        ({"activation_checkpointing": True, "compile": True}, False),
    ):
        layer = small(**changes).network.model.layers[0]
        assert ("forward" in vars(layer.mlp)) is expected
        assert ("forward" in vars(layer.input_layernorm)) is expected


def test_checkpointed_gradients_are_the_same_to_the_bit() -> None:
    expected, found = (
        passes(small(dtype="bfloat16", activation_checkpointing=kept))[0] for kept in (False, True)
    )
    assert all(
        torch.equal(own, other)
        for own, other in zip(found, expected, strict=True)
        if own is not None and other is not None
    )


def test_other_classes_are_left_as_they_are() -> None:
    class Own(LlamaRMSNorm):  # type: ignore[misc]
        """With a formula of its own, perhaps."""

    model = torch.nn.Sequential(Own(4), LlamaRMSNorm(4), torch.nn.Linear(4, 4))
    recompute_between_products(model)
    assert ["forward" in vars(module) for module in model] == [False, True, False]


def test_inputs_that_need_no_gradient_get_none() -> None:
    given, weight = torch.randn(3, 4), torch.randn(4, requires_grad=True)
    again(torch.mul, given, weight).sum().backward()
    assert given.grad is None
    assert weight.grad is not None
    torch.testing.assert_close(weight.grad, given.sum(0))
    with torch.no_grad():
        assert not again(torch.mul, given, weight).requires_grad
