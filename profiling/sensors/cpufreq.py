"""Core clusters and their frequencies."""

from __future__ import annotations

from collections.abc import Sequence

from pocketslm.errors import UsageError
from pocketslm.profiling.machine import Cluster
from pocketslm.profiling.sensors.tree import Tree, matching, number, whole

_CPU = "/sys/devices/system/cpu/cpu"
FILES = (
    f"{_CPU}[0-9]*/cpu_capacity",
    f"{_CPU}[0-9]*/cpufreq/cpuinfo_max_freq",
    f"{_CPU}[0-9]*/cpufreq/scaling_governor",
    f"{_CPU}[0-9]*/cpufreq/scaling_cur_freq",
    f"{_CPU}[0-9]*/cpufreq/stats/time_in_state",
    "/sys/devices/system/cpu/possible",
)
_STATES = "stats/time_in_state"
MOST_CPUS = 4096  # as many as Linux is built for


def clusters(tree: Tree, cores: int) -> tuple[Cluster, ...]:
    """The cores by capacity and greatest frequency, the fastest cluster first.

    ``cores`` is the number of cores if the tree does not tell. A symmetric machine has one cluster.
    """
    try:
        cpus = parse_cpus(tree["/sys/devices/system/cpu/possible"])
    except (KeyError, ValueError):
        cpus = tuple(range(min(cores, MOST_CPUS)))
    groups: dict[tuple[int | None, int | None], list[int]] = {}
    for cpu in cpus:
        capacity = number(tree, f"{_CPU}{cpu}/cpu_capacity")
        khz = number(tree, f"{_CPU}{cpu}/cpufreq/cpuinfo_max_freq")
        groups.setdefault((capacity, khz), []).append(cpu)
    order = sorted(groups, key=lambda key: (-(key[0] or 0), -(key[1] or 0)))
    return tuple(Cluster(tuple(groups[key]), *key) for key in order)


def khz(tree: Tree, before: Tree | None, machine_clusters: Sequence[Cluster]) -> tuple[int, ...]:
    """The frequency of each cluster. Empty if any cluster does not tell.

    If the kernel counts the time in each state, it is the mean since the reading ``before``.
    Otherwise it is the greatest frequency at this moment.
    """
    found = []
    for cluster in machine_clusters:
        paths = [f"{_CPU}{cpu}/cpufreq/" for cpu in cluster.cpus]
        means = [_mean_khz(tree, before, path + _STATES) for path in paths] if before else []
        now = [number(tree, path + "scaling_cur_freq") for path in paths]
        if not any(now):
            return ()
        found.append(max(filter(None, means), default=0) or max(filter(None, now)))
    return tuple(found)


def _mean_khz(tree: Tree, before: Tree, path: str) -> int | None:
    now, then = _states(tree.get(path, "")), _states(before.get(path, ""))
    spent = {frequency: ticks - then.get(frequency, 0) for frequency, ticks in now.items()}
    total = sum(spent.values())
    if total <= 0 or min(spent.values()) < 0:
        return None
    return round(sum(frequency * ticks for frequency, ticks in spent.items()) / total)


def _states(text: str) -> dict[int, int]:
    """Ticks by kHz."""
    lines = ([whole(word) for word in line.split()] for line in text.splitlines())
    return {
        line[0]: line[1]
        for line in lines
        if len(line) == 2 and line[0] is not None and line[1] is not None
    }


def polled_files(tree: Tree, machine_clusters: Sequence[Cluster]) -> list[str]:
    """One CPU's files for cores that share a clock; otherwise each core's own, as on x86."""
    found = matching(tree, f"{_CPU}[0-9]*/cpufreq/scaling_cur_freq")
    if len(machine_clusters) > 1:
        first = {
            f"{_CPU}{cluster.cpus[0]}/cpufreq/scaling_cur_freq" for cluster in machine_clusters
        }
        found = [path for path in found if path in first]
    states = [path.replace("scaling_cur_freq", _STATES) for path in found]
    return found + [path for path in states if path in tree]


def governor(tree: Tree) -> str | None:
    """cpufreq's governor. Those of several clusters are joined."""
    found = dict.fromkeys(tree[path] for path in matching(tree, f"{_CPU}*/scaling_governor"))
    return ", ".join(found) or None


def pinned(choice: str, machine_clusters: Sequence[Cluster]) -> tuple[int, ...]:
    """The CPUs that ``--pin`` names: big, little, prime, all, or a list such as 4-6,7.

    ``big`` is every cluster but the slowest, if there are several. Raises UsageError for anything
    else.
    """
    every = tuple(cpu for cluster in machine_clusters for cpu in cluster.cpus)
    named = {
        "all": every,
        "big": every[: -len(machine_clusters[-1].cpus)] or every,
        "little": machine_clusters[-1].cpus,
        "prime": machine_clusters[0].cpus,
    }
    if choice in named:
        return tuple(sorted(named[choice]))
    try:
        cpus = parse_cpus(choice)
    except ValueError:
        raise UsageError(
            f"pin is {choice!r}, expected {', '.join(named)} or CPUs such as 0-3,6"
        ) from None
    if unknown := sorted(set(cpus) - set(every)):
        raise UsageError(f"pin names CPU {unknown[0]}, the device has {min(every)} to {max(every)}")
    return cpus


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
