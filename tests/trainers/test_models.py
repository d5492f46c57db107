from pathlib import Path

import pytest
import torch
import torch.nn.functional as functional

from lowrank.trainers.config import ModelConfig
from lowrank.trainers.models import build_model, parameter_count
from lowrank.trainers.parts import save_network
from lowrank.trainers.preset import preset_layer
from lowrank.trainers.weights import weights_sha256

CPU = torch.device("cpu")
SMALL = ModelConfig(
    hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2, vocab_size=61
)


def batch(length: int = 16) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(61, (3, length + 1), generator=generator)
    return tokens[:, :-1], tokens[:, 1:]


def test_loss_is_that_of_the_hugging_face_model() -> None:
    model = build_model(SMALL, 16, 0, CPU)
    inputs, targets = batch()
    logits = model.network(input_ids=inputs).logits
    expected = functional.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="sum")
    torch.testing.assert_close(model(inputs, targets), expected)


def test_activation_checkpointing_changes_no_gradient() -> None:
    gradients = []
    for checkpointing in (False, True):
        config = ModelConfig(**{**SMALL.__dict__, "activation_checkpointing": checkpointing})
        model = build_model(config, 16, 0, CPU)
        model(*batch()).backward()
        gradients.append([parameter.grad for parameter in model.parameters()])
    for one, other in zip(*gradients, strict=True):
        assert one is not None
        torch.testing.assert_close(one, other)


def test_the_seed_alone_decides_the_weights() -> None:
    hashes = [weights_sha256(build_model(SMALL, 16, seed, CPU).network) for seed in (1, 1, 2)]
    assert hashes[0] == hashes[1] != hashes[2]


def test_fingerprint_sees_every_bit_and_the_names() -> None:
    model = build_model(SMALL, 16, 0, CPU)
    before = weights_sha256(model.network)
    with torch.no_grad():
        model.network.lm_head.weight[-1, -1].nextafter_(torch.tensor(9.0))
    assert weights_sha256(model.network) != before
    assert weights_sha256(torch.nn.Linear(2, 2)) != weights_sha256(torch.nn.Bilinear(1, 2, 2))


def test_bfloat16_holds_every_weight_in_bfloat16() -> None:
    model = build_model(ModelConfig(**{**SMALL.__dict__, "dtype": "bfloat16"}), 16, 0, CPU)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    loss = model(*batch())
    assert loss.dtype == torch.float32
    assert torch.isfinite(loss)


def test_autocast_computes_products_in_bfloat16_over_float32_weights() -> None:
    whole = build_model(SMALL, 16, 0, CPU)
    mixed = build_model(ModelConfig(**{**SMALL.__dict__, "autocast": True}), 16, 0, CPU)
    computed = set()
    for name, layer in mixed.network.model.named_modules():
        if isinstance(layer, torch.nn.Linear):
            assert layer.weight.dtype == torch.float32, name
            layer.register_forward_hook(lambda *args: computed.add(args[2].dtype))
    loss, expected = mixed(*batch()), whole(*batch())
    assert computed == {torch.bfloat16}
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(whole(*batch()), loss, rtol=1e-3, atol=0)
        assert whole(*batch()) != expected
    assert loss.dtype == torch.float32
    assert loss != expected
    torch.testing.assert_close(loss, expected, rtol=1e-3, atol=0)
    loss.backward()
    expected.backward()
    for one, other in zip(mixed.parameters(), whole.parameters(), strict=True):
        assert one.grad is not None
        assert other.grad is not None
        assert one.grad.dtype == torch.float32
        assert (one.grad - other.grad).norm() < 0.02 * other.grad.norm()


def test_smallest_preset_has_its_documented_size() -> None:
    values = preset_layer("llama_9m", "galore_adamw")["model"]
    model = build_model(ModelConfig(**values), 256, 0, CPU)
    assert parameter_count(model) == 8_820_160
    assert model.network.config.rope_parameters["rope_theta"] == 10000.0
    assert not model.network.config.tie_word_embeddings


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_saved_weights_load_with_transformers(tmp_path: Path, dtype: str) -> None:
    from transformers import AutoModelForCausalLM

    model = build_model(ModelConfig(**{**SMALL.__dict__, "dtype": dtype}), 16, 3, CPU)
    save_network(model.network, tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert type(loaded).__name__ == "LlamaForCausalLM"
    assert weights_sha256(loaded) == weights_sha256(model.network)
    inputs, _ = batch()
    with torch.no_grad():
        model.eval()
        ours = model.network(input_ids=inputs).logits
        assert torch.equal(loaded.eval()(input_ids=inputs).logits, ours)


@pytest.mark.slow
def test_compiled_model_has_the_same_loss_and_names() -> None:
    plain = build_model(SMALL, 16, 0, CPU)
    compiled = build_model(ModelConfig(**{**SMALL.__dict__, "compile": True}), 16, 0, CPU)
    assert list(compiled.state_dict()) == list(plain.state_dict())
    torch.testing.assert_close(compiled(*batch()), plain(*batch()), rtol=1e-4, atol=1e-4)
