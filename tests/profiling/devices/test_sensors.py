"""Sensor readers on texts of devices, whose sources tests/devices/recordings/README.md names."""

from __future__ import annotations

import math
import random
import subprocess
from pathlib import Path

import pytest
from devices.phone import RECORDINGS

from pocketslm.errors import DeviceError, UsageError
from pocketslm.profiling.devices.bench import total_pss
from pocketslm.profiling.devices.info import machine
from pocketslm.profiling.machine import Cluster
from pocketslm.profiling.records import TracePoint
from pocketslm.profiling.sensors import cpufreq, power, thermal
from pocketslm.profiling.sensors.throttling import throttled
from pocketslm.profiling.sensors.tree import Tree, parse, script

MAX_RELATIVE = 1e-9
BATTERY = "/sys/class/power_supply/battery"


def recording(name: str) -> Tree:
    return parse((RECORDINGS / f"{name}.txt").read_text())


@pytest.mark.parametrize(
    ("name", "cpu", "product", "soc", "clusters"),
    [
        ("galaxy-a52-5g", "2x Cortex-A77 + 6x Cortex-A55", "samsung SM-A526B", "lito", [2, 6]),
        ("msm8953", "8x Cortex-A53", None, "msm8953", [8]),
        ("mi-6", "4x Cortex-A73 + 4x Cortex-A53", "Xiaomi MI 6", "msm8998", [4, 4]),
        ("raspberry-pi-5", "4x Cortex-A76", "Raspberry Pi 5 Model B Rev 1.0", "bcm2712", [4]),
        (
            "jetson-orin-nano",
            "6x Cortex-A78AE",
            "NVIDIA Jetson Orin Nano Developer Kit",
            "tegra234",
            [6],
        ),
        ("jetson-nano", "4x Cortex-A57", "NVIDIA Jetson Nano Developer Kit", None, [4]),
        ("laptop-x86", "Intel(R) Core(TM) i5-8250U CPU @ 1.60GHz", None, None, [8]),
    ],
)
def test_fingerprints(
    name: str, cpu: str, product: str | None, soc: str | None, clusters: list[int]
) -> None:
    found = machine(recording(name), "ssh")
    assert (found.cpu, found.product, found.soc) == (cpu, product, soc)
    assert [len(cluster.cpus) for cluster in found.clusters] == clusters
    assert found.cores == sum(clusters)
    assert 1 << 30 < found.ram_bytes < 1 << 35


def test_the_system_is_named() -> None:
    assert machine(recording("mi-6"), "adb").os == "Android 8.0.0 (), Linux 4.4.78"
    assert "bookworm" in machine(recording("raspberry-pi-5"), "ssh").os
    with pytest.raises(DeviceError, match="no Linux"):
        machine(parse("$ uname -m\tarm64\n"), "ssh")


def test_temperatures_in_three_units_on_one_phone() -> None:
    found = thermal.celsius(recording("msm8953"))
    assert found["tsens_tz_sensor5"] == 30.9  # tenths
    assert found["pm8953_tz"] == 32.636  # thousandths
    assert found["xo_therm"] == 31.0  # whole
    assert "pa_therm1" not in found  # -40: nothing is connected
    assert all(0 < value < 60 for value in found.values())
    assert len(thermal.polled_files(recording("msm8953"))) <= 16


def test_temperatures_of_the_others() -> None:
    galaxy = thermal.celsius(recording("galaxy-a52-5g"))
    assert galaxy == {"AP": 25.6, "BAT": 23.8, "LRB": 24.7, "LRF": 24.7, "LRP": 24.7, "PA": 25.7}
    assert thermal.celsius(recording("raspberry-pi-5")) == {"cpu-thermal": 39.45, "vcgencmd": 39.5}
    orin = thermal.celsius(recording("jetson-orin-nano"))
    assert "cv0-thermal" not in orin  # switched off: 0
    assert orin["tj-thermal"] == 47.531
    assert thermal.celsius(recording("laptop-x86")) == {"coretemp Package id 0": 53.0}


@pytest.mark.parametrize(
    ("bits", "expected"),
    [
        ("0x0", []),
        ("0x50000", []),  # happened since boot, not now
        ("0x50005", ["vcgencmd: under-voltage", "vcgencmd: throttled"]),
        ("0x8", ["vcgencmd: soft temperature limit"]),
    ],
)
def test_a_pi_says_that_it_throttles(bits: str, expected: list[str]) -> None:
    assert thermal.throttle_reasons({"$ vcgencmd get_throttled": f"throttled={bits}"}) == expected


@pytest.mark.parametrize(
    ("status", "expected"), [(0, []), (1, []), (3, ["thermalservice: severe"])]
)
def test_android_says_that_it_throttles(status: int, expected: list[str]) -> None:
    tree = recording("galaxy-a52-5g")
    service = "$ dumpsys thermalservice"
    tree[service] = tree[service].replace("Thermal Status: 0", f"Thermal Status: {status}")
    assert thermal.throttle_reasons(tree) == expected


@pytest.mark.parametrize(
    ("name", "watts", "label"),
    [
        ("jetson-orin-nano", 5.024 * 0.992, "rail VDD_IN (whole board)"),
        ("jetson-nano", 2.104, "rail POM_5V_IN (whole board)"),
        ("mi-6", -1.202147 * 4.13744, "on the cable (uA, positive while discharging)"),
    ],
)
def test_power(name: str, watts: float, label: str) -> None:
    tree = recording(name)
    source = power.find_source(tree)
    assert source is not None
    assert label in source.label
    value = source.read(tree)
    assert value is not None
    assert abs(value / watts - 1) < MAX_RELATIVE
    kept = {path: tree[path] for path in (*source.files, *(f"$ {c}" for c in source.commands))}
    assert source.read(kept) == value  # what is polled is enough
    assert source.read({}) is None


def test_power_of_a_pi_is_the_sum_of_its_rails() -> None:
    tree = recording("raspberry-pi-5")
    source = power.find_source(tree)
    assert source is not None
    assert source.commands == ("vcgencmd pmic_read_adc",)
    lines = [line.split() for line in tree["$ vcgencmd pmic_read_adc"].splitlines()]
    values = {name: float(value.partition("=")[2][:-1]) for name, value in lines}
    watts = [a * values[f"{name[:-2]}_V"] for name, a in values.items() if name.endswith("_A")]
    assert len(watts) == 12
    assert abs((source.read(tree) or 0) / sum(watts) - 1) < MAX_RELATIVE
    assert source.read({"$ vcgencmd pmic_read_adc": "error"}) is None


@pytest.mark.parametrize(
    ("status", "current", "voltage", "watts", "words"),
    [
        ("Discharging", -400_000, 4_000_000, 1.6, "on battery (uA, positive while charging)"),
        ("Discharging", 400_000, 4_000_000, 1.6, "on battery (uA, positive while discharging)"),
        ("Discharging", -400, 4_000_000, 1.6, "on battery (mA, positive while charging)"),
        ("Discharging", 812, 4_000, 3.248, "on battery (mA, positive while discharging)"),
        ("Charging", 400_000, 4_000_000, -1.6, "on the cable (uA, positive while charging)"),
        ("Charging", -400, 4_000_000, -1.6, "on the cable (mA, positive while discharging)"),
        ("Full", 0, 4_000_000, 0.0, "on the cable"),
    ],
)
def test_a_battery_s_units_and_sign(
    status: str, current: int, voltage: int, watts: float, words: str
) -> None:
    values = {"type": "Battery", "status": status, "current_now": current, "voltage_now": voltage}
    tree = {f"{BATTERY}/{name}": str(value) for name, value in values.items()}
    source = power.find_source(tree)
    assert source is not None
    value = source.read(tree)
    assert value is not None
    assert abs(value - watts) < 1e-9
    assert words in source.label
    assert source.on_battery
    assert source.charging == (status != "Discharging")


def test_a_battery_whose_files_are_locked() -> None:
    tree = recording("mi-6")
    service = {"$ dumpsys battery": tree["$ dumpsys battery"]}
    assert power.find_source(service) is None  # no current in it
    assert thermal.celsius(service) == {"battery": 32.6}
    # Samsung's has one, in mA.
    service["$ dumpsys battery"] += "\ncurrent now: 321"
    source = power.find_source(service)
    assert source is not None
    assert source.label == "whole device on the cable (mA, positive while charging)"
    assert abs((source.read(service) or 0) + 0.321 * 4.063) < 1e-9
    unplugged = {name: text.replace("status: 2", "status: 3") for name, text in service.items()}
    source = power.find_source(unplugged)
    assert source is not None
    assert source.label == "whole device on battery (mA, positive while discharging)"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("   TOTAL   34105    28652     1024       48   45000    12000 \n", 34105 << 10),
        ("           TOTAL PSS:    34105            TOTAL RSS:    45000\n", 34105 << 10),
        ("No process found for: 4711\n", None),
    ],
)
def test_android_s_count_of_memory(text: str, expected: int | None) -> None:
    assert total_pss(text) == expected


def test_a_counter_that_wraps() -> None:
    tree = recording("laptop-x86")
    source = power.find_source(tree)
    assert source is not None
    assert source.is_counter
    assert source.files == ("/sys/class/powercap/intel-rapl:0/energy_uj",)  # not its parts
    assert source.label == "processor package"
    top, start = 65532610987, 65532610000
    steps = [0, 500_000, 1_500_000, 1_500_000, 4_000_000]  # microjoules since the start
    readings = [
        (float(at), {source.files[0]: str((start + step) % top)}) for at, step in enumerate(steps)
    ]
    points = power.cumulative(source, readings)
    assert [round(joules, 5) for _, joules in points] == [0, 0.5, 1.5, 1.5, 4.0]
    assert math.isclose(power.between(points, 0.5, 3.5) or 0, 2.5, abs_tol=1e-6)
    assert power.between(points, 3.5, 4.5) is None


def test_a_meter_is_integrated() -> None:
    tree = recording("jetson-nano")
    source = power.find_source(tree)
    assert source is not None
    rng = random.Random(3)
    times = sorted(rng.uniform(0, 100) for _ in range(400))
    readings = [(at, {source.files[0]: str(round(1000 + 50 * at))}) for at in times]
    points = power.cumulative(source, readings)
    joules = power.between(points, 10, 90)
    assert joules is not None
    # 1 W + 0.05 W/s: the trapezoids are exact but for the rounding to milliwatts.
    assert abs(joules - (80 * 1 + 0.05 * (90**2 - 10**2) / 2)) < 80 * 1e-3


def test_clusters_are_pinned_by_name() -> None:
    galaxy = machine(recording("galaxy-a52-5g"), "adb").clusters
    assert cpufreq.pinned("big", galaxy) == cpufreq.pinned("prime", galaxy) == (6, 7)
    assert cpufreq.pinned("little", galaxy) == tuple(range(6))
    assert cpufreq.pinned("all", galaxy) == tuple(range(8))
    assert cpufreq.pinned("0-2,7", galaxy) == (0, 1, 2, 7)
    three = (Cluster((7,), 1024), Cluster((4, 5, 6), 800), Cluster((0, 1, 2, 3), 300))
    assert cpufreq.pinned("big", three) == (4, 5, 6, 7)
    assert cpufreq.pinned("prime", three) == (7,)
    alike = machine(recording("raspberry-pi-5"), "ssh").clusters
    assert cpufreq.pinned("big", alike) == (0, 1, 2, 3)
    for wrong in ("fast", "3-", "", "-1", "0,9"):
        with pytest.raises(UsageError, match="pin"):
            cpufreq.pinned(wrong, galaxy)


def test_frequencies_are_means_where_the_kernel_counts() -> None:
    tree = recording("galaxy-a52-5g")
    clusters = machine(tree, "adb").clusters
    assert cpufreq.khz(tree, None, clusters) == (2208000, 1516800)
    later = dict(tree)
    for path in cpufreq.polled_files(tree, clusters):
        if path.endswith("time_in_state") and "cpu6" in path:
            later[path] = "300000 130\n2208000 510"
    assert cpufreq.khz(later, tree, clusters) == ((30 * 300000 + 10 * 2208000) // 40, 1516800)
    assert cpufreq.khz({}, None, clusters) == ()
    assert len(cpufreq.polled_files(tree, clusters)) == 4


def _trace(*khz: int) -> list[TracePoint]:
    return [TracePoint(at_ns=index, khz=(value, 1_000_000)) for index, value in enumerate(khz)]


def test_throttling_is_judged_by_time_and_clock() -> None:
    steady = [100] * 200
    slower = [100] * 100 + [130] * 100
    clock = _trace(*[2_000_000] * 10, *[1_500_000] * 10)
    same_clock = _trace(*[2_000_000] * 20)
    assert throttled(steady, clock, []) is False  # a lower clock that costs nothing
    assert throttled(slower, clock, []) is True
    assert throttled(slower, same_clock, []) is False  # something else was in the way
    assert throttled(slower, [], []) is True
    assert throttled(steady, same_clock, ["vcgencmd: throttled"]) is True
    assert throttled([100] * 5, clock, []) is None
    one_hiccup = [100] * 199 + [5000]
    assert throttled(one_hiccup, clock, []) is False


def test_every_recording_is_described() -> None:
    table = (RECORDINGS / "README.md").read_text()
    assert all(f"`{path.name}`" in table for path in Path(RECORDINGS).glob("*.txt"))


def test_a_file_s_name_runs_nothing(tmp_path: Path) -> None:
    """A device names its own sensors, and a recording of one may come from anywhere."""
    names = ["a b", "$(touch made)", "`touch made`", "c;touch made", "d'e", 'f"g', "h&", "i\\j"]
    for name in names:
        (tmp_path / name).write_text(name)
    files = [f"{tmp_path}/{name}" for name in names]
    run = {"capture_output": True, "text": True, "check": True, "cwd": tmp_path}
    printed = subprocess.run(["sh", "-c", script(files)], **run).stdout  # type: ignore[call-overload]
    assert parse(printed) == dict(zip(files, names, strict=True))
    assert not (tmp_path / "made").exists()
    (tmp_path / "zone1").write_text("41")
    printed = subprocess.run(["sh", "-c", script([f"{tmp_path}/zone*"])], **run).stdout  # type: ignore[call-overload]
    assert parse(printed) == {f"{tmp_path}/zone1": "41"}
