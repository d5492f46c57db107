"""GPUs for which a compiled library has code, and advice for others."""

from __future__ import annotations

import re
from collections.abc import Sequence

#: Errors of CUDA's runtime that say kernels of this library can't be started on a device, whichever
#: they are. Each comes before a kernel has written anything.
_DRIVER = {34, 35, 36, 222, 803, 804}  # it is too old for the runtime that was linked in
_CODE = {98, 200, 209, 218, 221, 223}  # there is none for the device
_NO_DEVICE = {100}
UNUSABLE = _DRIVER | _CODE | _NO_DEVICE


def covers(architectures: Sequence[str], capability: int) -> bool:
    """Whether a library compiled for some targets has code for a device.

    Args:
        architectures: targets as in `build.architectures`, such as "80", "90a" and "100f"; there is
            PTX of the first.
        capability: ten times the major and the minor number of the device's compute capability.

    Returns:
        Whether there is machine code for this major number and a minor one up to the device's, or
        PTX of a capability up to the device's. A target with "a" runs on its own capability alone,
        one with "f" on those of its major number, as machine code and as PTX.
    """
    for index, architecture in enumerate(architectures):
        number, kind = _parts(architecture)
        if kind == "a":
            fits = number == capability
        else:
            fits = number // 10 == capability // 10 and number <= capability
        if fits or (index == 0 and not kind and number <= capability):
            return True
    return False


def targets(architectures: Sequence[str]) -> str:
    """The targets in words."""
    named = [f"sm_{architecture}" for architecture in architectures]
    return ", ".join([*named, *(f"PTX of compute_{first}" for first in architectures[:1])])


def no_code(architectures: Sequence[str], capability: int) -> str:
    """The message that there is no code for a device, with advice."""
    return (
        f"it has code for {targets(architectures) or 'no target'}, and the device has compute "
        f"capability {capability / 10:.1f}. {_install(str(capability))}"
    )


def advice(code: int) -> str:
    """Advice after one of the errors in `UNUSABLE`; empty for others."""
    if code in _DRIVER:
        return (
            "Update NVIDIA's driver, or install the package again with an older CUDA toolkit "
            "(CUDACXX names its nvcc)."
        )
    if code in _CODE:
        return _install("the device's compute capability, such as 75")
    if code in _NO_DEVICE:
        return "Is a device visible (CUDA_VISIBLE_DEVICES), and its driver loaded?"
    return ""


def _install(target: str) -> str:
    return f"Install the package again with LOWRANK_CUDA_ARCHS set to {target}."


def _parts(architecture: str) -> tuple[int, str]:
    found = re.fullmatch(r"(\d+)([af]?)", architecture)
    if found is None:
        raise ValueError(f"architecture is {architecture!r}; accepted are such as '80' and '90a'")
    return int(found[1]), found[2]
