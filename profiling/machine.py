"""The machine and the software to which a figure belongs."""

from __future__ import annotations

import os
import platform
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from pocketslm.errors import BackendError
from pocketslm.runtime.backends import usable_cores
from pocketslm.runtime.cores import Cluster

PROBE_BYTES = 64 << 20  # more than the caches of a phone or board hold
_SOFTWARE = ("numpy", "onnxruntime", "onnxruntime-genai", "llama-cpp-python", "executorch", "torch")


@dataclass(frozen=True)
class Machine:
    """The device behind a figure. Fields that it does not tell are None.

    - ``cpu``: the processor's name.
    - ``cores``: logical cores that the measured process may use.
    - ``arch``: the name that uname gives.
    - ``kind``: how the device was reached: local, ssh or adb.
    - ``product``, ``soc``: the names of the device's model and of its chip.
    - ``clusters``: all cores by kind, the fastest first.
    - ``governor``: cpufreq's name for the policy of the frequency.
    """

    cpu: str
    cores: int
    arch: str
    ram_bytes: int
    os: str
    kind: str = "local"
    product: str | None = None
    soc: str | None = None
    clusters: tuple[Cluster, ...] = ()
    governor: str | None = None


@dataclass(frozen=True)
class Limits:
    """The limits of the machine with the row's number of threads, measured on it.

    - ``bandwidth_bytes_s``: streaming reads over a buffer of the model's size.
    - ``int8_macs_s``: multiply-accumulates from registers with the fastest int8 instruction.
    """

    bandwidth_bytes_s: float
    int8_macs_s: float


def this_machine() -> Machine:
    """The machine that this process runs on."""
    return Machine(
        cpu=_cpu_name(),
        cores=usable_cores(),
        arch=platform.machine(),
        ram_bytes=_ram_bytes(),
        os=platform.platform(terse=True),
    )


def _ram_bytes() -> int:
    if not hasattr(os, "sysconf"):
        raise BackendError("this system does not tell its memory; measure on Linux or macOS")
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def limits(threads: int, buffer_bytes: int | None) -> Limits | None:
    """This machine's roofline for a model of that size; None without the native operators."""
    from pocketslm.runtime.backends.native_library import load_library

    try:
        library = load_library()
    except BackendError:
        return None
    return Limits(
        library.pslm_measure_bandwidth(threads, buffer_bytes or PROBE_BYTES),
        library.pslm_measure_int8_peak(None, threads),
    )


def software() -> dict[str, str]:
    """The versions of Python and of the measured libraries that are installed."""
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
    """The marketing name on x86. On Arm, the board's name if the kernel gives no other."""
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            name, _, value = line.partition(":")
            if name.strip() in ("model name", "Hardware") and value.strip():
                return value.strip()
        board = Path("/proc/device-tree/model").read_text(encoding="utf-8")
    except OSError:
        board = ""
    return board.strip("\0\n ") or platform.processor() or platform.machine()
