"""What users of quantised weights, newer methods and merged models ran into."""

from __future__ import annotations

import copy
import pickle
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from support import tiny_model
from torch import nn

from lowrank.optimizers import GaLoreAdamW, build, convert, merge, read_official
from lowrank.optimizers.weights import QuantizedWeight


@pytest.mark.parametrize(
    "options", [{"lr": -1.0}, {"betas": (2.0, 1.0)}, {"rank": -1}, {"residual": "nope"}], ids=str
)
def test_a_build_that_raises_quantises_nothing(options: dict[str, Any]) -> None:
    model = tiny_model()
    with pytest.raises(ValueError, match="accepted"):
        build("galore_adamw", model, **{"rank": 4, "weight_bits": 4, **options})
    assert not any(isinstance(param, QuantizedWeight) for param in model.parameters())


@pytest.mark.parametrize(
    ("name", "options"), [("sltrain_adamw", {}), ("galore_adamw", {"weight_bits": 4})]
)
def test_steps_after_a_merge_say_that_parameters_are_gone(
    name: str, options: dict[str, Any]
) -> None:
    model = tiny_model()
    optimizer = build(name, model, lr=1e-2, rank=4, **options)

    def step() -> None:
        optimizer.zero_grad()
        model(torch.arange(8).view(1, 8)).square().mean().backward()
        optimizer.step()

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        step()
    merge(model)
    with pytest.warns(UserWarning, match="not in the model any more"):
        step()


@pytest.mark.parametrize(
    ("name", "options"),
    [("scale_sgd", {"normalise": "columns"}), ("racs_adamw", {"use_racs": False})],
)
def test_what_build_decides_by_group_is_no_option_of_it(name: str, options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=rf"{next(iter(options))}=.*in groups of your own"):
        build(name, tiny_model(), **options)


@pytest.mark.parametrize("name", ["scale_sgd", "racs_adamw", "foam_adamw", "lora_pre_adamw"])
def test_patterns_without_a_match_raise(name: str) -> None:
    with pytest.raises(ValueError, match="accepted are patterns that match"):
        build(name, tiny_model(), patterns="nothing")
    with pytest.warns(UserWarning, match="hidden layers are"):
        optimizer = build(name, tiny_model(), patterns="q_proj")
    chosen = optimizer.param_groups[0]["param_names"]
    assert chosen == ["self_attn.q_proj.weight"]


def test_scale_normalises_transposed_layers_by_their_outputs() -> None:
    class Conv1D(nn.Module):
        """As transformers has it: the weight is in x out."""

        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.randn(6, 4))

    model = nn.ModuleDict({"h": nn.ModuleList([nn.ModuleDict({"mlp": Conv1D()})])})
    optimizer = build("scale_sgd", model, lr=1.0)
    (group,) = [group for group in optimizer.param_groups if group["params"]]
    assert group["normalise"] == "columns"
    (weight,) = group["params"]
    before = weight.detach().clone()
    weight.grad = torch.randn(6, 4, generator=torch.Generator().manual_seed(0))
    optimizer.step()
    sizes = (before - weight.detach()).square().mean(0).sqrt()
    torch.testing.assert_close(sizes, torch.ones(4), rtol=1e-4, atol=0)


def test_a_merge_inside_of_an_engine_raises_and_changes_nothing() -> None:
    model = convert("sltrain_adamw", tiny_model(), rank=4)
    names = [name for name, _ in model.named_parameters()]
    _, param = next((n, p) for n, p in model.named_parameters() if n.startswith("mlp."))
    param._z3_optimizer = None
    with pytest.raises(ValueError, match=r"mlp\.\w+ is in a DeepSpeed engine.*: accepted is merge"):
        merge(model)
    assert [name for name, _ in model.named_parameters()] == names


@pytest.mark.parametrize("name", ["adamw", "muon", "relora_adamw"])
@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"update_proj_gap": "x"}, "update_proj_gap='x': accepted is an integer of at least 1"),
        ({"rank": 0}, "rank=0: accepted is an integer of at least 1"),
    ],
)
def test_options_without_effect_are_checked(name: str, options: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        build(name, tiny_model(), **options)


def test_patterns_of_another_type() -> None:
    with pytest.raises(ValueError, match=r"patterns=5: accepted are a part of layers' names"):
        build("galore_adamw", tiny_model(), patterns=5)


@pytest.mark.parametrize("value", [0.9, None, "x", (0.9,)], ids=repr)
def test_betas_of_another_type(value: Any) -> None:
    with pytest.raises(ValueError, match=r"betas=.*: accepted are 2 numbers in \[0, 1\)"):
        build("galore_adamw", tiny_model(), betas=value)


def train_a_step(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    optimizer.zero_grad()
    model(torch.arange(8).view(1, 8)).square().mean().backward()
    optimizer.step()


@pytest.mark.parametrize("bits", [8, 4])
def test_entries_of_quantised_weights_are_written_by_a_copy_of_all(bits: int) -> None:
    model = tiny_model()
    build("galore_adamw", model, rank=4, weight_bits=bits)
    weight = next(param for param in model.parameters() if isinstance(param, QuantizedWeight))

    def by_index() -> None:
        with torch.no_grad():
            weight[0] = 0.0

    def in_place() -> None:
        with torch.no_grad():
            weight[:2] += 1.0

    for write in (by_index, in_place, lambda: weight.data[0].fill_(0.0)):
        with pytest.raises(ValueError, match="writing into entries of a"):
            write()
    read = weight.data[0] * 2.0
    assert type(read) is torch.Tensor
    read.zero_()
    before = float(weight.data[0].norm())
    dense = weight.dequantize()
    dense[0] = 0.0
    weight.data.copy_(dense)
    # In four bits a group has other entries, too, and may have no code for zero.
    assert float(weight.data[0].norm()) < before / 4


@pytest.mark.parametrize("name", ["adamw", "galore_adamw", "sltrain_adamw"])
@pytest.mark.parametrize("option", [{"plain_lr": 1.0}, {"weight_bits": 8}, {"patterns": "up"}])
def test_other_methods_options_in_a_group_raise(name: str, option: dict[str, Any]) -> None:
    model = tiny_model()
    optimizer = build(name, model, lr=1e-2)
    train_a_step(model, optimizer)
    before = [param.detach().clone() for param in model.parameters()]
    optimizer.param_groups[0].update(option)
    with pytest.raises(ValueError, match=f"{next(iter(option))}=.* has no effect"):
        train_a_step(model, optimizer)
    assert all(map(torch.equal, before, model.parameters()))
    del optimizer.param_groups[0][next(iter(option))]
    optimizer.param_groups[0]["a_note_of_the_users"] = 3
    train_a_step(model, optimizer)


def test_a_layer_that_was_frozen_at_first_and_is_trained_later_is_named() -> None:
    model = tiny_model()
    name, frozen = next((n, p) for n, p in model.named_parameters() if "proj" in n)
    frozen.requires_grad_(False)
    optimizer = build("galore_adamw", model, lr=1e-2, rank=4)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        train_a_step(model, optimizer)
        frozen.requires_grad_(True)
        added = build("galore_adamw", model, lr=1e-2, rank=4)
        train_a_step(model, added)
    with pytest.warns(UserWarning, match=f"such as {name}, have gradients, but were frozen"):
        train_a_step(model, optimizer)


def test_eps_may_be_zero() -> None:
    for name in ("galore_adamw", "adamw", "fira_adamw", "galore_adamw_8bit", "relora_adamw"):
        model = tiny_model()
        optimizer = build(name, model, lr=1e-2, eps=0)
        for param in model.parameters():
            param.grad = torch.ones_like(param) if param.requires_grad else None
        optimizer.step()


def test_what_is_no_name_or_no_model_is_said() -> None:
    model = tiny_model()
    with pytest.raises(ValueError, match=r"name is a type: accepted is a name such as"):
        build(type(model), model)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"model is a generator: accepted is an nn\.Module; Ga"):
        build("galore_adamw", model.parameters())  # type: ignore[arg-type]


def test_quantised_weights_move_after_a_step_that_was_skipped() -> None:
    model = tiny_model()
    optimizer = build("galore_adamw", model, rank=4, weight_bits=8)
    for param in model.parameters():
        param.grad = torch.full_like(param, float("nan"))
    with pytest.warns(UserWarning, match="non-finite gradient"):
        optimizer.step()
    model.to(torch.bfloat16)
    assert all(param.dtype == torch.bfloat16 for param in model.parameters())


@pytest.mark.parametrize("bits", [8, 4])
def test_writes_into_views_of_quantised_weights_raise(bits: int) -> None:
    model = tiny_model()
    build("galore_adamw", model, rank=4, weight_bits=bits)
    weight = next(param for param in model.parameters() if isinstance(param, QuantizedWeight))
    before = weight.dequantize()

    def rows() -> None:
        for row in weight.data:
            row.fill_(0.0)

    def by_index() -> None:
        weight.data.T[0] = 0.0

    writes = (
        rows,
        by_index,
        lambda: weight.data.T.mul_(2.0),
        lambda: weight.data.t().mul_(2.0),
        lambda: weight.data.mT[0].zero_(),
        lambda: weight.data.chunk(2)[0].zero_(),
        lambda: torch.split(weight.data, 2)[0].zero_(),
        lambda: weight.data.view(-1)[:4].zero_(),
        lambda: weight.data.flatten().zero_(),
        lambda: weight.detach().narrow(0, 0, 1).zero_(),
        lambda: torch.transpose(weight.data, 0, 1).clamp_(0.0),
        lambda: weight.data[0][:2].zero_(),
        lambda: torch.add(weight.data[0], 1.0, out=weight.data.unbind()[0]),
    )
    for write in writes:
        with pytest.raises(ValueError, match="writing into entries of a"):
            write()
    assert torch.equal(weight.dequantize(), before)
    for read in (weight.data.T @ torch.ones(weight.shape[0]), weight.data.chunk(2)[0] + 1.0):
        assert type(read) is torch.Tensor
        read.zero_()
    assert weight.T.requires_grad


def test_a_negative_scale_is_refused() -> None:
    with pytest.raises(ValueError, match=r"scale=-1: accepted is a finite number of at least 0"):
        build("galore_adamw", tiny_model(), scale=-1)


@pytest.mark.parametrize("saved", [[], None, 3, "state"], ids=repr)
def test_a_state_of_another_type_is_refused(saved: Any) -> None:
    optimizer = build("galore_adamw", tiny_model(), rank=4)
    with pytest.raises(ValueError, match=f"is a {type(saved).__name__}: accepted is what state_d"):
        optimizer.load_state_dict(saved)


def test_experts_without_names_are_called_by_their_shape_once() -> None:
    group = {"params": [nn.Parameter(torch.zeros(3, 4, 5))], "rank": 2}
    with pytest.raises(ValueError, match=r"^the parameter of shape \(3, 4, 5\) would be 3 matr"):
        GaLoreAdamW([group])


def test_a_network_of_convolutions_is_told_of_their_option() -> None:
    network = nn.Sequential(nn.Conv2d(32, 64, 3), nn.Conv2d(64, 64, 3))
    with pytest.raises(ValueError, match=r"rank_ratio_cnn=4 with COAP"):
        build("coap_adamw", network)
    assert build("coap_adamw", network, rank_ratio_cnn=4).param_groups[0]["rank_ratio_cnn"] == 4


@pytest.mark.parametrize(
    "name", ["galore_adamw", "adamw", "sltrain_adamw", "scale_sgd", "lisa_adamw"]
)
def test_a_wrong_rate_of_what_is_not_projected_is_called_by_its_name(name: str) -> None:
    with pytest.raises(ValueError, match=r"plain_lr='1e-3': accepted is a finite number"):
        build(name, tiny_model(), plain_lr="1e-3")


def test_fused_without_a_fused_kernel_is_said_once() -> None:
    for name in ("galore_adamw", "adamw", "sltrain_adamw", "fira_adamw"):
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            build(name, tiny_model(), rank=4, fused=True, foreach=None) if name != "adamw" else (
                build(name, tiny_model(), fused=True)
            )
    for name in ("galore_adafactor", "online_subspace_lion", "galore_adamw_8bit"):
        with pytest.warns(UserWarning, match="fused=True has no effect on") as told:
            build(name, tiny_model(), rank=4, fused=True)
        assert len(told) == 1
    with pytest.warns(UserWarning, match="fused=True has no effect on Adam"):
        build("galore_adamw", tiny_model(), rank=4, fused=True, compile=True)


def test_a_loaded_state_with_nan_is_named() -> None:
    model = tiny_model()
    optimizer = build("galore_adamw", model, rank=4)
    train_a_step(model, optimizer)
    saved = optimizer.state_dict()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        optimizer.load_state_dict(saved)
    name = optimizer.param_groups[0]["param_names"][1]
    saved = copy.deepcopy(saved)
    saved["state"][1]["exp_avg_sq"][0, 0] = float("nan")
    saved["state"][2]["exp_avg"][0, 0] = float("inf")
    with pytest.warns(
        UserWarning, match=f"of {name} has NaN or infinity in exp_avg_sq, and 1"
    ) as t:
        optimizer.load_state_dict(saved)
    assert len(t) == 1


@pytest.mark.parametrize("content", [b"", b"hello", b"PK\x03\x04 cut short"], ids=repr)
def test_files_that_torch_did_not_save_are_refused_by_name(content: bytes, tmp_path: Path) -> None:
    file = tmp_path / "optimizer.pt"
    file.write_bytes(content)
    with pytest.raises((ValueError, pickle.UnpicklingError)) as raised:
        read_official(file)
    assert isinstance(raised.value, pickle.UnpicklingError) or str(file) in str(raised.value)
