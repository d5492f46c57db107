"""What wrong uses of converted models say: groups, frozen layers, layers that stay dense, names."""

from __future__ import annotations

import copy
import warnings
import zlib
from typing import Any

import pytest
import torch
from support import hashed, set_gradients, tiny_model
from torch import Tensor, nn
from torch.nn import functional

from lowrank import optimizers
from lowrank.optimizers import LayerEvent, build, convert, merge, param_groups
from lowrank.optimizers.layers import FactoredLinear, LowRankLinear
from lowrank.optimizers.layers.convert import factored_layers
from lowrank.optimizers.layers.seeds import layer_seed, named_layers

#: Methods that schedule something, with options under which it comes soon.
EVENTS: dict[str, dict[str, Any]] = {
    "loqt_adamw": {"update_proj_gap": 2},
    "low_rank_adamw": {"refactor_gap": 2},
    "relora_adamw": {"update_proj_gap": 2},
    "sltrain_adamw": {"refactor_gap": 2, "density": 0.1},
    "sst_adamw": {"update_proj_gap": 2},
    "switchlora_adamw": {"switch_interval": 10.0, "descent_rate": 10.0},
}
#: Options of the conversion, which `build` then may repeat.
LAYERS: dict[str, dict[str, Any]] = {"sltrain_adamw": {"density": 0.1}}
events_of = pytest.mark.parametrize("name", EVENTS)


def made(name: str, model: nn.Module | None = None, **options: Any) -> Any:
    model = tiny_model() if model is None else model
    optimizer = build(name, model, **{"lr": 1e-2, "rank": 4, **EVENTS[name], **options})
    events: list[LayerEvent] = []
    optimizer.register_event_hook(events.append)  # type: ignore[attr-defined]
    return model, optimizer, events


# Groups


@events_of
def test_a_group_without_factors_is_warned_of_and_not_linked(name: str) -> None:
    kind = type(made(name)[1])
    model = convert(name, tiny_model(), rank=4)
    schedule = {"refactor_gap": 2} if "refactor_gap" in EVENTS[name] else {}
    with pytest.warns(UserWarning, match=r"no parameter group has factors=True.*param_groups\("):
        optimizer = kind(model.parameters(), **schedule)
    with pytest.raises(ValueError, match=r"q_proj\.\w+ is in a parameter group without factors"):
        optimizer.attach(model)


def test_plain_factors_need_no_group_of_their_own() -> None:
    model = convert("low_rank_adamw", tiny_model(), rank=4)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        optimizers.LowRankAdamW(model.parameters())


@pytest.mark.parametrize(
    ("option", "value"),
    [("rank", 8), ("patterns", ("mlp",)), ("rank_ratio_matrix", 4.0), ("scale", 0.25)],
)
def test_options_of_a_projection_are_refused_for_factored_layers(option: str, value: Any) -> None:
    model = convert("relora_adamw", tiny_model(), patterns=("mlp",), rank=4)
    with pytest.raises(ValueError, match=rf"{option}=.*accepted are param_groups\(model\) without"):
        param_groups(model, **{option: value})
    groups = param_groups(model, update_proj_gap=7)
    assert [group.get("factors") for group in groups] == [True, None, None]
    assert "rank" in param_groups(merge(model), **{option: value})[0]


def test_projecting_a_converted_model_by_name_is_refused() -> None:
    model = convert("relora_adamw", tiny_model(), rank=4)
    with pytest.raises(ValueError, match=r"rank=4 for a TinyBlock with factored layers"):
        build("galore_adamw", model, rank=4)


def test_events_follow_the_options_that_were_loaded() -> None:
    """Loading makes new groups, which options are read from and written to afterwards."""
    model, optimizer, events = made("relora_adamw", update_proj_gap=5)
    _, other, _ = made("relora_adamw", update_proj_gap=2)
    optimizer.load_state_dict(other.state_dict())
    for step in range(4):
        set_gradients(model, step)
        optimizer.step()
    assert [event.step for event in events] == [2, 4]
    optimizer.param_groups[0]["update_proj_gap"] = 3
    for step in range(4, 9):
        set_gradients(model, step)
        optimizer.step()
    # With another gap the next event is at the next of its multiples.
    assert [event.step for event in events] == [2, 4, 6, 9]


# Frozen layers


@pytest.mark.parametrize("name", ["relora_adamw", "galore_adamw", "qgalore_adamw_8bit"])
def test_that_all_matching_layers_are_frozen_is_said(name: str) -> None:
    model = tiny_model().requires_grad_(requires_grad=False)
    model.lm_head.requires_grad_()
    before = dict(model.named_modules())
    with pytest.raises(ValueError, match=r"is frozen, 3 of them, such as self_attn\.q_proj"):
        build(name, model)
    assert before == dict(model.named_modules())
    with pytest.raises(ValueError, match=r"no nn\.Linear of TinyBlock has one of"):
        build(name, model, patterns=("conv",))


@pytest.mark.parametrize("name", [name for name in EVENTS if name != "loqt_adamw"])
def test_layers_count_by_whichever_factor_is_stepped(name: str) -> None:
    """The first factor without gradients: the layer has its events, and it is said.

    But for SwitchLoRA, whose events would change the rows of that factor in each step. LoQT has one
    factor alone.
    """
    model, optimizer, events = made(name)
    layer = model.mlp["up_proj"]
    first = layer.FACTORS[0]
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for step in range(30):
            set_gradients(model, step)
            getattr(layer, first).grad = None
            optimizer.step()
    said = [str(w.message) for w in caught]
    assert sum(f"without a finite gradient for mlp.up_proj.{first}:" in text for text in said) == 1
    state = optimizer.state[getattr(layer, layer.FACTORS[1])]
    if name == "switchlora_adamw":
        assert state["switched"] == 0
        assert any("waits until both of its factors are trained" in text for text in said)
    else:
        assert state["events"] > 0
        assert max(event.layers for event in events) == 3


@events_of
def test_a_layer_without_gradients_is_said_once(name: str) -> None:
    model, optimizer, events = made(name)
    layer = model.mlp["up_proj"]
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for step in range(12):
            set_gradients(model, step)
            for factor in layer.FACTORS:
                getattr(layer, factor).grad = None
            optimizer.step()
    said = [str(w.message) for w in caught if "finite gradient" in str(w.message)]
    assert len(said) == 1
    assert all(f"mlp.up_proj.{factor}" in said[0] for factor in layer.FACTORS)
    assert "q_proj" not in said[0]
    # SwitchLoRA draws which layers take part in a step.
    assert max(event.layers for event in events) in ((1, 2) if name == "switchlora_adamw" else (2,))


@events_of
def test_layers_that_are_frozen_before_are_named_when_linked(name: str) -> None:
    model = convert(name, tiny_model(), rank=4, **LAYERS.get(name, {}))
    model.mlp["up_proj"].requires_grad_(requires_grad=False)
    with pytest.warns(UserWarning, match=r"trains no factor of mlp\.up_proj, so nothing happens"):
        _, optimizer, events = made(name, model)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for step in range(12):
            set_gradients(model, step)
            optimizer.step()
    # SwitchLoRA draws which layers take part in a step.
    assert max(event.layers for event in events) in ((1, 2) if name == "switchlora_adamw" else (2,))


# Layers that stay dense, and weights that are read


class Scaled(nn.Linear):
    """A linear layer that computes something else."""

    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


def encoder() -> nn.TransformerEncoderLayer:
    torch.manual_seed(0)
    return nn.TransformerEncoderLayer(16, 2, 24, dropout=0.0, batch_first=True).double()


@events_of
def test_a_transformer_encoder_layer_trains_and_evaluates(name: str) -> None:
    layer = encoder()
    with pytest.warns(UserWarning, match=r"stay dense: self_attn\.out_proj \(nn\.MultiheadAttent"):
        convert(name, layer, rank=16, patterns=("self_attn", "linear"), **LAYERS.get(name, {}))
    assert type(layer.self_attn.out_proj).__name__ == "NonDynamicallyQuantizableLinear"
    assert isinstance(layer.linear1, FactoredLinear)
    optimizer = build(name, layer, lr=1e-2, **EVENTS[name])
    x = torch.randn(3, 5, 16, dtype=torch.float64)
    for _ in range(4):
        optimizer.zero_grad()
        layer(x).square().mean().backward()
        assert all(getattr(layer.linear1, f).grad is not None for f in layer.linear1.FACTORS)
        optimizer.step()
    layer.eval()
    merged = merge(copy.deepcopy(layer))
    with torch.no_grad():  # the fast path, which reads the weights
        torch.testing.assert_close(layer(x), merged(x))
    layer(x).sum().backward()


def test_a_linear_layer_with_its_own_forward_stays() -> None:
    model = nn.ModuleDict({"mlp_a": Scaled(6, 6), "mlp_b": nn.Linear(6, 6)})
    with pytest.warns(UserWarning, match=r"mlp_a \(Scaled has a forward pass of its own\)"):
        convert("relora_adamw", model, rank=2)
    assert [type(layer) for layer in model.values()] == [Scaled, LowRankLinear]
    with pytest.raises(ValueError, match="can be replaced: mlp_a"):
        convert("relora_adamw", nn.ModuleDict({"mlp_a": Scaled(6, 6)}), rank=2)


@events_of
def test_weights_that_are_read_train_the_factors_or_refuse(name: str) -> None:
    model = nn.ModuleDict({"mlp": nn.Linear(6, 6, dtype=torch.float64)})
    convert(name, model, rank=2)
    layer = model["mlp"]
    torch.testing.assert_close(layer.weight, layer.effective_weight())
    assert layer.weight.requires_grad
    x = torch.randn(4, 6, dtype=torch.float64)
    loss = functional.linear(x, layer.weight, layer.bias).square().sum()
    if name in ("loqt_adamw", "sst_adamw"):
        with pytest.raises(RuntimeError, match="patterns that leave this layer out"):
            loss.backward()
        return
    loss.backward()
    by_weight = [getattr(layer, factor).grad.clone() for factor in layer.FACTORS]
    layer.zero_grad()
    layer(x).square().sum().backward()
    for factor, grad in zip(layer.FACTORS, by_weight, strict=True):
        torch.testing.assert_close(getattr(layer, factor).grad, grad)
    with torch.no_grad():
        assert not layer.weight.requires_grad


def test_heads_and_plain_spectral_gradients() -> None:
    linear = nn.Linear(6, 6)
    heads = LowRankLinear(linear, 0, rank=2, alpha=2.0, heads=2)
    with pytest.raises(RuntimeError, match="LowRankLinear"):
        heads.weight.sum().backward()
    heads.eval().weight.sum().backward()
    plain = optimizers.layers.SpectralLinear(linear, 0, rank=2, enhanced=False)
    plain.weight.square().sum().backward()
    assert plain.left.grad.any()


# Draws


def gradients_by_name(model: nn.Module, step: int) -> None:
    """As `set_gradients`, which goes by position."""
    tensors = {name: param for name, param in model.named_parameters() if param.requires_grad}
    for name, layer in factored_layers(model):
        probe = getattr(layer, "_probe", None)
        if probe is not None:
            tensors[f"{name}.probe"] = probe
    for name, tensor in tensors.items():
        values = hashed(tensor.numel(), zlib.crc32(name.encode()) % 9973 + step)
        tensor.grad = values.view(tensor.shape).to(tensor)


@events_of
def test_draws_go_by_name(name: str) -> None:
    """A frozen first layer changes nothing of what the others draw."""
    options = {"refresh": "randomized"} if name == "loqt_adamw" else {}
    states = []
    for frozen in (False, True):
        model = tiny_model(dtype=torch.float64)
        model.self_attn["q_proj"].requires_grad_(requires_grad=not frozen)
        schedules = name not in ("low_rank_adamw", "sltrain_adamw")
        seed = {"seed": 3} if schedules else {}
        _, optimizer, events = made(name, model, **options, **seed)
        for step in range(8):
            gradients_by_name(model, step)
            optimizer.step()
        assert events
        states.append(model.mlp["up_proj"].state_dict())
    assert states[0].keys() == states[1].keys()
    assert all(torch.equal(value, states[1][key]) for key, value in states[0].items())


def test_initial_draws_go_by_name() -> None:
    first, second = tiny_model(), tiny_model()
    second.self_attn["q_proj"].requires_grad_(requires_grad=False)
    for model in (first, second):
        convert("relora_adamw", model, rank=4)
    assert len(list(factored_layers(second))) == 2
    assert torch.equal(first.mlp["up_proj"].lora_a, second.mlp["up_proj"].lora_a)
    assert not torch.equal(first.mlp["up_proj"].lora_a, first.self_attn["q_proj"].lora_a)


def test_names_are_those_without_wrappers() -> None:
    plain = {name for name, _ in named_layers(tiny_model())}
    compiled = nn.ModuleDict({"_orig_mod": nn.ModuleDict({"module": tiny_model()})})
    assert {name for name, _ in named_layers(compiled)} == plain
    held = nn.ModuleDict({"net": nn.DataParallel(tiny_model())})
    expected = {"", *(f"net.{name}" if name else "net" for name in plain)}
    assert {name for name, _ in named_layers(held)} == expected
    own = nn.ModuleDict({"net": nn.ModuleDict({"module": nn.Linear(2, 2)})})
    assert "net.module" in {name for name, _ in named_layers(own)}


def test_seeds_differ_by_seed_name_and_parts() -> None:
    seeds = [layer_seed(s, n, p) for s in (0, 1) for n in ("a", "b", "ab") for p in (0, 1)]
    assert len(set(seeds)) == len(seeds)
    assert layer_seed(0, "a") == layer_seed(0, "a")
