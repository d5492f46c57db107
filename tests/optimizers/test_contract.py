"""What every optimizer owes a training loop, for each row of the table."""

from __future__ import annotations

import copy
import io
import math
import pickle
import warnings

import pytest
import torch
from support import TinyBlock, set_gradients, tiny_model, weights
from table import PROJECTING, TABLE, Row, identifier, train
from torch import Tensor, nn

from lowrank.optimizers import available, expected_state_bytes, state_bytes

every = pytest.mark.parametrize("row", TABLE, ids=identifier)
projecting = pytest.mark.parametrize("row", PROJECTING, ids=identifier)
DTYPES = (torch.float32, torch.bfloat16)


def assert_same(first: nn.Module, second: nn.Module) -> None:
    for a, b in zip(first.parameters(), second.parameters(), strict=True):
        assert torch.equal(a, b)


def assert_close(first: nn.Module, second: nn.Module, rtol: float, atol: float) -> None:
    for a, b in zip(first.parameters(), second.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=rtol, atol=atol)


def test_table_is_complete() -> None:
    assert sorted(row.name for row in TABLE) == available()


@every
def test_every_parameter_moves_and_stays_finite(row: Row) -> None:
    model = tiny_model()
    before = weights(model)
    train(model, row.build(model), range(5))
    for old, param in zip(before, model.parameters(), strict=True):
        assert param.isfinite().all()
        assert not torch.equal(old, param)


@every
def test_learns_a_task(row: Row) -> None:
    model = tiny_model()
    optimizer = row.build(model, scale=1.0)
    tokens = torch.randint(0, 32, (8, 12))
    losses = []
    for _ in range(60):
        loss = nn.functional.cross_entropy(model(tokens).flatten(0, 1), tokens.flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.7 * losses[0]


@every
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_state_is_made_at_construction_and_plain(row: Row, dtype: torch.dtype) -> None:
    model = tiny_model(dtype=dtype)
    optimizer = row.build(model)
    assert set(optimizer.state) == set(model.parameters())
    keys = {param: sorted(state) for param, state in optimizer.state.items()}
    before = weights(model)
    for state in optimizer.state.values():
        assert all(isinstance(value, Tensor | int) for value in state.values())
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
    train(model, optimizer, range(4))
    assert keys == {param: sorted(state) for param, state in optimizer.state.items()}


@every
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_resume_through_a_file_is_exact(row: Row, dtype: torch.dtype) -> None:
    straight = tiny_model(dtype=dtype)
    optimizer = row.build(straight)
    train(straight, optimizer, range(9))

    model = tiny_model(dtype=dtype)
    optimizer = row.build(model)
    for start, stop in ((0, 2), (2, 5), (5, 9)):
        train(model, optimizer, range(start, stop))
        file = io.BytesIO()
        torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, file)
        file.seek(0)
        saved = torch.load(file, weights_only=True)
        model = tiny_model(seed=1, dtype=dtype)
        model.load_state_dict(saved["model"])
        optimizer = row.build(model)
        optimizer.load_state_dict(state_dict=saved["optimizer"])
    assert_same(straight, model)


@every
def test_load_keeps_each_tensors_dtype(row: Row) -> None:
    model = tiny_model(dtype=torch.bfloat16)
    optimizer = row.build(model)
    train(model, optimizer, range(2))
    saved = copy.deepcopy(optimizer.state_dict())
    other = row.build(tiny_model(dtype=torch.bfloat16))
    other.load_state_dict(saved)
    loaded = other.state_dict()["state"]
    for key, state in saved["state"].items():
        for name, value in state.items():
            if isinstance(value, Tensor):
                assert loaded[key][name].dtype == value.dtype
                assert torch.equal(loaded[key][name], value)
                assert loaded[key][name].data_ptr() != value.data_ptr()
            else:
                assert loaded[key][name] == value


@every
def test_load_of_a_state_that_does_not_fit_changes_nothing(row: Row) -> None:
    optimizer = row.build(tiny_model())
    before = copy.deepcopy(optimizer.state_dict())
    other = row.build(TinyBlock(hidden=8))
    with pytest.raises(ValueError, match="accepted"):
        optimizer.load_state_dict(other.state_dict())
    broken = copy.deepcopy(before)
    del broken["state"][0]["step"]
    with pytest.raises(ValueError, match="step"):
        optimizer.load_state_dict(broken)
    for key, state in before["state"].items():
        for name, value in state.items():
            now = optimizer.state_dict()["state"][key][name]
            assert torch.equal(now, value) if isinstance(value, Tensor) else now == value


@every
@pytest.mark.parametrize("how", ["deepcopy", "pickle"])
def test_copies_continue_alike(row: Row, how: str) -> None:
    model = tiny_model()
    optimizer = row.build(model)
    train(model, optimizer, range(2))
    pair = (model, optimizer)
    twin_model, twin = (
        copy.deepcopy(pair) if how == "deepcopy" else pickle.loads(pickle.dumps(pair))
    )
    train(model, optimizer, range(2, 6))
    train(twin_model, twin, range(2, 6))
    assert_same(model, twin_model)


@every
def test_older_pickle_gets_new_defaults(row: Row) -> None:
    optimizer = row.build(tiny_model())
    state = optimizer.__getstate__()
    for group in state["param_groups"]:
        del group["skip_nonfinite"]
    optimizer.__setstate__(state)
    assert all(group["skip_nonfinite"] is True for group in optimizer.param_groups)


@every
def test_closure_gets_gradients(row: Row) -> None:
    model = tiny_model()
    optimizer = row.build(model)
    tokens = torch.randint(0, 32, (2, 4))

    def closure() -> float:
        optimizer.zero_grad()
        loss = model(tokens).square().mean()
        loss.backward()
        return loss

    first = optimizer.step(closure)
    assert torch.is_tensor(first)
    assert first.requires_grad
    assert optimizer.step(closure) < first


@every
def test_lr_is_read_each_step_as_float_or_tensor(row: Row) -> None:
    by_float, by_tensor = tiny_model(), tiny_model()
    first = row.build(by_float, lr=1e-2)
    second = row.build(by_tensor, lr=torch.tensor(1e-2))
    schedulers = [torch.optim.lr_scheduler.StepLR(o, 1, 0.5) for o in (first, second)]
    for step in range(4):
        for model, optimizer in ((by_float, first), (by_tensor, second)):
            train(model, optimizer, range(step, step + 1))
        for scheduler in schedulers:
            scheduler.step()
    assert_close(by_float, by_tensor, rtol=1e-5, atol=1e-7)
    still = row.build(by_float, lr=0.0)
    frozen = weights(by_float)
    train(by_float, still, range(4, 5))
    assert all(torch.equal(a, b) for a, b in zip(frozen, by_float.parameters(), strict=True))
    for group in still.param_groups:
        group["lr"] = 0.1
    train(by_float, still, range(5, 6))
    assert not any(torch.equal(a, b) for a, b in zip(frozen, by_float.parameters(), strict=True))


@every
def test_maximize_ascends(row: Row) -> None:
    down, up = tiny_model(), tiny_model()
    descending, ascending = row.build(down), row.build(up, maximize=True)
    for step in range(4):
        set_gradients(down, step)
        for a, b in zip(down.parameters(), up.parameters(), strict=True):
            b.grad = -a.grad
        descending.step()
        ascending.step()
    assert_same(down, up)


@every
@pytest.mark.parametrize(
    "options",
    [{"foreach": True}, {"foreach": False}, {"fused": False}, {"skip_nonfinite": False}],
    ids=str,
)
def test_implementations_agree(row: Row, options: dict[str, bool]) -> None:
    default, other = tiny_model(), tiny_model()
    train(default, row.build(default), range(7))
    train(other, row.build(other, **options), range(7))
    # A moment that sits between two 8-bit codes may go either way in the last bit.
    assert_close(default, other, rtol=1e-4, atol=2e-3 if row.bits8 else 2e-6)


@every
def test_capturable(row: Row) -> None:
    if not row.capturable:
        with pytest.raises(ValueError, match="capturable"):
            row.build(tiny_model(), capturable=True)
        return
    plain, captured = tiny_model(), tiny_model()
    train(plain, row.build(plain), range(7))
    train(captured, row.build(captured, capturable=True, lr=torch.tensor(1e-2)), range(7))
    assert_close(plain, captured, rtol=1e-4, atol=2e-3 if row.bits8 else 2e-6)


@every
def test_weight_decay_shrinks_weights_by_lr_times_decay(row: Row) -> None:
    model = tiny_model()
    optimizer = row.build(model, lr=0.1, weight_decay=0.5)
    for param in model.parameters():
        param.grad = torch.zeros_like(param)
    before = weights(model)
    optimizer.step()
    for old, param in zip(before, model.parameters(), strict=True):
        # vectors (norms and biases) are not decayed
        expected = old * (1 - 0.1 * 0.5) if param.dim() > 1 else old
        torch.testing.assert_close(param.detach(), expected)


@every
def test_missing_and_empty_gradients_are_left_alone(row: Row) -> None:
    model = tiny_model()
    model.mlp["empty"] = nn.Linear(4, 4, bias=False)
    model.mlp["empty"].weight = nn.Parameter(torch.zeros(4, 0))
    optimizer = row.build(model)
    set_gradients(model, 0)
    still = model.self_attn["q_proj"].weight
    still.grad = None
    before = still.detach().clone()
    optimizer.step()
    assert torch.equal(before, still)
    assert int(optimizer.state[still]["step"]) == 0
    optimizer.zero_grad()
    optimizer.step()


@every
def test_non_contiguous_weights_and_gradients(row: Row) -> None:
    plain, strided = tiny_model(), tiny_model()
    for param in strided.parameters():
        if param.dim() == 2:
            param.data = param.data.t().contiguous().t()
    first, second = row.build(plain), row.build(strided)
    for step in range(4):
        for model, optimizer in ((plain, first), (strided, second)):
            set_gradients(model, step)
            for param in model.parameters():
                if model is strided and param.dim() == 2:
                    param.grad = param.grad.t().contiguous().t()
            optimizer.step()
    assert_close(plain, strided, rtol=1e-4, atol=2e-3 if row.bits8 else 1e-5)


@every
def test_sparse_gradients_raise(row: Row) -> None:
    model = tiny_model()
    optimizer = row.build(model)
    model.embed_tokens.weight.grad = torch.zeros(32, 16).to_sparse()
    with pytest.raises(ValueError, match=r"embed_tokens\.weight has a sparse gradient"):
        optimizer.step()


@every
def test_complex_parameters_raise(row: Row) -> None:
    with pytest.raises(ValueError, match="complex64"):
        row.optimizer([nn.Parameter(torch.zeros(2, 2, dtype=torch.complex64))], lr=0.1)


@every
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_non_finite_gradients_leave_the_parameter_as_it_is(row: Row, bad: float) -> None:
    model = tiny_model()
    optimizer = row.build(model)
    train(model, optimizer, range(3))  # the next step refreshes
    hit = (model.self_attn["q_proj"].weight, model.norm.weight)
    set_gradients(model, 3)
    for param in hit:
        param.grad.view(-1)[5] = bad
    before = [copy.deepcopy(optimizer.state[p]) for p in hit], [p.detach().clone() for p in hit]
    with pytest.warns(UserWarning, match="non-finite gradient of"):
        optimizer.step()
    for param, state, old in zip(hit, *before, strict=True):
        assert torch.equal(param, old)
        for key, value in state.items():
            now = optimizer.state[param][key]
            assert torch.equal(now, value) if isinstance(value, Tensor) else now == value
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        train(model, optimizer, range(4, 7))
    assert all(param.isfinite().all() for param in model.parameters())
    if row.projects:
        assert optimizer.state[hit[0]]["refreshed_at"] >= 3  # the missed refresh was made up


@every
def test_zero_gradients_from_the_start(row: Row) -> None:
    model = tiny_model()
    optimizer = row.build(model, weight_decay=0.0)
    before = weights(model)
    for param in model.parameters():
        param.grad = torch.zeros_like(param)
    for _ in range(2):
        optimizer.step()
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
    train(model, optimizer, range(3))
    for old, param in zip(before, model.parameters(), strict=True):
        assert param.isfinite().all()
        assert not torch.equal(old, param)


@every
@pytest.mark.parametrize("scale", [1e-18, 1e18], ids=str)
def test_extreme_gradient_scales(row: Row, scale: float) -> None:
    model = tiny_model()
    optimizer = row.build(model)
    for step in range(4):
        set_gradients(model, step, scale)
        optimizer.step()
    assert all(param.isfinite().all() for param in model.parameters())


@every
def test_grad_scaler_skips_without_advancing(row: Row) -> None:
    model = tiny_model()
    optimizer = row.build(model)
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    set_gradients(model, 0)
    scaler.scale(torch.ones(()))
    next(model.parameters()).grad.view(-1)[0] = math.inf
    before = weights(model)
    scaler.step(optimizer)
    scaler.update()
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
    assert all(int(state["step"]) == 0 for state in optimizer.state.values())
    set_gradients(model, 0)
    scaler.step(optimizer)
    assert all(int(state["step"]) == 1 for state in optimizer.state.values())


@every
def test_step_inside_autocast_equals_step_outside(row: Row) -> None:
    outside, inside = tiny_model(), tiny_model()
    first, second = row.build(outside), row.build(inside)
    train(outside, first, range(4))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        train(inside, second, range(4))
    assert_same(outside, inside)


@every
def test_add_param_group_later_and_all_or_nothing(row: Row) -> None:
    model = tiny_model()
    optimizer = row.build(model)
    extra = nn.Parameter(torch.ones(3))
    optimizer.add_param_group({"params": [extra], "param_names": ["extra"]})
    assert extra in optimizer.state
    groups = len(optimizer.param_groups)
    with pytest.raises(ValueError, match="weight_decay"):
        optimizer.add_param_group(
            {"params": [nn.Parameter(torch.ones(3))], "param_names": ["x"], "weight_decay": -1.0}
        )
    assert len(optimizer.param_groups) == groups
    extra.grad = torch.ones(3)
    optimizer.step()
    assert not torch.equal(extra, torch.ones(3))


@every
def test_parameter_names_are_recorded(row: Row) -> None:
    model = tiny_model()
    optimizer = row.build(model)
    names = {name for group in optimizer.param_groups for name in group["param_names"]}
    assert names == {name for name, _ in model.named_parameters()}
    optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    assert "param_names" in optimizer.state_dict()["param_groups"][0]


@every
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_state_bytes_equal_the_formula(row: Row, dtype: torch.dtype) -> None:
    model = tiny_model(dtype=dtype)
    options = {"rank": 4, **row.options}
    optimizer = row.build(model)
    expected = expected_state_bytes(row.name, model, **options)
    assert state_bytes(optimizer) == expected
    train(model, optimizer, range(4))
    assert state_bytes(optimizer) == expected
    assert expected_state_bytes(row.name, model.to("meta"), **options) == expected


@every
def test_every_state_tensor_owns_its_storage(row: Row) -> None:
    model = tiny_model()
    optimizer = row.build(model)
    train(model, optimizer, range(4))
    storages = [
        value.untyped_storage()
        for state in optimizer.state.values()
        for value in state.values()
        if isinstance(value, Tensor)
    ]
    assert len({storage.data_ptr() for storage in storages}) == len(storages)
    for state in optimizer.state.values():
        for value in state.values():
            if isinstance(value, Tensor):
                assert value.untyped_storage().nbytes() == value.numel() * value.element_size()


BAD_ARGUMENTS = (
    ({"lr": -1.0}, "lr=-1.0"),
    ({"lr": math.nan}, "lr=nan"),
    ({"lr": "fast"}, "lr='fast'"),
    ({"weight_decay": -0.1}, "weight_decay=-0.1"),
    ({"foreach": "yes"}, "foreach='yes'"),
    ({"differentiable": True}, "differentiable=True"),
    ({"foreach": True, "fused": True}, "foreach=True with fused=True"),
    ({"wight_decay": 0.1}, "weight_decay"),
)


@every
@pytest.mark.parametrize(("options", "message"), BAD_ARGUMENTS, ids=str)
def test_bad_arguments_name_the_value(row: Row, options: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        row.build(tiny_model(), **options)


BAD_PROJECTIONS = (
    ({"rank": 0}, "rank=0"),
    ({"rank": 2.5}, "rank=2.5"),
    ({"update_proj_gap": 0}, "update_proj_gap=0"),
    ({"scale": "big"}, "scale='big'"),
    ({"proj_type": "up"}, "proj_type='up'.*'std'"),
    ({"refresh": "magic"}, "refresh='magic'.*'eigh'"),
    ({"projection_dtype": "int8"}, "projection_dtype='int8'"),
    ({"seed": -1}, "seed=-1"),
)


@projecting
@pytest.mark.parametrize(("options", "message"), BAD_PROJECTIONS, ids=str)
def test_bad_projections_name_the_value(row: Row, options: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        row.build(tiny_model(), **options)


@projecting
def test_misspelt_group_key_raises_and_own_keys_pass(row: Row) -> None:
    weight = nn.Parameter(torch.zeros(4, 4))
    with pytest.raises(ValueError, match="update_proj_gap"):
        row.optimizer([{"params": [weight], "rank": 2, "update_proj_gp": 5}], lr=0.1)
    optimizer = row.optimizer([{"params": [weight], "rank": 2, "label": "hidden"}], lr=0.1)
    assert optimizer.param_groups[0]["label"] == "hidden"


@projecting
@pytest.mark.parametrize("shape", [(8,), (2, 3, 4), (2, 3, 4, 4)], ids=str)
def test_only_matrices_are_projected(row: Row, shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="accepted are matrices"):
        row.optimizer([{"params": [nn.Parameter(torch.zeros(shape))], "rank": 2}], lr=0.1)


@projecting
def test_no_rank_anywhere_warns_once(row: Row) -> None:
    with pytest.warns(UserWarning, match=r"param_groups\(model\)") as caught:
        row.optimizer(tiny_model().parameters(), lr=0.1)
    assert len(caught) == 1


@projecting
@pytest.mark.parametrize("mode", ["svd", "eigh", "randomized", "warm"])
def test_failing_solver_keeps_the_former_basis(
    row: Row, mode: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny_model()
    optimizer = row.build(model, refresh=mode)
    train(model, optimizer, range(3))
    former = {p: s["basis"].clone() for p, s in optimizer.state.items() if "basis" in s}

    def broken(*_: object, **__: object) -> object:
        raise torch.linalg.LinAlgError("did not converge")

    with monkeypatch.context() as patch:
        for solver in ("svd", "eigh", "qr"):
            patch.setattr(torch.linalg, solver, broken)
        with pytest.warns(UserWarning, match="converged"):
            train(model, optimizer, range(3, 4))
    assert all(torch.equal(optimizer.state[p]["basis"], basis) for p, basis in former.items())
    assert all(param.isfinite().all() for param in model.parameters())
    train(model, optimizer, range(4, 5))
    assert all(optimizer.state[p]["refreshed_at"] == 4 for p in former)


@projecting
@pytest.mark.parametrize("mode", ["svd", "eigh", "randomized", "warm"])
@pytest.mark.parametrize("proj_type", ["std", "reverse_std", "left", "right", "full"])
def test_rank_deficient_gradients(row: Row, mode: str, proj_type: str) -> None:
    model = tiny_model()
    if (row.one_sided and proj_type == "full") or (
        row.left_only and proj_type not in ("std", "left")
    ):
        with pytest.raises(ValueError, match=f"proj_type='{proj_type}'"):
            row.build(model, proj_type=proj_type)
        return
    optimizer = row.build(model, refresh=mode, proj_type=proj_type)
    for step in range(5):
        set_gradients(model, step)
        for param in model.parameters():
            if param.dim() == 2:
                param.grad = param.grad[:, :1] @ param.grad[:1]
        optimizer.step()
    assert all(param.isfinite().all() for param in model.parameters())
    for state in optimizer.state.values():
        for key in ("basis", "basis_right"):
            if key in state:
                gram = state[key].mT @ state[key]
                torch.testing.assert_close(gram, torch.eye(len(gram)), rtol=0, atol=1e-5)


@projecting
def test_refresh_hook_measures(row: Row) -> None:
    model = tiny_model()
    optimizer = row.build(model, rank=16)
    events = []
    handle = optimizer.register_refresh_hook(events.append)
    train(model, optimizer, range(4))
    matrices = sum("basis" in state for state in optimizer.state.values())
    assert [event.step for event in events] == [1] * matrices + [4] * matrices
    for event in events:
        assert event.name is not None
        assert event.rank == 16
        assert event.captured_energy == pytest.approx(1.0, abs=1e-5)  # full rank keeps all of it
        assert event.seconds > 0
    assert all(event.overlap is None for event in events[:matrices])
    assert all(event.overlap == pytest.approx(1.0, abs=1e-5) for event in events[matrices:])
    handle.remove()
    train(model, optimizer, range(4, 8))
    assert len(events) == 2 * matrices
    copy.deepcopy(optimizer).register_refresh_hook(events.append)


@projecting
def test_staggered_refreshes_are_spread(row: Row) -> None:
    model = tiny_model()
    optimizer = row.build(model, stagger=True, update_proj_gap=3)
    events = []
    optimizer.register_refresh_hook(events.append)
    train(model, optimizer, range(7))
    assert [event.step for event in events] == [1, 1, 1, 2, 3, 4, 5, 6, 7]


def test_peers_keywords_without_effect_are_accepted() -> None:
    from lowrank.optimizers import GaLoreAdamW, GaLoreAdamW8bit

    weight = nn.Parameter(torch.zeros(4, 4))
    group = {"params": [weight], "rank": 2, "update_proj_gap": 5, "scale": 1.0, "proj_type": "std"}
    GaLoreAdamW([{**group}], no_deprecation_warning=True, correct_bias=True)
    GaLoreAdamW8bit([{**group}], percentile_clipping=100, block_wise=True, is_paged=False)
