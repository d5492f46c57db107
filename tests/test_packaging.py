"""What is shipped and how it fits together: imports, pins, wheel, scripts, types."""

from __future__ import annotations

import ast
import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import time
import tomllib
import venv
import zipfile
from pathlib import Path

import pytest
from compiling import made_before
from support import ROOT

from lowrank.cuda import build
from lowrank.cuda.library import FOLDER

FOLDERS = ("optimizers", "cuda", "trainers")
SCRIPTS = sorted(path for path in (ROOT / "scripts").iterdir() if path.is_file())
HEAVY = ["transformers", "datasets", "bitsandbytes", "deepspeed", "wandb", "matplotlib", "yaml"]

# A build backend in 20 lines, so that `scripts/setup` can be tried with nothing to download.
BACKEND = """
import zipfile

NAME = "mini-1.0.dist-info"
METADATA = "Metadata-Version: 2.1\\nName: mini\\nVersion: 1.0\\nProvides-Extra: all\\n"
WHEEL = "Wheel-Version: 1.0\\nGenerator: mini\\nRoot-Is-Purelib: true\\nTag: py3-none-any\\n"


def build_editable(wheel_directory, config_settings=None, metadata_directory=None):
    name = "mini-1.0-py3-none-any.whl"
    with zipfile.ZipFile(f"{wheel_directory}/{name}", "w") as wheel:
        wheel.writestr(f"{NAME}/METADATA", METADATA)
        wheel.writestr(f"{NAME}/WHEEL", WHEEL)
        wheel.writestr(f"{NAME}/RECORD", "")
        wheel.writestr("mini.py", "")
    return name
"""


def run(*command: str | Path, **options: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(  # type: ignore[call-overload, no-any-return]
        [str(part) for part in command], capture_output=True, text=True, timeout=300, **options
    )


def python_files(folder: str) -> list[Path]:
    return sorted((ROOT / folder).rglob("*.py"))


def imported_modules(path: Path) -> set[str]:
    """Absolute names of everything a file imports, relative imports resolved."""
    module = ["lowrank", *path.relative_to(ROOT).with_suffix("").parts]
    found = set()
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = ".".join(module[: -node.level]) if node.level else ""
            source = ".".join(part for part in (base, node.module or "") if part)
            found |= {source} | {f"{source}.{alias.name}" for alias in node.names}
    return found


@pytest.mark.parametrize(
    ("folder", "forbidden"),
    [("cuda", ("optimizers", "trainers", "scripts")), ("optimizers", ("trainers", "scripts"))],
)
def test_dependencies_point_one_way(folder: str, forbidden: tuple[str, ...]) -> None:
    wrong = [
        f"{path.relative_to(ROOT)} imports {name}"
        for path in python_files(folder)
        for name in imported_modules(path)
        if name.startswith(tuple(f"lowrank.{other}" for other in forbidden))
    ]
    assert not wrong


@pytest.mark.parametrize("folder", FOLDERS)
def test_imports_across_packages_are_absolute_and_inside_relative(folder: str) -> None:
    wrong = []
    for path in python_files(folder):
        depth = len(path.relative_to(ROOT).parts) - 1
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            if not isinstance(node, ast.ImportFrom):
                continue
            leaves_package = node.level > depth
            names_own_package = (node.module or "").startswith(f"lowrank.{folder}")
            if leaves_package or (node.level == 0 and names_own_package):
                wrong.append(f"{path.relative_to(ROOT)}:{node.lineno}")
    assert not wrong


@pytest.mark.parametrize("module", ["lowrank.optimizers", "lowrank.cuda"])
def test_optimizers_import_nothing_heavy(module: str) -> None:
    program = f"import sys, {module}; print(*sorted(set({HEAVY!r}) & set(sys.modules)))"
    result = run(sys.executable, "-P", "-c", program, check=True)
    assert result.stdout.strip() == ""


def test_top_level_folders_shadow_nothing_for_the_scripts() -> None:
    program = (
        "import importlib.util as u; print([n for n in ('optimizers', 'cuda', 'trainers') "
        "if u.find_spec(n)]); import lowrank.optimizers"
    )
    environment = os.environ | {"PYTHONSAFEPATH": "1"}
    result = run(sys.executable, "-c", program, cwd=ROOT, env=environment, check=True)
    assert result.stdout.strip() == "[]"


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_scripts_are_executable_safe_and_valid(script: Path) -> None:
    assert os.access(script, os.X_OK)
    text = script.read_text("utf-8")
    assert text.startswith("#!/usr/bin/env bash\n")
    assert "set -euo pipefail" in text
    assert "export PYTHONSAFEPATH=1" in text
    assert run("bash", "-n", script).returncode == 0


def test_constraints_pin_every_dependency_once() -> None:
    pins = {}
    for line in (ROOT / "constraints.txt").read_text("utf-8").splitlines():
        if line and not line.startswith("#"):
            name, version = line.split("==")
            assert normalised(name) not in pins
            pins[normalised(name)] = version
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
    requirements = project["dependencies"] + [
        item for extra in project["optional-dependencies"].values() for item in extra
    ]
    named = {normalised(re.split(r"[\[<>=!~; ]", item)[0]) for item in requirements}
    assert named - {"lowrank-pretrain"} <= set(pins)
    assert pins["torch"] == "2.13.0"
    assert not [name for name, version in pins.items() if "+" in version]


def normalised(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A wheel built from a copy, so that the working tree gets no build folder."""
    copy = tmp_path_factory.mktemp("source") / "lowrank"
    copy_sources(copy)
    target = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-P", "-m", "pip", "wheel", "--quiet", "--no-deps"]
    command += ["--no-build-isolation", "--wheel-dir", str(target), "."]
    result = run(*command, cwd=copy, env=os.environ | compilers())
    assert result.returncode == 0, result.stderr
    (built,) = target.glob("*.whl")
    return built


def compilers() -> dict[str, str]:
    """Compilers that link what was compiled when the package was installed, where it was."""
    chosen = {}
    host, device = FOLDER / build.HOSTS["DEFAULT"][0], FOLDER / build.DEVICE
    if (compiler := build.find_compiler()) and host.exists():
        chosen["CXX"] = made_before(compiler, host)
    if (nvcc := build.find_nvcc()) and device.exists():
        chosen["CUDACXX"] = made_before(nvcc, device)
    return chosen


def copy_sources(target: Path) -> None:
    ignored = shutil.ignore_patterns("__pycache__", "_lib")
    for folder in FOLDERS:
        shutil.copytree(ROOT / folder, target / folder, ignore=ignored)
    for name in ("pyproject.toml", "setup.py", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, target / name)


@pytest.mark.slow
def test_wheel_holds_the_three_packages_and_their_data(wheel: Path) -> None:
    names = set(zipfile.ZipFile(wheel).namelist())
    expected = {
        f"lowrank/{path.relative_to(ROOT).as_posix()}"
        for folder in FOLDERS
        for path in (ROOT / folder).rglob("*")
        if path.suffix in {".py", ".typed", ".yaml"}
    }
    assert expected <= names
    assert {f"lowrank/{folder}/py.typed" for folder in FOLDERS} <= names
    assert any(name.endswith("presets/llama_60m.yaml") for name in names)
    outside = {name.split("/")[0] for name in names} - {"lowrank"}
    assert [name for name in outside if not name.endswith(".dist-info")] == []
    assert "lowrank/__init__.py" not in names
    assert wheel.name.endswith(f"-py3-none-{build_platform()}.whl")
    libraries = {"lowrank/cuda/_lib/build.json"}
    if build.find_compiler():
        libraries.add("lowrank/cuda/_lib/liblowrank_host.so")
    if build.find_nvcc():
        libraries.add("lowrank/cuda/_lib/liblowrank_cuda.so")
    assert libraries <= names


@pytest.mark.slow
def test_isolated_build_without_nvcc(tmp_path: Path) -> None:
    """`pip install .` as a user without CUDA calls it: torch is not there when it is built."""
    copy = tmp_path / "source"
    copy_sources(copy)
    command = [sys.executable, "-P", "-m", "pip", "wheel", "--quiet", "--no-deps"]
    environment = os.environ | compilers()
    environment |= {"CUDACXX": str(tmp_path / "no" / "nvcc"), "LOWRANK_CUDA": "auto"}
    result = run(*command, "--wheel-dir", tmp_path, ".", cwd=copy, env=environment)
    assert result.returncode == 0, result.stderr
    (made,) = tmp_path.glob("*.whl")
    files = zipfile.ZipFile(made)
    assert "lowrank/cuda/_lib/liblowrank_cuda.so" not in files.namelist()
    report = json.loads(files.read("lowrank/cuda/_lib/build.json"))
    assert "nvcc: No such file" in report["cuda"]["reason"]

    demanded = run(
        *(*command, "--no-build-isolation", "--wheel-dir", tmp_path, "."),
        cwd=copy,
        env=environment | {"LOWRANK_CUDA": "1"},
    )
    assert demanded.returncode != 0
    assert "nvcc: No such file" in demanded.stderr + demanded.stdout


def build_platform() -> str:
    return sysconfig.get_platform().replace("-", "_").replace(".", "_")


@pytest.mark.slow
def test_wheel_installs_and_runs(wheel: Path, tmp_path: Path) -> None:
    environment = tmp_path / "fresh environment"
    venv.create(environment, with_pip=False, symlinks=True)
    python = environment / "bin" / "python"
    # The libraries come from this environment; its editable install of lowrank does not come
    # along, for .pth files are read in an environment's own site-packages only.
    own = Path(run(python, "-c", "import site; print(site.getsitepackages()[0])").stdout.strip())
    libraries = [path for path in sys.path if path.endswith("site-packages")]
    (own / "libraries.pth").write_text("\n".join(libraries) + "\n", "utf-8")
    pip = [sys.executable, "-P", "-m", "pip", "--python", python, "install", "--quiet"]
    installed = run(*pip, "--no-deps", "--no-index", wheel)
    assert installed.returncode == 0, installed.stderr

    safe = os.environ | {"PYTHONSAFEPATH": "1"}
    program = "import lowrank.cuda, lowrank.optimizers as o; print(o.__file__, o.available())"
    result = run(python, "-c", program, cwd=ROOT, env=safe)
    assert result.returncode == 0, result.stderr
    file, _, names = result.stdout.partition(" [")
    assert Path(file).is_relative_to(own)
    assert "galore_adamw" in names
    command = run(environment / "bin" / "lowrank", "methods", cwd=tmp_path)
    assert command.returncode == 0, command.stderr
    assert "galore_adamw" in command.stdout
    system = run(environment / "bin" / "lowrank", "methods", "--system", cwd=tmp_path)
    assert system.returncode == 0, system.stderr
    assert ("liblowrank_host" in system.stdout) == bool(build.find_compiler())
    assert "kernels" in system.stdout


@pytest.mark.exhaustive
def test_type_checker_sees_across_packages(tmp_path: Path) -> None:
    copy = tmp_path / "copy with spaces"
    (copy / "scripts").mkdir(parents=True)
    shutil.copy(ROOT / "scripts" / "typecheck", copy / "scripts")
    shutil.copy(ROOT / "pyproject.toml", copy)
    (copy / ".venv").symlink_to(Path(sys.prefix))
    shutil.copytree(ROOT / "cuda", copy / "cuda", ignore=shutil.ignore_patterns("__pycache__"))
    for package in ("optimizers", "trainers"):
        (copy / package).mkdir()
        (copy / package / "__init__.py").write_text('"""Empty."""\n', "utf-8")
    planted = copy / "trainers" / "planted.py"
    planted.write_text(
        '"""Uses another package."""\n\nfrom lowrank.cuda import blockwise_bytes\n\n'
        "count: int = blockwise_bytes(3)\n",
        "utf-8",
    )
    right = run(copy / "scripts" / "typecheck")
    assert right.returncode == 0, right.stdout + right.stderr

    planted.write_text(planted.read_text("utf-8").replace("count: int", "count: str"), "utf-8")
    wrong = run(copy / "scripts" / "typecheck")
    assert wrong.returncode == 1
    assert "trainers/planted.py:5: error: Incompatible types in assignment" in wrong.stdout


@pytest.fixture
def mini(tmp_path: Path) -> Path:
    """A project with `scripts/setup` and nothing to install, in a folder with a space."""
    root = tmp_path / "mini project"
    (root / "scripts").mkdir(parents=True)
    shutil.copy(ROOT / "scripts" / "setup", root / "scripts")
    (root / "backend.py").write_text(BACKEND, "utf-8")
    (root / "setup.py").touch()
    (root / "constraints.txt").touch()
    (root / "pyproject.toml").write_text(
        '[build-system]\nrequires = []\nbuild-backend = "backend"\nbackend-path = ["."]\n', "utf-8"
    )
    return root


def set_up(root: Path, **changes: str) -> subprocess.CompletedProcess[str]:
    environment = {key: value for key, value in os.environ.items() if key != "PYTHON"}
    environment |= {"PYTHON": sys.executable} | changes
    return run(root / "scripts" / "setup", cwd=root.anchor, env=environment)


@pytest.mark.slow
def test_setup_makes_renews_and_repairs_the_environment(mini: Path) -> None:
    first = set_up(mini)
    assert first.returncode == 0, first.stderr
    assert "making .venv" in first.stderr
    stamp = mini / ".venv" / ".lowrank-setup"
    assert stamp.is_file()
    assert run(mini / ".venv/bin/python", "-c", "import mini", cwd="/").returncode == 0

    begin = time.monotonic()
    second = set_up(mini)
    assert (second.returncode, second.stderr) == (0, "")
    assert time.monotonic() - begin < 2

    kept = mini / ".venv" / "kept"
    kept.touch()
    (mini / "constraints.txt").write_text("# changed\n", "utf-8")
    changed = set_up(mini)
    assert "installing" in changed.stderr
    assert kept.exists()

    stamp.unlink()  # as after a set-up that was killed while it installed
    repaired = set_up(mini)
    assert "making .venv" in repaired.stderr
    assert not kept.exists()
    assert stamp.is_file()


@pytest.mark.slow
def test_setup_keeps_an_environment_made_by_hand(mini: Path) -> None:
    venv.create(mini / ".venv", with_pip=True, symlinks=True)
    result = set_up(mini)
    assert result.returncode == 0, result.stderr
    assert "making" not in result.stderr
    assert (mini / ".venv" / ".lowrank-setup").is_file()


def test_setup_refuses_an_old_python(mini: Path) -> None:
    old = mini / "old python"
    old.write_text('#!/bin/sh\n[ "$1" = -V ] && echo "Python 3.10.1"\nexit 1\n', "utf-8")
    old.chmod(0o755)
    result = set_up(mini, PYTHON=str(old))
    assert result.returncode == 1
    assert "3.10.1" in result.stderr
    assert "3.11 or newer" in result.stderr
    assert not (mini / ".venv").exists()
    assert "no program" in set_up(mini, PYTHON=str(mini / "missing")).stderr


@pytest.mark.slow
def test_setup_says_what_pip_said_and_leaves_no_stamp(mini: Path) -> None:
    (mini / "constraints.txt").write_text("this is no requirement\n", "utf-8")
    result = set_up(mini)
    assert result.returncode == 1
    assert "pip could not install" in result.stderr
    assert "constraints.txt" in result.stderr
    assert not (mini / ".venv" / ".lowrank-setup").exists()
