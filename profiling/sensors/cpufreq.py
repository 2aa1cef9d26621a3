"""Core clusters and their frequencies."""

from __future__ import annotations

from collections.abc import Sequence

from pocketslm.errors import UsageError
from pocketslm.profiling.sensors.tree import Tree, matching, number, whole
from pocketslm.runtime.cores import CAPACITY, CPU, MAX_KHZ, POSSIBLE, Cluster, parse_cpus

FILES = (
    f"{CPU}[0-9]*/{CAPACITY}",
    f"{CPU}[0-9]*/{MAX_KHZ}",
    f"{CPU}[0-9]*/cpufreq/scaling_governor",
    f"{CPU}[0-9]*/cpufreq/scaling_cur_freq",
    f"{CPU}[0-9]*/cpufreq/stats/time_in_state",
    POSSIBLE,
)
_STATES = "stats/time_in_state"


def khz(tree: Tree, before: Tree | None, machine_clusters: Sequence[Cluster]) -> tuple[int, ...]:
    """The frequency of each cluster. Empty if any cluster does not tell.

    If the kernel counts the time in each state, it is the mean since the reading ``before``.
    Otherwise it is the greatest frequency at this moment.
    """
    found = []
    for cluster in machine_clusters:
        paths = [f"{CPU}{cpu}/cpufreq/" for cpu in cluster.cpus]
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
    found = matching(tree, f"{CPU}[0-9]*/cpufreq/scaling_cur_freq")
    if len(machine_clusters) > 1:
        first = {f"{CPU}{cluster.cpus[0]}/cpufreq/scaling_cur_freq" for cluster in machine_clusters}
        found = [path for path in found if path in first]
    states = [path.replace("scaling_cur_freq", _STATES) for path in found]
    return found + [path for path in states if path in tree]


def governor(tree: Tree) -> str | None:
    """cpufreq's governor. Those of several clusters are joined."""
    found = dict.fromkeys(tree[path] for path in matching(tree, f"{CPU}*/scaling_governor"))
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
