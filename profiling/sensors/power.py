"""Find the power that a device draws, and say what the figures mean.

Three kinds: counters of energy (powercap), meters of power (hwmon, INA219/226/3221, the rails of a
Jetson or of a Raspberry Pi 5), and the battery's voltage and current.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise

from pocketslm.profiling.sensors.tree import Tree, folders, matching, number

_POWERCAP = "/sys/class/powercap/intel-rapl:[0-9]*"
_HWMON = "/sys/class/hwmon/hwmon*"
_IIO = "/sys/bus/i2c/drivers/ina3221x/*/iio:device*"
_BATTERY = "/sys/class/power_supply/*"
FILES = (
    *(f"{_POWERCAP}/{name}" for name in ("name", "energy_uj", "max_energy_range_uj")),
    f"{_HWMON}/name",
    *(f"{_HWMON}/{kind}" for kind in ("power*_input", "power*_average", "power*_label")),
    *(f"{_HWMON}/{kind}" for kind in ("curr*_input", "in*_input", "in*_label")),
    *(f"{_IIO}/{kind}" for kind in ("rail_name_*", "in_power*_input")),
    *(f"{_BATTERY}/{name}" for name in ("type", "status", "current_now", "voltage_now")),
)
COMMANDS = ("vcgencmd pmic_read_adc", "dumpsys battery")

# Rails that carry everything else. A device that has one must not count its parts as well.
_TOTAL_RAILS = ("VDD_IN", "POM_5V_IN", "5V_IN", "SYS5V", "VDD_SYS", "TOTAL")
_INSTRUMENTS = ("ina219", "ina220", "ina226", "ina231", "ina238", "ina260", "ina3221", "ina2")
# A phone that runs a model draws 0.1 A to 5 A: below this the figure is in milliamperes.
_LEAST_MICROAMPERES = 20_000
_LEAST_MICROVOLTS = 100_000  # and the voltage of a cell, 3 V to 9 V, in millivolts


@dataclass(frozen=True)
class Source:
    """A place where a device tells power or energy.

    - ``name``: the file or command. ``label`` says what the figure includes.
    - ``read``: the cumulative joules of a counter, or the watts of a meter, from a tree that holds
      ``files`` and ``commands``. None if they are missing.
    - ``wraps_at``: the joules at which a counter starts anew.
    - ``on_battery``: whether idle power must be subtracted, because a screen and a radio draw it
      too.
    """

    name: str
    label: str
    read: Callable[[Tree], float | None]
    files: tuple[str, ...] = ()
    commands: tuple[str, ...] = ()
    is_counter: bool = False
    wraps_at: float = 0.0
    on_battery: bool = False
    charging: bool = False


def find_source(tree: Tree) -> Source | None:
    """The best source of a device: nearest to the processor, or the whole board, or the battery."""
    for find in (_powercap, _rails, _pmic, _battery):
        if (source := find(tree)) is not None and source.read(tree) is not None:
            return source
    return None


def cumulative(source: Source, readings: Sequence[tuple[float, Tree]]) -> list[tuple[float, float]]:
    """(seconds, joules since the first reading) from readings of (seconds, tree).

    Counters are unwrapped, and meters are integrated by trapezoids. Readings that lack the source
    are left out.
    """
    points: list[tuple[float, float]] = []
    previous = (0.0, 0.0)
    for at, tree in readings:
        value = source.read(tree)
        if value is None:
            continue
        joules = 0.0
        if points and source.is_counter:
            step = value - previous[1]
            joules = points[-1][1] + (step + source.wraps_at if step < 0 else step)
        elif points:
            joules = points[-1][1] + (at - previous[0]) * (value + previous[1]) / 2
        points.append((at, joules))
        previous = (at, value)
    return points


def between(points: Sequence[tuple[float, float]], start: float, end: float) -> float | None:
    """Joules from start to end, linear between readings, or None if the readings do not span it."""
    if len(points) < 2 or start < points[0][0] or end > points[-1][0]:
        return None
    return _at(points, end) - _at(points, start)


def _at(points: Sequence[tuple[float, float]], when: float) -> float:
    for (t0, e0), (t1, e1) in pairwise(points):
        if t0 <= when <= t1:
            return e0 if t1 == t0 else e0 + (e1 - e0) * (when - t0) / (t1 - t0)
    return points[-1][1]


def _powercap(tree: Tree) -> Source | None:
    """RAPL: all packages together, or the whole platform if it has its own counter."""
    zones = {
        folder: tree.get(f"{folder}/name", "")
        for folder in folders(matching(tree, f"{_POWERCAP}/energy_uj"))
        if re.fullmatch(r"intel-rapl:\d+", folder.rpartition("/")[2])  # :0:0 is a part of :0
    }
    chosen = [f for f, name in zones.items() if name == "psys"] or [
        f for f, name in zones.items() if name.startswith("package")
    ]
    if not chosen:
        return None
    files = tuple(f"{folder}/energy_uj" for folder in chosen)
    ranges = [number(tree, f"{folder}/max_energy_range_uj") or 0 for folder in chosen]
    return Source(
        name=" + ".join(files),
        label="whole platform" if zones[chosen[0]] == "psys" else "processor package",
        read=_sum_of(files, 1e-6),
        files=files,
        is_counter=True,
        # Counters of several packages wrap one by one. Their sum then drops by one counter's range.
        wraps_at=min(ranges) * 1e-6,
    )


def _rails(tree: Tree) -> Source | None:
    """Instruments on supply rails, by hwmon or, on older Jetsons, by the ina3221x driver."""
    watts: dict[str, tuple[str, Callable[[Tree], float | None], tuple[str, ...]]] = {}
    for path in matching(tree, f"{_IIO}/in_power*_input"):
        folder, _, file = path.rpartition("/")
        rail = tree.get(f"{folder}/rail_name_{re.sub(r'[^0-9]', '', file)}", file)
        watts[rail] = (path, _sum_of((path,), 1e-3), (path,))  # milliwatts
    for folder in folders(matching(tree, f"{_HWMON}/name")):
        instrument = tree.get(f"{folder}/name", "")
        if not instrument.startswith(_INSTRUMENTS):
            continue
        for path in matching(tree, f"{folder}/power*_input"):
            label = tree.get(path.replace("_input", "_label"), instrument)
            watts[label] = (path, _sum_of((path,), 1e-6), (path,))
        if matching(tree, f"{folder}/power*_input"):
            continue
        for path in matching(tree, f"{folder}/curr*_input"):  # INA3221: mA, and mV of its channel
            channel = re.sub(r"[^0-9]", "", path.rpartition("/")[2])
            volts = f"{folder}/in{channel}_input"
            label = tree.get(f"{folder}/in{channel}_label", "")
            if volts in tree and label:
                watts[label] = (path, _product(path, volts, 1e-6), (path, volts))
    if not watts:
        return None
    chosen = [rail for rail in watts if rail.upper() in _TOTAL_RAILS][:1] or list(watts)
    readers = [watts[rail][1] for rail in chosen]
    return Source(
        name=" + ".join(watts[rail][0] for rail in chosen),
        label=f"rail {', '.join(chosen)}" + (" (whole board)" if len(chosen) == 1 else ""),
        read=lambda tree: _total([read(tree) for read in readers]),
        files=tuple(path for rail in chosen for path in watts[rail][2]),
    )


def _pmic(tree: Tree) -> Source | None:
    """The power chip of a Raspberry Pi 5: every rail's current times its voltage."""
    command = "vcgencmd pmic_read_adc"
    if f"$ {command}" not in tree:
        return None
    return Source(
        name=command,
        label="rails behind the power chip (USB and the 5 V pins not included)",
        read=lambda tree: pmic_watts(tree.get(f"$ {command}", "")),
        commands=(command,),
    )


def pmic_watts(text: str) -> float | None:
    """Of ``vcgencmd pmic_read_adc``: lines such as ``3V3_SYS_A current(1)=0.09A``."""
    amperes = dict(re.findall(r"(\w+)_A current\(\d+\)=(\d{1,9}(?:\.\d+)?)A", text))
    volts = dict(re.findall(r"(\w+)_V volt\(\d+\)=(\d{1,9}(?:\.\d+)?)V", text))
    rails = amperes.keys() & volts.keys()
    return sum(float(amperes[r]) * float(volts[r]) for r in rails) if rails else None


def _battery(tree: Tree) -> Source | None:
    """The battery's outflow, from its files or, if those are locked, from Android's service."""
    for folder in folders(matching(tree, f"{_BATTERY}/current_now")):
        if tree.get(f"{folder}/type", "Battery") != "Battery":
            continue
        files = (f"{folder}/current_now", f"{folder}/voltage_now")
        current, voltage = (number(tree, path) for path in files)
        if current is not None and voltage:
            unit, label, charging = _convention(current, voltage, tree.get(f"{folder}/status", ""))
            name = f"{folder}/current_now x voltage_now"
            read = _product(*files, unit)
            return Source(name, label, read, files, on_battery=True, charging=charging)
    command = "dumpsys battery"
    if (found := _dumpsys(tree)) is None:
        return None
    status = {2: "Charging", 3: "Discharging"}.get(found["status"], "")
    unit, label, charging = _convention(found["current now"], found["voltage"], status)

    def read_service(tree: Tree) -> float | None:
        now = _dumpsys(tree)
        return None if now is None else now["current now"] * now["voltage"] * unit

    return Source(
        f"{command}: current now x voltage",
        label,
        read_service,
        commands=(command,),
        on_battery=True,
        charging=charging,
    )


def _dumpsys(tree: Tree) -> dict[str, int] | None:
    """Read ``dumpsys battery``, which holds the current with some vendors only."""
    text = tree.get("$ dumpsys battery", "")
    found = {
        name: int(value) for name, value in re.findall(r"^([\w ]+): (-?\d{1,18})$", text, re.M)
    }
    return found if {"current now", "voltage", "status"} <= found.keys() else None


def _convention(current: int, voltage: int, status: str) -> tuple[float, str, bool]:
    """Turn current and voltage, whose unit and sign differ by vendor, into watts of outflow. Also
    returns a description, and whether the battery is being charged.
    """
    in_milliamperes = 0 < abs(current) < _LEAST_MICROAMPERES
    # The kernel's convention is positive into the battery, some vendors have the other: what the
    # battery does and which sign it shows meanwhile tell which.
    outflow = 1 if current * {"Discharging": 1, "Charging": -1}.get(status, 0) > 0 else -1
    charging = status != "Discharging"
    unit = "mA" if in_milliamperes else "uA"
    sign = "discharging" if outflow == 1 else "charging"
    where = "on the cable" if charging else "on battery"
    scale = (1e-3 if in_milliamperes else 1e-6) * (1e-6 if voltage > _LEAST_MICROVOLTS else 1e-3)
    return outflow * scale, f"whole device {where} ({unit}, positive while {sign})", charging


def _sum_of(files: Sequence[str], unit: float) -> Callable[[Tree], float | None]:
    def read(tree: Tree) -> float | None:
        values = [number(tree, path) for path in files]
        return _total([None if value is None else value * unit for value in values])

    return read


def _product(first: str, second: str, unit: float) -> Callable[[Tree], float | None]:
    def read(tree: Tree) -> float | None:
        a, b = number(tree, first), number(tree, second)
        return None if a is None or b is None else a * b * unit

    return read


def _total(values: Sequence[float | None]) -> float | None:
    return sum(value for value in values if value is not None) if None not in values else None
