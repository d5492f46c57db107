"""Optimizers with compiled kernels agree with pure torch, and the switch between them works."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from native_training import METHODS, Layers, trained
from support import matrix

from lowrank.cuda import kernels, library, set_kernels, status, using_kernels
from lowrank.optimizers.engine import devices
from lowrank.optimizers.rules import adam as adam_rule

needs_library = pytest.mark.skipif(
    status("host").library is None, reason="the host's library is not compiled"
)


@pytest.fixture
def everywhere() -> Iterator[None]:
    """The CPU takes the way of GPUs, with the kernels that are meant for them."""
    with devices.as_on_gpu():
        yield


@needs_library
@pytest.mark.usefixtures("everywhere")
@pytest.mark.parametrize(("name", "dtype", "options"), METHODS)
def test_kernels_agree_with_pure_torch(
    name: str, dtype: torch.dtype, options: dict[str, Any]
) -> None:
    native = trained(name, dtype, "native", **options)
    plain = trained(name, dtype, "torch", **options)
    start = [w.detach().float() for w in Layers(dtype).parameters()]
    for ours, theirs, before in zip(native, plain, start, strict=True):
        moved = torch.linalg.vector_norm(theirs - before)
        difference = torch.linalg.vector_norm(ours - theirs)
        # A rounded weight may land on the neighbour where the last bit of its update differs.
        limit = 1e-4 if dtype == torch.float32 else 0.05
        assert difference <= limit * moved, (float(difference), float(moved))


@needs_library
@pytest.mark.usefixtures("everywhere")
@pytest.mark.parametrize(
    ("name", "options", "operation"),
    [
        ("galore_adamw", {}, "adam"),
        ("galore_adamw_8bit", {"min_8bit_size": 256}, "adam_8bit"),
        ("qgalore_adamw_8bit", {}, "write_back_int8"),
        ("apollo_mini_adamw", {"weight_bits": 4}, "write_back_int4"),
        ("qgalore_adamw_8bit", {}, "dequantize_int4"),
        ("fira_adamw", {}, "write_back"),
        ("galore_adamw", {"stochastic_rounding": True}, "write_back"),
    ],
)
def test_steps_call_the_kernels(
    name: str, options: dict[str, Any], operation: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    called: list[str] = []
    original = library.Library.call

    def call(self: library.Library, name: str, device: torch.device, *arguments: object) -> None:
        called.append(name)
        original(self, name, device, *arguments)

    monkeypatch.setattr(library.Library, "call", call)
    trained(name, torch.bfloat16, "native", **options)
    assert operation in called
    called.clear()
    trained(name, torch.bfloat16, "torch", **options)
    assert not called


def test_the_switch_is_checked_and_restored() -> None:
    before = kernels()
    with pytest.raises(ValueError, match=r"kernels are 'fast'; accepted are 'native', 'torch'"):
        set_kernels("fast")
    with using_kernels("torch"):
        assert kernels() == "torch"
    assert kernels() == before


def test_a_missing_library_is_said_once(monkeypatch: pytest.MonkeyPatch) -> None:
    missing = library.Status("host", None, "no C++ compiler was found\nmore")
    monkeypatch.setattr(library, "status", lambda name: missing)
    library._say_missing.cache_clear()
    x = [torch.zeros(3)]
    with using_kernels("native"):
        with pytest.warns(UserWarning, match=r"no C\+\+ compiler was found\)"):
            assert library.library_for(x) is None
        assert library.library_for(x) is None
    library._say_missing.cache_clear()


@needs_library
@pytest.mark.usefixtures("everywhere")
@pytest.mark.parametrize("correct_bias", [True, False])
@pytest.mark.parametrize("eps_corrected", [True, False])
def test_sizes_on_the_device_equal_numbers(correct_bias: bool, eps_corrected: bool) -> None:
    """What a CUDA graph computes from step counts on the device is what the host computes."""
    grads = [matrix(6, 40, stream).float() for stream in range(3)]
    results = []
    for capturable in (False, True):
        rule = adam_rule.Adam(
            lr=0.1,
            capturable=capturable,
            correct_bias=correct_bias,
            eps_corrected=eps_corrected,
        )
        states = [rule.init(g.shape, g) | {"step": torch.tensor(5.0)} for g in grads]
        with using_kernels("native"):
            updates = rule.update_with_norms(grads, states, grads, [0, 1, 0])
        results.append([update.direction for update in updates])
        assert all(update.norms is not None for update in updates)
        assert [float(u.factor) for u in updates] == pytest.approx([float(updates[0].factor)] * 3)
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=0)
