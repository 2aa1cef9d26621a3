"""The fingerprint of a device, to which its figures belong."""

from __future__ import annotations

from pocketslm.errors import DeviceError
from pocketslm.profiling.devices.device import Device
from pocketslm.profiling.machine import Machine
from pocketslm.profiling.sensors import cpufreq
from pocketslm.profiling.sensors.tree import Tree, matching, number, parse, script, whole
from pocketslm.runtime.cores import clusters

FILES = (
    "/proc/cpuinfo",
    "/proc/meminfo",
    "/proc/device-tree/model",
    "/proc/device-tree/compatible",
    "/etc/os-release",
    *cpufreq.FILES,
)
_PROPERTIES = ("manufacturer", "model")
COMMANDS = (
    "uname -m",
    "uname -sr",
    "nproc",
    *(f"getprop ro.product.{name}" for name in _PROPERTIES),
    "getprop ro.soc.model",
    "getprop ro.board.platform",
    "getprop ro.build.version.release",
    "getprop ro.build.id",
)

# Implementer and part of /proc/cpuinfo, for the cores that phones and boards have (Linux's
# arch/arm64/include/asm/cputype.h).
_ARM_CORES = {
    0xD03: "Cortex-A53",
    0xD04: "Cortex-A35",
    0xD05: "Cortex-A55",
    0xD07: "Cortex-A57",
    0xD08: "Cortex-A72",
    0xD09: "Cortex-A73",
    0xD0A: "Cortex-A75",
    0xD0B: "Cortex-A76",
    0xD0C: "Neoverse-N1",
    0xD0D: "Cortex-A77",
    0xD41: "Cortex-A78",
    0xD42: "Cortex-A78AE",
    0xD44: "Cortex-X1",
    0xD46: "Cortex-A510",
    0xD47: "Cortex-A710",
    0xD48: "Cortex-X2",
    0xD4D: "Cortex-A715",
    0xD4E: "Cortex-X3",
    0xD80: "Cortex-A520",
    0xD81: "Cortex-A720",
    0xD82: "Cortex-X4",
    0xD85: "Cortex-X925",
    0xD87: "Cortex-A725",
}


def read_machine(device: Device) -> Machine:
    """Ask the device. Raises DeviceError if it does not run Linux."""
    return machine(parse(device.shell(script(FILES, COMMANDS))), device.kind)


def machine(tree: Tree, kind: str) -> Machine:
    """Make the record's fingerprint from the text of FILES and COMMANDS."""
    arch = tree.get("$ uname -m", "")
    memory = tree.get("/proc/meminfo", "").split()
    total = memory[1] if memory[:1] == ["MemTotal:"] and len(memory) > 1 else ""
    if not arch or whole(total) is None:
        raise DeviceError(f"the {kind} device is no Linux or Android system: no /proc/meminfo")
    cores = number(tree, "$ nproc") or tree.get("/proc/cpuinfo", "").count("processor\t") or 1
    return Machine(
        cpu=_cpu(tree) or arch,
        cores=cores,
        arch=arch,
        ram_bytes=int(total) * 1024,
        os=_os(tree),
        kind=kind,
        product=_product(tree),
        soc=_soc(tree),
        clusters=clusters(tree, cores),
        governor=cpufreq.governor(tree),
    )


def _cpu(tree: Tree) -> str:
    """The kernel's name for the CPU, or the kinds of its Arm cores, the fastest first."""
    counts: dict[str, int] = {}
    cpuinfo = tree.get("/proc/cpuinfo", "")
    for line in cpuinfo.splitlines():
        name, _, value = (part.strip() for part in line.partition(":"))
        if name == "model name" and "rev " not in value:
            return value
        if name == "CPU part" and (part := whole(value, 16)) is not None:
            core = _ARM_CORES.get(part, f"Arm part {part:#x}")
            counts[core] = counts.get(core, 0) + 1
    return " + ".join(f"{count}x {core}" for core, count in reversed(counts.items()))


def _os(tree: Tree) -> str:
    kernel = tree.get("$ uname -sr", "")
    if release := tree.get("$ getprop ro.build.version.release"):
        return f"Android {release} ({tree.get('$ getprop ro.build.id', '')}), {kernel}"
    for line in tree.get("/etc/os-release", "").splitlines():
        if line.startswith("PRETTY_NAME="):
            return f"{line.partition('=')[2].strip(chr(34))}, {kernel}"
    return kernel


def _product(tree: Tree) -> str | None:
    parts = [tree.get(f"$ getprop ro.product.{name}", "") for name in _PROPERTIES]
    return " ".join(filter(None, parts)) or tree.get("/proc/device-tree/model") or None


def _soc(tree: Tree) -> str | None:
    for name in ("ro.soc.model", "ro.board.platform"):
        if value := tree.get(f"$ getprop {name}"):
            return value
    # "vendor,board\0vendor,chip\0": the last one is the chip.
    for path in matching(tree, "/proc/device-tree/compatible"):
        return tree[path].rpartition(",")[2] or None
    return None
