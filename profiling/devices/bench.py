"""Benchmarks on a device: the runner works there while the sensors are read."""

from __future__ import annotations

import re
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from pocketslm import __version__
from pocketslm.errors import UsageError
from pocketslm.profiling.cost import Cost
from pocketslm.profiling.devices.device import Device, Progress, file_sha256
from pocketslm.profiling.devices.info import read_machine
from pocketslm.profiling.devices.runner import RunnerProcess, install
from pocketslm.profiling.machine import Limits
from pocketslm.profiling.plan import Test, at_least
from pocketslm.profiling.records import OURS, Energy, Measurement
from pocketslm.profiling.sensors import cpufreq, thermal
from pocketslm.profiling.sensors.power import find_source
from pocketslm.profiling.sensors.sampler import Sampler, idle_watts, read_sensors
from pocketslm.profiling.sensors.throttling import throttled
from pocketslm.profiling.sensors.tree import parse, script
from pocketslm.runtime.bundle import MANIFEST, Bundle, open_bundle
from pocketslm.runtime.ops.built import source_hash

Keep = Callable[[Measurement], None]

TIMEOUT_S = 600.0
SETTLE_S = 0.1  # before each repetition: threads spin a little after their work, then park
IDLE_S = 10.0
_PROBE_BYTES = (1 << 20, 1 << 30)


@dataclass(frozen=True)
class Conditions:
    """The conditions under which tests run on a device.

    - ``pin``: big, little, prime, all or CPUs such as 4-7. None leaves it to the system.
    - ``sustained_s``: repeat for so many seconds without a pause, to see it throttle. 0 repeats
      ``repetitions`` times.
    - ``cold``: before each repetition, drop the model from the page cache and load it anew. There
      is no warm-up.
    - ``operators``: add one repetition for the time of each operator.
    - ``pause_s``: seconds between tests. None takes the device's own.
    - ``idle_s``: how long to watch a battery's drain at rest beforehand.
    - ``interval_s``: seconds between polls of the sensors. 0 turns the sensors off.
    """

    repetitions: int = 5
    pin: str | None = None
    sustained_s: float = 0.0
    cold: bool = False
    operators: bool = False
    pause_s: float | None = None
    idle_s: float = IDLE_S
    interval_s: float = 1.0
    timeout_s: float = TIMEOUT_S

    def __post_init__(self) -> None:
        at_least("repetitions", 1, [self.repetitions])
        for name in ("sustained_s", "pause_s", "idle_s", "interval_s"):
            value = getattr(self, name)
            if value is not None and not value >= 0:
                raise UsageError(f"{name} is {value}, expected seconds, at least 0")
        if not self.timeout_s > 0:
            raise UsageError(f"timeout is {self.timeout_s}, expected seconds above 0")


def bench_on_device(
    device: Device,
    bundles: Sequence[str | Path],
    *,
    tests: Sequence[Test],
    threads: Sequence[int],
    conditions: Conditions,
    keep: Keep,
    runs: int = 1,
    progress: Progress = lambda step, fraction: None,
) -> None:
    """Measure the native graphs of bundles. ``keep`` is called with each row as soon as it is
    measured.

    ``threads`` are numbers of threads; if empty, each chosen core gets one. ``runs`` repeats
    everything. A test that a pulled cable or Ctrl-C cuts short still gives a row of the repetitions
    counted until then. Raises DeviceError, UsageError, BundleError, BackendError.
    """
    at_least("runs", 1, [runs])
    at_least("threads", 1, threads)
    opened = [open_bundle(path, verify=False) for path in bundles]
    sessions = [_Session(device, bundle, conditions, keep, progress) for bundle in opened]
    for session in sessions:
        session.prepare()
    first = sessions[0]
    threads = tuple(threads) or (len(first.cpus) or first.machine.cores,)
    jobs = [(session, test, count) for count in threads for test in tests for session in sessions]
    pause_s = device.pause_s if conditions.pause_s is None else conditions.pause_s
    for index in range(runs * len(jobs)):
        session, test, count = jobs[index % len(jobs)]
        done = index / (runs * len(jobs))
        if index and pause_s:
            progress(f"pause of {pause_s:g} s", done)
            time.sleep(pause_s)
        if index % len(jobs) == 0:
            started = datetime.now(UTC).isoformat(timespec="seconds")
            run = {"run": uuid.uuid4().hex, "started": started}
        session.measure(test, count, run, done)
    progress("done", 1.0)


@dataclass
class _Counted:
    """The counted repetitions of one test so far."""

    loaded: dict[str, Any]
    limits: Limits
    base_rss_bytes: int
    samples_ns: list[int] = field(default_factory=list)
    prefill_ns: list[int] = field(default_factory=list)
    step_ns: list[int] = field(default_factory=list)
    cpu_ns: int = 0
    major_faults: int = 0
    windows_ns: list[tuple[int, int]] = field(default_factory=list)
    stats: dict[str, Any] = field(default_factory=dict)
    pss_bytes: int | None = None
    operator_ns: dict[str, int] | None = None
    reasons: list[str] = field(default_factory=list)

    def add(self, test: Test, answer: dict[str, Any], end_ns: int) -> None:
        """Count one answer of the runner's ``bench``."""
        prefill, decode = sum(answer["prefill_ns"]), sum(answer["decode_ns"])
        parts = [part for part, n in (("prefill", test.n_prompt), ("decode", test.n_gen)) if n]
        self.samples_ns.append(sum({"prefill": prefill, "decode": decode}[part] for part in parts))
        if len(parts) == 2:
            self.prefill_ns.append(prefill)
        self.step_ns += answer["step_ns"]
        self.cpu_ns += sum(sum(answer[f"{part}_cpu_ns"]) for part in parts)
        self.major_faults += sum(sum(answer[f"{part}_faults"]) for part in parts)
        self.windows_ns.append((end_ns - self.samples_ns[-1], end_ns))


class _Session:
    """The rows of one call of :func:`bench_on_device`."""

    def __init__(
        self,
        device: Device,
        bundle: Bundle,
        conditions: Conditions,
        keep: Keep,
        progress: Progress,
    ) -> None:
        self._device, self._bundle, self._conditions = device, bundle, conditions
        self._keep, self._progress = keep, progress
        self._graph = bundle.graph("native")
        self._idle_watts: float | None = None
        self._limits: dict[int, Limits] = {}

    def prepare(self) -> None:
        """Look at the device and install the runner and the model."""
        self.machine = read_machine(self._device)
        pin = self._conditions.pin
        self.cpus = cpufreq.pinned(pin, self.machine.clusters) if pin else ()
        model = self._bundle.path / self._graph.file
        self._model = install(self._device, self.machine, model, self._progress)
        self._seen = read_sensors(self._device)
        self._measure_idle()
        manifest = self._bundle.manifest
        config = self._bundle.config
        assert manifest is not None  # foreign folders have no native graph
        assert config is not None
        self._common: dict[str, Any] = {
            "model": self._bundle.name,
            "artefact": self._bundle.path.resolve().name,
            "artefact_sha256": file_sha256(self._bundle.path / MANIFEST),
            "size_bytes": self._bundle.graph_bytes(self._graph),
            "quality": manifest.quality,
            "head_macs": Cost.of(config).head_macs,
            "runtime": OURS,
            "runtime_version": __version__,
            "pocketslm": __version__,
            "machine": self.machine,
            "software": {"pocketslm-run": source_hash()},
            "cold": self._conditions.cold,
        }

    def _measure_idle(self) -> None:
        """Measure the drain at rest: a battery also feeds the screen and the radio."""
        source = find_source(self._seen)
        if source is not None and source.on_battery and self._conditions.idle_s:
            self._progress(f"power at rest, {self._conditions.idle_s:g} s", 0.0)
            self._idle_watts = idle_watts(self._device, self._seen, self._conditions.idle_s)

    def measure(self, test: Test, threads: int, run: dict[str, Any], done: float) -> None:
        """Run one test. Its row is kept even if the test is cut short. ``run`` has the fields of
        the run.
        """
        limits = self._probe(threads)
        with RunnerProcess(self._device, self._conditions.timeout_s) as runner:
            base = runner.ask("stats")["peak_rss_bytes"]
            counted = _Counted(self._load(runner, test, threads), limits, base)
            if not self._conditions.cold:
                repeat(runner, test)  # first touches of memory, not counted
            sampler = self._sampler(runner.pid)
            try:
                with sampler:
                    for turn in self._turns():
                        self._progress(f"{test.name}, {threads} threads, {turn + 1}", done)
                        if self._conditions.cold and turn:
                            self._load(runner, test, threads)
                        sampler.poll()
                        answer = repeat(runner, test)
                        counted.add(test, answer, time.monotonic_ns())
                        sampler.poll()
                        counted.stats = runner.ask("stats")
                counted.pss_bytes = self._pss(runner.pid, counted.stats)
                counted.reasons = self._reasons()
                if self._conditions.operators:
                    counted.operator_ns = self._operators(runner, test, threads)
            finally:
                if counted.stats:
                    self._keep(self._row(test, counted, sampler, run))

    def _turns(self) -> Iterator[int]:
        """The repetitions: so many, or for so many seconds."""
        start, turn = time.monotonic(), 0
        while turn == 0 or (
            time.monotonic() - start < self._conditions.sustained_s
            if self._conditions.sustained_s
            else turn < self._conditions.repetitions
        ):
            if not self._conditions.sustained_s:
                time.sleep(SETTLE_S)
            yield turn
            turn += 1

    def _probe(self, threads: int) -> Limits:
        """Measure the limits once for each number of threads, apart from the model's memory."""
        if threads not in self._limits:
            size = min(max(self._common["size_bytes"], _PROBE_BYTES[0]), _PROBE_BYTES[1])
            with RunnerProcess(self._device, self._conditions.timeout_s) as runner:
                probe = runner.ask("probe", threads=threads, bytes=size)
            self._limits[threads] = Limits(probe["bandwidth_bytes_per_s"], probe["int8_macs_per_s"])
        return self._limits[threads]

    def _operators(self, runner: RunnerProcess, test: Test, threads: int) -> dict[str, int]:
        """Nanoseconds of the timed part of one repetition, by operator."""
        self._load(runner, test, threads, profile=True)
        repeat(runner, test)  # as in measure
        answer = repeat(runner, test)
        parts = [part for part, n in (("prefill", test.n_prompt), ("decode", test.n_gen)) if n]
        times = [answer[f"{part}_times"] for part in parts]
        return {
            name.removesuffix("_ns"): sum(one[name] for one in times)
            for name in times[0]
            if name.endswith("_ns")
        }

    def _load(
        self, runner: RunnerProcess, test: Test, threads: int, *, profile: bool = False
    ) -> dict[str, Any]:
        pinning = {"cpus": self.cpus, "pin": True} if self.cpus else {}
        return runner.ask(
            "load",
            path=self._model,
            threads=threads,
            context=test.context,
            cold=self._conditions.cold and not profile,
            profile=profile,
            **pinning,
        )

    def _sampler(self, pid: int) -> Sampler:
        return Sampler(
            self._device, self._seen, self.machine.clusters, pid, self._conditions.interval_s
        )

    def _pss(self, pid: int, stats: dict[str, Any]) -> int | None:
        """PSS as Android counts it, if the kernel (before 4.14) is too old to tell the runner."""
        if stats["pss_bytes"] or self._device.kind != "adb":
            return None
        return total_pss(self._device.shell(f"dumpsys meminfo {pid} || true"))

    def _reasons(self) -> list[str]:
        """The system's reasons for throttling, right after the run."""
        tree = parse(self._device.shell(script((), thermal.COMMANDS)))
        return thermal.throttle_reasons(tree)

    def _energy(self, counted: _Counted, sampler: Sampler) -> Energy | None:
        source, joules = sampler.source, sampler.joules(counted.windows_ns)
        if source is None or joules is None:
            return None
        label = source.label
        if self._idle_watts is not None:
            joules -= self._idle_watts * sum(counted.samples_ns) / 1e9
            label += f", idle {self._idle_watts:.3g} W subtracted"
        elif source.charging:
            return None  # the current into a battery is not the device's own draw
        return Energy(joules, source.name, label)

    def _row(
        self, test: Test, counted: _Counted, sampler: Sampler, run: dict[str, Any]
    ) -> Measurement:
        trace = sampler.trace(counted.windows_ns[0][0])
        stats = counted.stats
        return Measurement(
            **self._common,
            **run,
            backend=f"native {counted.loaded['isa']}",
            threads=counted.loaded["threads"],
            pinning=self.cpus,
            n_prompt=test.n_prompt,
            n_gen=test.n_gen,
            n_depth=test.n_depth,
            context=test.context,
            workload=test.workload,
            samples_ns=tuple(counted.samples_ns),
            prefill_ns=tuple(counted.prefill_ns),
            step_ns=tuple(counted.step_ns),
            load_ns=max(1, round(counted.loaded["load_ms"] * 1e6)),
            base_rss_bytes=counted.base_rss_bytes,
            peak_rss_bytes=stats["peak_rss_bytes"],
            rss_anon_bytes=stats["rss_anon_bytes"],
            rss_file_bytes=stats["rss_file_bytes"],
            pss_bytes=counted.pss_bytes or stats["pss_bytes"] or None,
            pss_file_bytes=stats["pss_file_bytes"] or None,
            cpu_ns=counted.cpu_ns,
            major_faults=counted.major_faults,
            operator_ns=counted.operator_ns,
            energy=self._energy(counted, sampler),
            trace=trace,
            throttled=throttled(counted.step_ns or counted.samples_ns, trace, counted.reasons),
            bytes_per_token=counted.loaded["bytes_per_token"],
            macs_per_token=counted.loaded["macs_per_token"],
            limits=counted.limits,
        )


def total_pss(text: str) -> int | None:
    """Bytes, of ``dumpsys meminfo PID``; its figures are KiB, under TOTAL in a column or a row."""
    match = re.search(r"^\s*TOTAL(?: PSS:)?\s+(\d+)", text, re.MULTILINE)
    return int(match[1]) * 1024 if match else None


def repeat(runner: RunnerProcess, test: Test) -> dict[str, Any]:
    """One repetition from an empty cache."""
    tokens = {"tokens": test.ids} if test.n_prompt or test.n_depth else {"prompt_tokens": 0}
    return runner.ask("bench", new_tokens=test.n_gen, repeats=1, **tokens)
