"""How many threads a model takes on a device, and on which cores: a short sweep."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from pocketslm.errors import BackendError
from pocketslm.profiling.devices.bench import TIMEOUT_S, repeat
from pocketslm.profiling.devices.device import Device, Progress
from pocketslm.profiling.devices.info import read_machine
from pocketslm.profiling.devices.runner import RunnerProcess, install
from pocketslm.profiling.plan import Test, at_least, plan
from pocketslm.runtime import cores
from pocketslm.runtime.backends import MAX_THREADS
from pocketslm.runtime.bundle import open_bundle

# Fewer threads are chosen where they take at most so much longer: they draw less power.
SLACK = 1.05
_COUNTS = (*range(1, 9), 12, 16, 24, 32, 48)


@dataclass
class Candidate:
    """A number of threads, the CPUs that they keep to (none: any), and the times it took."""

    threads: int
    cpus: tuple[int, ...] = ()
    samples_ns: list[int] = field(default_factory=list)

    @property
    def median_ns(self) -> float:
        return statistics.median(self.samples_ns)

    @property
    def milliseconds(self) -> float:
        return round(self.median_ns / 1e6, 1)

    def __str__(self) -> str:
        where = f" on CPU {cores.format_cpus(self.cpus)}" if self.cpus else ""
        return f"{self.threads} thread{'s' * (self.threads > 1)}{where}"


def candidates(clusters: Sequence[cores.Cluster], usable: int) -> list[Candidate]:
    """Each number of threads on any core, and on the fewest fast clusters that have so many."""
    most = min(usable, MAX_THREADS)
    tried = [*(count for count in _COUNTS if count < most), most]
    fastest: list[tuple[int, ...]] = []
    for cluster in clusters[:-1]:
        fastest.append((*(fastest[-1] if fastest else ()), *cluster.cpus))
    found = []
    for count in tried:
        found.append(Candidate(count))
        if kept := next((cpus for cpus in fastest if len(cpus) >= count), None):
            found.append(Candidate(count, tuple(sorted(kept))))
    return found


def choose(measured: Sequence[Candidate]) -> Candidate:
    """The fastest, or one with fewer threads that is nearly as fast; of equals one without CPUs."""
    limit = SLACK * min(one.median_ns for one in measured)
    near = [one for one in measured if one.median_ns <= limit]
    return min(near, key=lambda one: (one.threads, len(one.cpus) > 0, one.median_ns))


def tune_threads(
    device: Device,
    bundle: Path,
    *,
    n_prompt: int = 128,
    n_gen: int = 32,
    rounds: int = 3,
    timeout_s: float = TIMEOUT_S,
    say: Callable[[str], None] = lambda line: None,
    progress: Progress = lambda step, fraction: None,
) -> tuple[Candidate, list[Candidate]]:
    """Measure a prompt and an answer with every candidate, in turns; keep and return the choice.

    It is kept in the bundle's ``threads.json``. CPUs that the device refuses are left out, which
    ``say`` is told. Raises DeviceError, UsageError, BundleError, BackendError.
    """
    at_least("rounds", 1, [rounds])
    opened = open_bundle(bundle, verify=False)
    cores.read_choices(bundle)  # a damaged file is said before anything is measured
    machine = read_machine(device)
    model = install(device, machine, opened.path / opened.graph("native").file, progress)
    vocabulary = opened.config.vocab_size if opened.config else 1
    (test,) = plan(vocabulary, n_prompt=[], n_gen=[], n_both=[(n_prompt, n_gen)])
    tried = candidates(machine.clusters, machine.cores)
    with RunnerProcess(device, timeout_s) as runner:
        for turn in range(rounds):
            # There and back, so that a device that grows hot slows none of them alone.
            for index, one in enumerate(list(tried[:: 1 - 2 * (turn % 2)])):
                progress(f"{one}, {turn + 1}", (turn + index / len(tried)) / rounds)
                try:
                    one.samples_ns.append(_time(runner, model, test, one))
                except BackendError as error:
                    if not one.cpus:
                        raise
                    say(f"CPU {cores.format_cpus(one.cpus)} is left out: {error}")
                    tried = [other for other in tried if other.cpus != one.cpus]
    progress("done", 1.0)
    chosen = choose(tried)
    entry: dict[str, Any] = {
        "threads": chosen.threads,
        "cpus": list(chosen.cpus),
        "device": machine.product or machine.cpu,
        "measured": datetime.now(UTC).isoformat(timespec="seconds"),
        "test": test.name,
        "milliseconds": {str(one): one.milliseconds for one in tried},
    }
    cores.keep_choice(opened.path, cores.name_of(machine.arch, machine.clusters), entry)
    return chosen, tried


def _time(runner: RunnerProcess, model: str, test: Test, one: Candidate) -> int:
    """Nanoseconds of a prompt and its answer, once the memory is in use."""
    where = {"cpus": one.cpus} if one.cpus else {}
    runner.ask("load", path=model, threads=one.threads, context=test.context, **where)
    repeat(runner, test)
    answer = repeat(runner, test)
    times: list[int] = answer["prefill_ns"] + answer["decode_ns"]
    return sum(times)
