"""Which machine and which software a figure belongs to."""

from __future__ import annotations

import os
import platform
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from pocketslm.runtime.backends import usable_cores

_SOFTWARE = ("numpy", "onnxruntime", "onnxruntime-genai", "llama-cpp-python", "executorch", "torch")


@dataclass(frozen=True)
class Machine:
    """cpu: its name; cores: logical ones that this process may use; arch: as uname says it."""

    cpu: str
    cores: int
    arch: str
    ram_bytes: int
    os: str


def this_machine() -> Machine:
    """The machine that this process runs on."""
    return Machine(
        cpu=_cpu_name(),
        cores=usable_cores(),
        arch=platform.machine(),
        ram_bytes=os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"),
        os=platform.platform(terse=True),
    )


def software() -> dict[str, str]:
    """Python and those of the measured libraries that are installed, with their versions."""
    found = {"python": platform.python_version()}
    for name in _SOFTWARE:
        if (installed := installed_version(name)) is not None:
            found[name] = installed
    return found


def installed_version(distribution: str) -> str | None:
    """The version of an installed distribution, without importing it."""
    try:
        return version(distribution)
    except PackageNotFoundError:
        return None


def _cpu_name() -> str:
    """The marketing name on x86, the board's name where an ARM kernel gives no other."""
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            name, _, value = line.partition(":")
            if name.strip() in ("model name", "Hardware") and value.strip():
                return value.strip()
        board = Path("/proc/device-tree/model").read_text(encoding="utf-8")
    except OSError:
        board = ""
    return board.strip("\0\n ") or platform.processor() or platform.machine()
