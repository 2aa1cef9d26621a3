"""The cores of a machine by kind, and how many threads a model was measured to want on them.

``pocketslm tune-threads`` writes ``threads.json`` beside a bundle's files: a choice for each
machine that it measured. The app takes the choice of the machine that it runs on.
"""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from pocketslm.errors import BundleError
from pocketslm.folders import written

CPU = "/sys/devices/system/cpu/cpu"
POSSIBLE = "/sys/devices/system/cpu/possible"
CAPACITY, MAX_KHZ = "cpu_capacity", "cpufreq/cpuinfo_max_freq"
MOST_CPUS = 4096  # as many as Linux is built for
CHOICES = "threads.json"
MOST_BYTES = 1 << 16  # of a file of choices


@dataclass(frozen=True)
class Cluster:
    """Cores of one kind. ``capacity`` is the kernel's rating; the fastest cores have 1024."""

    cpus: tuple[int, ...]
    capacity: int | None = None
    max_khz: int | None = None


def clusters(tree: Mapping[str, str], cores: int) -> tuple[Cluster, ...]:
    """The cores by capacity and greatest frequency, the fastest cluster first.

    ``tree`` holds texts of files by path. ``cores`` is the number of cores if the tree does not
    tell. A symmetric machine has one cluster.
    """
    try:
        cpus = parse_cpus(tree[POSSIBLE])
    except (KeyError, ValueError):
        cpus = tuple(range(min(cores, MOST_CPUS)))
    groups: dict[tuple[int | None, int | None], list[int]] = {}
    for cpu in cpus:
        capacity, khz = (_number(tree, f"{CPU}{cpu}/{name}") for name in (CAPACITY, MAX_KHZ))
        groups.setdefault((capacity, khz), []).append(cpu)
    order = sorted(groups, key=lambda key: (-(key[0] or 0), -(key[1] or 0)))
    return tuple(Cluster(tuple(groups[key]), *key) for key in order)


def _number(tree: Mapping[str, str], path: str) -> int | None:
    text = tree.get(path, "").strip()
    return int(text) if text.isdecimal() and len(text) < 19 else None


def parse_cpus(text: str) -> tuple[int, ...]:
    """Read a list of CPUs as the kernel writes it: ``0-3,6``. Raises ValueError otherwise."""
    cpus: set[int] = set()
    for part in text.split(","):
        first, dash, last = part.partition("-")
        low, high = int(first), int(last if dash else first)
        if not 0 <= low <= high < MOST_CPUS:
            raise ValueError(text)
        cpus |= set(range(low, high + 1))
    return tuple(sorted(cpus))


def format_cpus(cpus: Sequence[int]) -> str:
    """The list that :func:`parse_cpus` reads."""
    runs: list[list[int]] = []
    for cpu in sorted(cpus):
        if runs and runs[-1][1] == cpu - 1:
            runs[-1][1] = cpu
        else:
            runs.append([cpu, cpu])
    return ",".join(f"{a}-{b}" if a != b else str(a) for a, b in runs)


def name_of(arch: str, found: Iterable[Cluster]) -> str:
    """What tells a machine from others: ``aarch64 6-7:2208000 0-5:1804800``."""
    speeds = ((format_cpus(one.cpus), one.max_khz or one.capacity) for one in found)
    return " ".join([arch, *(f"{cpus}:{speed}" if speed else cpus for cpus, speed in speeds)])


def this_machine() -> str:
    """:func:`name_of` the machine that this process runs on."""
    tree: dict[str, str] = {}
    with suppress(OSError, ValueError):
        tree[POSSIBLE] = Path(POSSIBLE).read_text("ascii").strip()
        for cpu in parse_cpus(tree[POSSIBLE]):
            for path in (f"{CPU}{cpu}/{name}" for name in (CAPACITY, MAX_KHZ)):
                with suppress(OSError):
                    tree[path] = Path(path).read_text("ascii")
    return name_of(platform.machine(), clusters(tree, os.cpu_count() or 1))


@dataclass(frozen=True)
class Choice:
    """How many threads, and the CPUs that they keep to; none: any."""

    threads: int
    cpus: tuple[int, ...] = ()


def read_choices(bundle: Path) -> dict[str, dict[str, Any]]:
    """The entries of a bundle's ``threads.json`` by machine; none where there is no such file.

    Raises BundleError for a file of another form.
    """
    path = bundle / CHOICES
    try:
        text = path.read_text("utf-8")
        entries = json.loads(text)["machines"]
        for entry in entries.values():
            _choice(entry)
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise BundleError(
            f"{path} is no file of `pocketslm tune-threads`; remove it, or tune again"
        ) from None
    assert isinstance(entries, dict)
    return entries


def _choice(entry: Mapping[str, Any]) -> Choice:
    numbers = [entry["threads"], *entry["cpus"]]
    if any(type(one) is not int or not 0 <= one < MOST_CPUS for one in numbers) or not numbers[0]:
        raise ValueError(entry)
    return Choice(numbers[0], tuple(numbers[1:]))


def keep_choice(bundle: Path, machine: str, entry: Mapping[str, Any]) -> None:
    """Put an entry into a bundle's ``threads.json``: ``threads``, ``cpus`` and what says why."""
    entries = read_choices(bundle) | {machine: dict(entry)}
    with written(bundle / CHOICES) as part:
        part.write_text(json.dumps({"machines": entries}, indent=1) + "\n", "utf-8")


def choice_here(bundle: Path) -> Choice | None:
    """What was measured for this machine, if anything. A damaged file counts for nothing."""
    with suppress(BundleError):
        if (entry := read_choices(bundle).get(this_machine())) is not None:
            return _choice(entry)
    return None


def keep_to(cpus: Sequence[int]) -> None:
    """Keep this thread, and the threads and processes that it starts later, to these CPUs.

    None: to those that the process was given. Where the system refuses, nothing changes.
    """
    if hasattr(os, "sched_setaffinity"):
        with suppress(OSError):
            given = _given()
            os.sched_setaffinity(0, cpus or given)


@cache
def _given() -> set[int]:
    return os.sched_getaffinity(0)
