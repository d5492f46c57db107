"""Maps the code folders to `lowrank.optimizers`, `.cuda` and `.trainers`, and compiles.

The native libraries are compiled by `cuda/build.py` as a step of `build`, so a wheel holds them and
an editable install finds them in `cuda/_lib`. They link against neither Python nor torch: the wheel
is for any Python 3.
"""

import importlib.util
import os
import sys
from pathlib import Path

from setuptools import Command, Distribution, find_packages, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build import build

ROOT = Path(__file__).resolve().parent
FOLDERS = ("optimizers", "cuda", "trainers")
LIBRARIES = Path("cuda") / "_lib"


def native():
    specification = importlib.util.spec_from_file_location("build_native", ROOT / "cuda/build.py")
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    return module


class BuildNative(Command):
    """Compiles into the wheel's tree, or in place for an editable install."""

    description = "compile the native libraries"
    user_options = ()
    editable_mode = False

    def initialize_options(self):
        self.build_lib = None

    def finalize_options(self):
        self.set_undefined_options("build_py", ("build_lib", "build_lib"))

    def folder(self):
        if self.editable_mode:
            return ROOT / LIBRARIES
        return Path(self.build_lib) / "lowrank" / LIBRARIES

    def run(self):
        module = native()
        try:
            report = module.build(self.folder())
        except module.BuildError as error:
            sys.exit(f"error: {error}")
        if not self.editable_mode:
            (self.folder() / module.SAID).unlink(missing_ok=True)
        for name in ("host", "cuda"):
            if not report[name]["built"]:
                sys.stderr.write(f"{name} library not compiled: {report[name]['reason']}\n")

    def get_source_files(self):
        return [os.path.relpath(path, ROOT) for path in native().source_files()]

    def get_outputs(self):
        module = native()
        names = [*module.files(module.read_report(self.folder())), module.REPORT]
        return [str(self.folder() / name) for name in names]

    def get_output_mapping(self):
        return {}


class Wheel(bdist_wheel):
    """Any Python 3, this platform."""

    def get_tag(self):
        return "py3", "none", super().get_tag()[2]


class NativeDistribution(Distribution):
    """Has compiled files, though no extension modules."""

    def has_ext_modules(self):
        return True


build.sub_commands = [*build.sub_commands, ("build_native", None)]

setup(
    distclass=NativeDistribution,
    cmdclass={"build_native": BuildNative, "bdist_wheel": Wheel},
    package_dir={f"lowrank.{folder}": folder for folder in FOLDERS},
    packages=[
        name
        for folder in FOLDERS
        for name in (
            f"lowrank.{folder}",
            *(f"lowrank.{folder}.{inner}" for inner in find_packages(folder)),
        )
    ],
    package_data={
        "lowrank.optimizers": ["py.typed"],
        "lowrank.cuda": ["py.typed"],
        "lowrank.trainers": ["py.typed", "presets/*.yaml"],
    },
)
