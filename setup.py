"""Maps the code folders to `lowrank.optimizers`, `lowrank.cuda` and `lowrank.trainers`."""

from setuptools import find_packages, setup

FOLDERS = ("optimizers", "cuda", "trainers")

setup(
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
