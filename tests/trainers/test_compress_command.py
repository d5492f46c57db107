"""`lowrank compress`: a checkpoint of a tiny LLaMA, its factors, and what is refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from lowrank.optimizers import build
from lowrank.optimizers.layers import LowRankLinear
from lowrank.trainers.compressed import FACTORED, RECORD, load
from lowrank.trainers.config import ModelConfig
from lowrank.trainers.models import new_network
from lowrank.trainers.parts import save_network

Run = Callable[[list[str]], tuple[int, str, str]]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A network whose queries and keys are of rank 3, and all else full."""
    pytest.importorskip("transformers")
    folder = tmp_path_factory.mktemp("compress") / "step-00000003"
    folder.mkdir()
    config = ModelConfig(
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=2,
        vocab_size=64,
        dtype="float32",
    )
    network = new_network(config, 16, 0)
    with torch.no_grad():
        for name, param in network.named_parameters():
            if "q_proj" in name or "k_proj" in name:
                u, s, vh = torch.linalg.svd(param)
                param.copy_((u[:, :3] * s[:3]) @ vh[:3])
    save_network(network, folder)
    (folder / "tokenizer.json").write_text("{}")
    (folder / "optimizer.pt").write_text("not copied")
    return folder


def test_writes_factors_that_load_and_train(checkpoint: Path, run: Run, tmp_path: Path) -> None:
    output = tmp_path / "small"
    status, out, err = run(
        ["compress", str(checkpoint), "--output", str(output), "--reduction=0.35"]
    )
    assert (status, err) == (0, "")
    assert out.count("factored, error 0.000") == 4
    assert "4 of 14 matrices are factors now" in out
    names = {path.name for path in output.iterdir()}
    assert {FACTORED, RECORD, "config.json", "tokenizer.json"} <= names
    assert not names & {"model.safetensors", "optimizer.pt"}
    record = json.loads((output / RECORD).read_text())
    assert sum(own["low_rank"] for own in record["matrices"]) == 4

    import transformers

    dense = transformers.LlamaForCausalLM.from_pretrained(checkpoint)
    network = load(output)
    tokens = torch.arange(12).view(2, 6)
    torch.testing.assert_close(network(tokens).logits, dense(tokens).logits, rtol=1e-4, atol=1e-5)
    factored = [module for module in network.modules() if isinstance(module, LowRankLinear)]
    assert [layer.rank for layer in factored] == [3] * 4
    optimizer = build("low_rank_adamw", network, lr=1e-2)
    before = {name: param.detach().clone() for name, param in network.named_parameters()}
    network(tokens, labels=tokens).loss.backward()
    optimizer.step()
    changed = {n for n, p in network.named_parameters() if not torch.equal(p, before[n])}
    assert changed == {name for name in before if "lora" in name}
    assert len(changed) == 8


def test_what_is_refused(checkpoint: Path, run: Run, tmp_path: Path) -> None:
    taken = tmp_path / "taken"
    taken.mkdir()
    (taken / "file").write_text("")
    new = tmp_path / "new"
    for arguments, message in (
        ([str(checkpoint), "--output", str(taken), "--reduction=0.3"], "new or empty folder"),
        ([str(tmp_path), "--output", str(new), "--reduction=0.3"], "has no model.safetensors"),
        ([str(checkpoint), "--output", str(new), "--reduction=1.5"], "reduction=1.5"),
        ([str(checkpoint), "--output", str(new), "--reduction=0.01"], "no matrix loses 50%"),
    ):
        status, _, err = run(["compress", *arguments])
        assert status == 2
        assert message in err
        assert err.count("\n") == 1
    assert not new.exists()
    assert [path.name for path in tmp_path.iterdir()] == ["taken"]
    with pytest.raises(ValueError, match="accepted is what lowrank compress wrote"):
        load(checkpoint)
