"""Which matrices are projected: by default all of the hidden layers, else those of the patterns."""

from __future__ import annotations

import logging
import warnings
from typing import Any

import pytest
import torch
from architectures import ARCHITECTURES
from support import tiny_model
from torch import nn

from lowrank.optimizers import build, convert, param_groups
from lowrank.optimizers.layers import LowRankLinear
from lowrank.optimizers.targets import hidden_names


class Mlp(nn.Module):
    def __init__(self, *, parts: tuple[str, ...] = ("w1", "w2")) -> None:
        super().__init__()
        for part in parts:
            setattr(self, part, nn.Linear(16, 16))


class Net(nn.Module):
    """Blocks without telling names, a head, and a gate beside experts."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(40, 16)
        self.blocks = nn.ModuleList(Mlp() for _ in range(2))
        self.moe = nn.Module()
        self.moe.gate = nn.Linear(16, 4)
        self.moe.experts = nn.ModuleList(Mlp() for _ in range(2))
        self.lm_head = nn.Linear(16, 40)


def projected(model: nn.Module, **options: Any) -> list[str]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        groups = param_groups(model, rank=4, **options)
    return [name for name in groups[0]["param_names"] if "rank" in groups[0]]


def on_meta(row: tuple[str, str, dict[str, Any], tuple[str, ...]]) -> nn.Module:
    transformers = pytest.importorskip("transformers")
    config = getattr(transformers, f"{row[0]}Config")(**row[2])
    with torch.device("meta"):
        model: nn.Module = getattr(transformers, row[0] + row[1])(config)
    return model


@pytest.mark.parametrize("row", ARCHITECTURES, ids=lambda row: row[0])
def test_every_hidden_matrix_of_an_architecture_is_projected(
    row: tuple[str, str, dict[str, Any], tuple[str, ...]],
) -> None:
    model = on_meta(row)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        groups = param_groups(model, rank=4)
    found = set(groups[0]["param_names"])
    embeddings = {
        f"{name}.weight" for name, m in model.named_modules() if isinstance(m, nn.Embedding)
    }
    matrices = {name for name, param in model.named_parameters() if param.dim() > 1} - embeddings
    left = {name for name in matrices if any(part in name for part in row[3])}
    assert matrices - left == found
    assert all(any(part in name for name in left) for part in row[3] if part not in str(_PATCHES))


_PATCHES = ("patch_embedding", "class_embedding", "cls_token", "position_embeddings")


def test_torch_encoders_are_covered() -> None:
    with torch.device("meta"):
        layer = nn.TransformerEncoderLayer(16, 2, 32)
        model = nn.Sequential(nn.TransformerEncoder(layer, 2, enable_nested_tensor=False))
    kinds = {name.split("layers.")[1][2:] for name in projected(model)}
    expected = {"self_attn.in_proj_weight", "self_attn.out_proj.weight"}
    assert kinds == expected | {"linear1.weight", "linear2.weight"}


def test_packed_matrices_and_transposed_ones_train() -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.GPT2Config(n_embd=16, n_layer=1, n_head=2, vocab_size=30, n_positions=8)
    gpt = transformers.GPT2LMHeadModel(config)
    encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(16, 2, 32), 1)
    for model, batch in ((gpt, torch.arange(8)[None]), (encoder, torch.randn(3, 2, 16))):
        optimizer = build("galore_adamw", model, lr=1e-2, rank=4)
        before = {name: param.detach().clone() for name, param in model.named_parameters()}
        out = model(batch)
        loss = out.logits.square().mean() if hasattr(out, "logits") else out[..., 0].sum()
        loss.backward()
        optimizer.step()
        for name in optimizer.param_groups[0]["param_names"]:
            assert not torch.equal(before[name], model.get_parameter(name))


def test_blocks_count_and_routers_and_heads_do_not() -> None:
    expected = {f"blocks.{i}.{w}.weight" for i in (0, 1) for w in ("w1", "w2")}
    expected |= {f"moe.experts.{i}.{w}.weight" for i in (0, 1) for w in ("w1", "w2")}
    assert set(projected(Net())) == expected == hidden_names(Net())
    gated = nn.ModuleList([Mlp(parts=("gate", "up"))])  # a gated MLP has no experts beside its gate
    assert hidden_names(nn.ModuleDict({"blocks": gated})) == {
        "blocks.0.gate.weight",
        "blocks.0.up.weight",
    }
    model = convert("low_rank_adamw", Net(), rank=4)
    assert isinstance(model.moe.gate, nn.Linear)
    assert isinstance(model.blocks[1].w2, LowRankLinear)


@pytest.mark.parametrize(
    ("patterns", "found"),
    [
        ("mlp", ["mlp.up_proj", "mlp.down_proj"]),
        (["q_proj", "down"], ["self_attn.q_proj", "mlp.down_proj"]),
        (r".*\.(q|up)_proj", ["self_attn.q_proj", "mlp.up_proj"]),
        (r"(q|up)_proj", []),
        ("MLP", []),
        ("all-linear", ["self_attn.q_proj", "mlp.up_proj", "mlp.down_proj", "lm_head"]),
        ("all_linear", ["self_attn.q_proj", "mlp.up_proj", "mlp.down_proj", "lm_head"]),
        ([r".*attn.*", r".*mlp.*"], ["self_attn.q_proj", "mlp.up_proj", "mlp.down_proj"]),
    ],
)
def test_patterns(patterns: Any, found: list[str]) -> None:
    if found:
        assert projected(tiny_model(), patterns=patterns) == [f"{name}.weight" for name in found]
        return
    with pytest.raises(ValueError, match="in its name; accepted are patterns that match one"):
        projected(tiny_model(), patterns=patterns)


@pytest.mark.parametrize("patterns", ["(", [""], [], [3], ["attn", "*mlp"]])
def test_bad_patterns(patterns: Any) -> None:
    with pytest.raises(ValueError, match="patterns"):
        projected(tiny_model(), patterns=patterns)


def test_trainer_agrees_on_what_its_lists_mean() -> None:
    pytest.importorskip("transformers")
    from transformers.trainer_utils import check_target_module_exists

    model = on_meta(ARCHITECTURES[0])
    linear = [name for name, m in model.named_modules() if isinstance(m, nn.Linear)]
    for patterns in (["attn", "mlp"], [r"model\.layers\.\d\.mlp\..*"], ["attn"], ["lm_head"]):
        theirs = [f"{n}.weight" for n in linear if check_target_module_exists(patterns, n)]
        assert projected(model, patterns=patterns) == theirs


def test_one_line_says_the_share_and_a_warning_what_is_left_out(
    caplog: pytest.LogCaptureFixture,
) -> None:
    with (
        caplog.at_level(logging.INFO, logger="lowrank"),
        pytest.warns(UserWarning, match=r"50% of the 2,048 entries of Net's hidden layers") as seen,
    ):
        param_groups(Net(), rank=4, patterns=["moe.experts"])
    assert "blocks.0.w1.weight (12.5%)" in str(seen[0].message)
    assert "lm_head" not in str(seen[0].message)
    assert "moe.gate" not in str(seen[0].message)
    assert sum("projected: 4 matrices" in line for line in caplog.messages) == 1
