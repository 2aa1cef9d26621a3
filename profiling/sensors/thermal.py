"""Temperatures, and the system's own word on throttling."""

from __future__ import annotations

import re

from pocketslm.profiling.sensors.tree import Tree, matching, number

FILES = (
    "/sys/class/thermal/thermal_zone*/type",
    "/sys/class/thermal/thermal_zone*/temp",
    "/sys/class/hwmon/hwmon*/name",
    "/sys/class/hwmon/hwmon*/temp*_input",
    "/sys/class/hwmon/hwmon*/temp*_label",
)
POLLED = ("/sys/class/thermal/thermal_zone*/temp", "/sys/class/hwmon/hwmon*/temp*_input")
COMMANDS = (
    *("vcgencmd measure_temp", "vcgencmd get_throttled"),
    *("dumpsys thermalservice", "dumpsys battery"),
)

# Documentation of vcgencmd: bit of get_throttled -> what happens now.
_PI_NOW = {0: "under-voltage", 1: "frequency capped", 2: "throttled", 3: "soft temperature limit"}
# android.os.PowerManager THERMAL_STATUS_*; from moderate on, performance is held back.
_ANDROID_STATUS = ("none", "light", "moderate", "severe", "critical", "emergency", "shutdown")
_COLDEST, _HOTTEST = -40.0, 200.0
_MOST_ZONES = 16
_TELLING = re.compile("cpu|soc|skin|big|mid|lit|batt|shell|quiet")


def celsius(tree: Tree) -> dict[str, float]:
    """Degrees by zone. Zones of equal type get a number; zones that report nonsense are skipped."""
    found: dict[str, float] = {}
    for path in matching(tree, "/sys/class/thermal/thermal_zone*/temp"):
        folder = path.rpartition("/")[0]
        _add(found, tree.get(f"{folder}/type") or folder.rpartition("/")[2], number(tree, path))
    if not found:  # a thermal zone often shows what hwmon shows
        for path in matching(tree, "/sys/class/hwmon/hwmon*/temp*_input"):
            folder = path.rpartition("/")[0]
            label = tree.get(path.replace("_input", "_label"), "")
            name = f"{tree.get(f'{folder}/name', 'hwmon')} {label}".strip()
            _add(found, name, number(tree, path))
    if match := re.search(r"temp=(\d{1,9}(?:\.\d+)?)'C", tree.get("$ vcgencmd measure_temp", "")):
        found["vcgencmd"] = float(match[1])
    if match := re.search(r"^temperature: (\d{1,9})$", tree.get("$ dumpsys battery", ""), re.M):
        found.setdefault("battery", int(match[1]) / 10)
    service = tree.get("$ dumpsys thermalservice", "").partition("Current temperatures from HAL")[2]
    for match in re.finditer(
        r"Temperature\{mValue=(-?\d{1,9}(?:\.\d+)?), mType=\d+, mName=([^,]+),", service
    ):
        if _COLDEST < float(match[1]) < _HOTTEST and float(match[1]):
            found.setdefault(match[2], float(match[1]))
    return found


def _add(found: dict[str, float], name: str, value: int | None) -> None:
    """The kernel documents millidegrees, but some drivers report whole or tenth degrees."""
    if value is None:
        return
    degrees = float(value)
    if abs(degrees) >= 1000:
        degrees /= 1000
    elif abs(degrees) > _HOTTEST:
        degrees /= 10
    if not _COLDEST < degrees < _HOTTEST or value == 0:  # 0: a sensor that is switched off
        return
    count, unique = 1, name
    while unique in found:
        count += 1
        unique = f"{name} {count}"
    found[unique] = degrees


def throttle_reasons(tree: Tree) -> list[str]:
    """The system's reasons for holding performance back now. Empty if it gives none."""
    reasons = []
    if match := re.search(
        r"throttled=0x([0-9a-fA-F]{1,16})", tree.get("$ vcgencmd get_throttled", "")
    ):
        bits = int(match[1], 16)
        reasons += [f"vcgencmd: {what}" for bit, what in _PI_NOW.items() if bits >> bit & 1]
    if match := re.search(r"Thermal Status: (\d{1,9})", tree.get("$ dumpsys thermalservice", "")):
        status = int(match[1])
        if 2 <= status < len(_ANDROID_STATUS):
            reasons.append(f"thermalservice: {_ANDROID_STATUS[status]}")
    return reasons


def polled_files(tree: Tree) -> list[str]:
    """The files to poll, out of those that gave a temperature once.

    Phones have up to a hundred zones, some slow to read. There only the zones of the processor, the
    skin and the battery are polled.
    """
    files = matching(tree, POLLED[0]) or matching(tree, POLLED[1])
    if len(files) <= _MOST_ZONES:
        return files
    names = {path: tree.get(path.replace("/temp", "/type"), "").lower() for path in files}
    return [path for path in files if _TELLING.search(names[path])][:_MOST_ZONES]
