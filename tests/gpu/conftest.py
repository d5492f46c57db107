"""gpu-check is a package of the scripts."""

from pathlib import Path
from types import SimpleNamespace

import pytest
from stand_ins import fake_cuda, part
from support import ROOT


@pytest.fixture(autouse=True)
def _scripts_on_path(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "section.json"


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    return fake_cuda(monkeypatch)


@pytest.fixture(autouse=True)
def _without_pretraining(
    request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, _scripts_on_path: None
) -> None:
    """Its trials take several seconds."""
    if "pretraining" not in request.node.name:
        monkeypatch.setattr(part("pretraining"), "TRIALS", ())
