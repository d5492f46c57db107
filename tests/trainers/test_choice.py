"""Rules for embeddings and head, and official packages, as a run's optimizer."""

from __future__ import annotations

import shutil
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from support import set_gradients, tiny_model
from tiny_runs import comparable_metrics, summary
from torch import Tensor, nn

from lowrank.optimizers import GaLoreAdamW, available, build, state_bytes
from lowrank.trainers.choice import SEARCHED, accepts_betas, build_named
from lowrank.trainers.joined import JoinedOptimizer
from lowrank.trainers.official import PACKAGES, build_official, canonical_name, missing

Run = Callable[[list[str]], tuple[int, str, str]]


def trained(name: str, steps: int = 4, **options: Any) -> tuple[nn.Module, Any]:
    model = tiny_model()
    optimizer = build_named(name, model, 1e-2, {"rank": 4, **options}, total_steps=10)
    for step in range(steps):
        set_gradients(model, step)
        optimizer.step()
        optimizer.zero_grad()
    return model, optimizer


@pytest.mark.parametrize("rule", ["adamw", "adafactor"])
def test_embeddings_and_head_follow_the_rule_that_is_asked_for(rule: str) -> None:
    model, optimizer = trained("galore_adamw", plain_rule=rule, plain_lr=3e-3)
    own, _ = trained("galore_adamw", plain_lr=3e-3)
    alone = tiny_model()
    other = build(rule, alone, lr=3e-3, weight_decay=0.0)
    for step in range(4):
        set_gradients(alone, step)
        other.step()
        other.zero_grad()
    for name, weight in model.named_parameters():
        hidden = name.endswith("weight") and ("attn" in name or "mlp" in name)
        wanted = dict((own if hidden else alone).named_parameters())[name]
        assert torch.equal(weight, wanted), name
    # One optimizer, which works on several processes as it does under its own rule.
    assert type(optimizer) is GaLoreAdamW


@pytest.mark.parametrize("rule", ["own", "adamw", "adafactor"])
def test_embeddings_and_head_have_their_rates_under_any_rule(rule: str) -> None:
    model = tiny_model()
    options = {"rank": 4, "plain_rule": rule, "plain_lr": 3e-3, "head_lr": 1e-3}
    options["embedding_lr"] = 5e-3
    optimizer = build_named("galore_adamw", model, 1e-2, options, total_steps=10)
    rates = {id(p): group["lr"] for group in optimizer.param_groups for p in group["params"]}
    assert rates[id(model.lm_head.weight)] == 1e-3
    assert rates[id(model.embed_tokens.weight)] == 5e-3
    assert rates[id(model.norm.weight)] == 3e-3
    assert rates[id(model.self_attn["q_proj"].weight)] == 1e-2


def test_every_parameter_is_trained_once_under_any_rule() -> None:
    for name in available():
        model, dense = tiny_model(), tiny_model()
        for item in (model, dense):  # GaLore+ asks for it
            item.config = types.SimpleNamespace(num_attention_heads=2)
        optimizer = build_named(name, model, 1e-2, {"rank": 4, "plain_rule": "adafactor"}, 10)
        members = [p for group in optimizer.param_groups for p in group["params"]]
        whole = build(name, dense, lr=1e-2, rank=4)
        wanted = [p for group in whole.param_groups for p in group["params"]]
        assert len({id(p) for p in members}) == len(members) == len(wanted), name
        assert all(p.requires_grad for p in members), name


def test_a_wrong_rule_is_named() -> None:
    with pytest.raises(ValueError, match=r"optimizer.plain_rule is 'sgd'; accepted: own, adamw"):
        build_named("adamw", tiny_model(), 1e-2, {"plain_rule": "sgd"}, 10)


def test_null_is_the_methods_own() -> None:
    nothing = dict.fromkeys(SEARCHED)
    for name in ("adamw", "galore_adamw", "cautious_adafactor"):
        groups = [trained(name, 0, **options)[1].param_groups for options in ({}, nothing)]
        one, other = ([{k: g[k] for k in g if k != "params"} for g in each] for each in groups)
        assert one == other, name


def test_betas_are_the_methods_or_the_packages() -> None:
    having = [name for name in ("cautious_adafactor", "galore_adamw") if accepts_betas(name)]
    assert having == ["cautious_adafactor", "galore_adamw"]
    assert accepts_betas("official:fira_adamw")
    assert not accepts_betas("galore_adafactor")
    assert not accepts_betas("official:galore_adafactor")


@pytest.mark.parametrize("rule", ["adamw", "adafactor"])
def test_a_run_with_a_rule_resumes_to_the_bit(
    rule: str, run: Run, tiny: Callable[..., list[str]], tmp_path: Path
) -> None:
    more = (f"optimizer.plain_rule={rule}",)
    straight, halved = tmp_path / "straight", tmp_path / "halved"
    assert run(tiny(straight, 6, *more))[0] == 0
    assert run(tiny(halved, 6, *more))[0] == 0
    # As if it had been killed after its first checkpoint.
    shutil.rmtree(halved / "checkpoints" / "step-00000006")
    (halved / "summary.json").unlink()
    assert run([*tiny(halved, 6, *more), "--resume=auto"])[0] == 0
    assert summary(halved)["weights_sha256"] == summary(straight)["weights_sha256"]
    assert comparable_metrics(halved) == comparable_metrics(straight)


class Projector:
    """What an official package keeps in its state."""

    def __init__(self, rank: int) -> None:
        self.rank = rank
        self.ortho_matrix: Tensor | None = None


class Package(torch.optim.SGD):
    """An official package in small."""

    def __init__(self, groups: Any, lr: float, weight_decay: float = 0.0, **_: Any) -> None:
        super().__init__(groups, lr=lr, weight_decay=weight_decay)

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for param in group["params"]:
                state = self.state[param]
                if "rank" in group:
                    made = state.setdefault("projector", Projector(group["rank"]))
                    made.ortho_matrix = param.grad[: group["rank"]].clone()
                state["step"] = state.get("step", 0) + 1
        super().step()


@pytest.fixture
def package(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("galore_torch", "galore_torch.galore_projector"):
        module = types.ModuleType(name)
        module.__spec__ = types.SimpleNamespace(name=name)  # type: ignore[assignment]
        module.GaLoreAdamW, module.GaLoreProjector = Package, Projector  # type: ignore[attr-defined]
        monkeypatch.setitem(sys.modules, name, module)


def test_objects_in_a_packages_state_are_saved_plainly(package: None, tmp_path: Path) -> None:
    model, optimizer = trained("official:galore_adamw", rank=4)
    assert isinstance(optimizer, JoinedOptimizer)
    bases = 4 * (16 + 16 + 24) * 4  # r x n of each projected matrix, fp32
    assert state_bytes(optimizer) == bases  # type: ignore[arg-type]
    torch.save(optimizer.state_dict(), tmp_path / "o.pt")
    saved = torch.load(tmp_path / "o.pt", weights_only=True)
    again = build_named("official:galore_adamw", model, 1e-2, {"rank": 4}, 10)
    again.load_state_dict(saved)
    before, after = (list(o.parts[0].state.values()) for o in (optimizer, again))
    assert [entry["step"] for entry in after] == [entry["step"] for entry in before]
    projectors = [entry["projector"] for entry in after if "projector" in entry]
    assert len(projectors) == 3
    assert all(isinstance(item, Projector) for item in projectors)
    for one, other in zip(before, after, strict=True):
        if "projector" in one:
            assert torch.equal(one["projector"].ortho_matrix, other["projector"].ortho_matrix)
    with pytest.raises(ValueError, match="parts of"):
        again.load_state_dict({**saved, "groups_of_parts": [1]})


@pytest.mark.parametrize(("given", "decay"), [({}, 0.0), ({"weight_decay": 0.1}, 0.1)])
def test_a_rule_beside_a_package_decays_as_the_package_does(
    given: dict[str, float], decay: float, package: None
) -> None:
    name, options = "official:galore_adamw", {"rank": 4, "plain_rule": "adamw", **given}
    optimizer = build_named(name, tiny_model(), 1e-2, options, 10)
    # Matrices of both; norms decay nowhere.
    assert [part.param_groups[0]["weight_decay"] for part in optimizer.parts] == [decay] * 2


def test_packages_are_named_and_their_options_checked(package: None) -> None:
    assert canonical_name("official:GaLoreAdamW") == "official:galore_adamw"
    assert canonical_name("official:apollo-mini") == "official:apollo_mini_adamw"
    with pytest.raises(ValueError, match="did you mean 'scale'"):
        build_official("official:galore_adamw", tiny_model(), 1e-2, {"scal": 1.0})


def test_a_package_that_is_missing_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert missing("adamw") is None
    with pytest.raises(ValueError, match="apollo_torch is not installed: pip install"):
        build_official("official:apollo_adamw", tiny_model(), 1e-2, {})


@pytest.mark.slow
@pytest.mark.parametrize("method", PACKAGES)
def test_a_run_of_an_official_package_resumes_to_the_bit(
    method: str, run: Run, tiny: Callable[..., list[str]], tmp_path: Path
) -> None:
    if not PACKAGES[method].installed:
        pytest.skip(f"{PACKAGES[method].distribution} is not installed")
    optimizer, straight, halved = f"official:{method}", tmp_path / "straight", tmp_path / "halved"
    assert run(tiny(straight, 8, optimizer=optimizer))[0] == 0
    assert run(tiny(halved, 8, optimizer=optimizer))[0] == 0
    for step in (6, 8):
        shutil.rmtree(halved / "checkpoints" / f"step-{step:08d}", ignore_errors=True)
    (halved / "summary.json").unlink()
    status, _, said = run([*tiny(halved, 8, optimizer=optimizer), "--resume=auto"])
    assert status == 0, said
    assert summary(halved)["weights_sha256"] == summary(straight)["weights_sha256"]
