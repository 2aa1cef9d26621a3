"""Benchmarks in llama-bench's manner: prompt and generation speed, memory and load time.

Each test of each runtime runs in a process of its own, so that its peak memory is its own. With
peers, the processes of one test are loaded side by side and take turns, repetition by repetition.
If the machine slows down or speeds up, it does so for all of them.
"""

from __future__ import annotations

import hashlib
import json
import time
import uuid
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from functools import cache
from pathlib import Path
from typing import Any

from pocketslm import __version__
from pocketslm.errors import BackendError, BundleError, UsageError
from pocketslm.profiling.cost import Cost
from pocketslm.profiling.engine import Job, Peer, PocketSlm, Runtime
from pocketslm.profiling.machine import limits, software, this_machine
from pocketslm.profiling.peers import choose_peers
from pocketslm.profiling.plan import Test, at_least, plan
from pocketslm.profiling.process import Loaded, Sample, Worker
from pocketslm.profiling.records import Measurement, append_records
from pocketslm.runtime.backends import usable_cores
from pocketslm.runtime.bundle import GENAI_CONFIG, MANIFEST, Bundle, open_bundle

Progress = Callable[[str, float], None]
Say = Callable[[str], None]

TIMEOUT_S = 600.0
# Pause before each repetition: the other processes' threads spin for some 20 ms after their work.
SETTLE_S = 0.1


def bench(
    *bundles: str | Path,
    n_prompt: Sequence[int] = (512,),
    n_gen: Sequence[int] = (128,),
    n_depth: Sequence[int] | None = None,
    n_both: Sequence[tuple[int, int]] = (),
    tests: Sequence[Test] | None = None,
    repetitions: int = 5,
    runs: int = 1,
    threads: Sequence[int] = (),
    backends: Sequence[str] = ("auto",),
    cold: bool = False,
    operators: bool = False,
    context: int | None = None,
    parallel: Sequence[int] = (),
    peers: Sequence[str] = (),
    source: Path | None = None,
    timeout_s: float = TIMEOUT_S,
    record: Path | None = None,
    say: Say = lambda message: None,
    progress: Progress = lambda step, fraction: None,
) -> list[Measurement]:
    """Measure bundles and then peers, for each test and number of threads.

    - ``n_prompt``, ``n_gen``: lengths to test. An empty one leaves that kind of test out.
    - ``n_depth``: tokens in the cache before generation. The default is the longest prompt tested,
      or none.
    - ``n_both``: prompts with generation after them.
    - ``tests``: replaces the four above.
    - ``repetitions``: counted repetitions, after a first one that is not counted.
    - ``runs``: repeat everything so often, each time in new processes.
    - ``threads``: empty takes every core that this process may use.
    - ``cold``: drop each artefact from the page cache before loading it.
    - ``operators``: add one repetition, not counted, that measures the time of each operator.
    - ``context``: a KV cache larger than the tests need.
    - ``parallel``: generate so many texts at once, for each test of generation besides that of one
      text. Native backend only.
    - ``peers``: ``NAME`` or ``NAME=ARTEFACT``, or "all" for those that can run here. Without an
      artefact, one is made from ``source``.
    - ``source``: the checkpoint from which the first bundle was exported.
    - ``timeout_s``: for one repetition, or for loading and the warm-up.
    - ``record``: a file to which each row is appended as soon as it is measured.
    - ``say``: called with each peer that "all" skips, and the reason.
    - ``progress``: called with the present step and the fraction done.

    Every runtime gets the same token ids. Raises UsageError, BundleError, BackendError,
    CheckpointError.
    """
    opened = [open_bundle(path, verify=False) for path in bundles]
    for path, bundle in zip(bundles, opened, strict=True):
        if bundle.path != Path(path):
            raise UsageError(f"{path} is a single file; measure it as --peer executorch={path}")
    if encoders := [bundle.name for bundle in opened if not bundle.generates]:
        if n_both or tests is not None or peers:
            raise UsageError(
                f"{encoders[0]} gives embeddings: only prompts (-p) are measured of it, without "
                "peers"
            )
        if n_gen:
            say(f"{encoders[0]} gives embeddings: only prompts are measured")
        n_gen, n_depth = (), ()
    if parallel and (peers or tests is not None):
        raise UsageError("several texts at once are measured of random tokens and without peers")
    if tests is None:
        tests = plan(
            min(map(_vocab_size, opened)),
            n_prompt=n_prompt,
            n_gen=n_gen,
            n_depth=n_depth,
            n_both=n_both,
            context=context,
            parallel=parallel,
        )
    threads = tuple(threads) or (usable_cores(),)
    at_least("threads", 1, threads)
    at_least("repetitions", 1, [repetitions])
    at_least("runs", 1, [runs])
    if not timeout_s > 0:
        raise UsageError(f"timeout is {timeout_s}, expected seconds above 0")
    if record is not None:
        append_records(record, ())  # fail before measuring if it cannot be written
    contenders = [_ours(bundle, backend) for bundle in opened for backend in backends]
    contenders += _prepare_peers(peers, source, opened[0], say, progress)
    session = _Session(
        repetitions, timeout_s, cold, operators, progress, groups=len(tests) * len(threads) * runs
    )
    rows = []
    for _ in range(runs):
        session.start_run()
        for count in threads:
            for test in tests:
                measured = session.measure(contenders, test, count)
                rows += measured
                if record is not None:
                    append_records(record, measured)
    return rows


@dataclass(frozen=True)
class _Contender:
    """A runtime with its artefact. Fields are as in Measurement, ``backend`` as in Job."""

    runtime: Runtime
    path: Path
    model: str
    sha256: str
    size_bytes: int
    backend: str = "auto"
    quality: dict[str, Any] | None = None
    cost: Cost | None = None
    bytes_per_token: int | None = None


class _Session:
    """The rows of one call of :func:`bench`."""

    def __init__(
        self,
        repetitions: int,
        timeout_s: float,
        cold: bool,
        operators: bool,
        progress: Progress,
        *,
        groups: int,
    ) -> None:
        self._repetitions, self._timeout_s, self._cold = repetitions, timeout_s, cold
        self._operators = operators
        self._progress, self._groups, self._done = progress, groups, 0
        self._limits = cache(limits)
        self._common: dict[str, Any] = {
            "pocketslm": __version__,
            "machine": this_machine(),
            "software": software(),
            "cold": cold,
        }

    def start_run(self) -> None:
        """Begin a new run."""
        now = datetime.now(UTC).isoformat(timespec="seconds")
        self._common |= {"run": uuid.uuid4().hex, "started": now}

    def measure(self, contenders: list[_Contender], test: Test, threads: int) -> list[Measurement]:
        """One test of every contender, in turns."""
        name = test.name
        ceiling = self._limits(threads, contenders[0].bytes_per_token)
        with ExitStack() as stack:
            workers, loads = [], []
            for contender in contenders:
                self._progress(f"{name}: load {contender.runtime.name}", self._done / self._groups)
                job = self._job(contender, test, threads)
                worker = stack.enter_context(Worker(job, self._timeout_s))
                loads.append(worker.load())
                workers.append(worker)
            samples: list[list[Sample]] = [[] for _ in workers]
            for turn in range(self._repetitions):
                self._progress(name, (self._done + turn / self._repetitions) / self._groups)
                order = range(len(workers))
                # There and back, so that a steady drift favours none.
                for index in order if turn % 2 == 0 else reversed(order):
                    time.sleep(SETTLE_S)
                    samples[index].append(workers[index].run())
            spent = [
                worker.operators().operator_ns if self._operators else None for worker in workers
            ]
        self._done += 1
        self._progress(name, self._done / self._groups)
        return [
            replace(
                self._row(contender, test, threads, loaded, taken),
                limits=ceiling,
                operator_ns=operator_ns,
            )
            for contender, loaded, taken, operator_ns in zip(
                contenders, loads, samples, spent, strict=True
            )
        ]

    def _job(self, contender: _Contender, test: Test, threads: int) -> Job:
        return Job(
            runtime=contender.runtime.name,
            artefact=str(contender.path),
            backend=contender.backend,
            threads=threads,
            context=test.context,
            n_prompt=test.n_prompt,
            n_gen=test.n_gen,
            n_depth=test.n_depth,
            ids=test.ids,
            cold=self._cold,
            parallel=test.parallel,
        )

    def _row(
        self,
        contender: _Contender,
        test: Test,
        threads: int,
        loaded: Loaded,
        samples: list[Sample],
    ) -> Measurement:
        return Measurement(
            **self._common,
            model=contender.model,
            artefact=contender.path.resolve().name,
            artefact_sha256=contender.sha256,
            size_bytes=contender.size_bytes,
            runtime=contender.runtime.name,
            runtime_version=contender.runtime.version(),
            backend=loaded.backend,
            threads=threads,
            n_prompt=test.n_prompt,
            n_gen=test.n_gen,
            n_depth=test.n_depth,
            context=test.context,
            parallel=test.parallel,
            workload=test.workload,
            samples_ns=tuple(sample.sample_ns for sample in samples),
            prefill_ns=tuple(s.prefill_ns for s in samples if s.prefill_ns is not None),
            step_ns=tuple(step for sample in samples for step in sample.step_ns),
            load_ns=loaded.load_ns,
            base_rss_bytes=loaded.base_rss_bytes,
            peak_rss_bytes=max(sample.peak_rss_bytes for sample in samples),
            rss_anon_bytes=samples[-1].rss_anon_bytes,
            rss_file_bytes=samples[-1].rss_file_bytes,
            pss_bytes=samples[-1].pss_bytes,
            pss_file_bytes=samples[-1].pss_file_bytes,
            cpu_ns=sum(sample.cpu_ns for sample in samples),
            major_faults=sum(sample.major_faults for sample in samples),
            bytes_per_token=contender.bytes_per_token,
            macs_per_token=contender.cost.layer_macs if contender.cost else None,
            head_macs=contender.cost.head_macs if contender.cost else None,
            quality=contender.quality,
        )


def _vocab_size(bundle: Bundle) -> int:
    if bundle.config is not None:
        return bundle.config.vocab_size
    config = json.loads((bundle.path / GENAI_CONFIG).read_text(encoding="utf-8"))
    size = config["model"].get("vocab_size")
    if not isinstance(size, int) or size < 1:
        raise BundleError(f"{bundle.path} does not say its vocabulary's size: {size!r}")
    return size


def _ours(bundle: Bundle, backend: str) -> _Contender:
    manifest = bundle.manifest
    ours = _Contender(
        PocketSlm(),
        bundle.path,
        bundle.name,
        _sha256(bundle.path),
        bundle.graph_bytes(bundle.graph(backend)),
        backend,
    )
    if manifest is None or bundle.config is None:
        return ours
    cost = Cost.of(bundle.config)
    weights = sum(manifest.weights.values())
    return replace(
        ours,
        quality=manifest.quality,
        cost=cost,
        bytes_per_token=round(weights * cost.read_share),
    )


def _prepare_peers(
    peers: Sequence[str],
    source: Path | None,
    bundle: Bundle,
    say: Say,
    progress: Progress,
) -> list[_Contender]:
    wanted = choose_peers(peers)
    for peer, path, _ in wanted:
        if path is not None and not path.exists():
            raise UsageError(f"{path} does not exist, expected {peer.artefact} for {peer.name}")
    ready = []
    for peer, path, may_lack in wanted:
        try:
            if reason := peer.available():
                raise BackendError(reason)
            path = path or _artefact(peer, source, bundle, progress)
        except (BackendError, UsageError) as error:
            if not may_lack:
                raise
            say(f"left out {peer.name}: {error}")
            continue
        ready.append(_peer(peer, path, bundle))
    return ready


def _peer(peer: Peer, path: Path, bundle: Bundle) -> _Contender:
    cost = None if bundle.config is None else Cost.of(bundle.config)
    return _Contender(peer, path, bundle.name, _sha256(path), _size(path), cost=cost)


def _artefact(peer: Peer, source: Path | None, bundle: Bundle, progress: Progress) -> Path:
    """Make a peer's artefact from the checkpoint."""
    if source is None:
        raise UsageError(
            f"peer {peer.name} has nothing to run; give --source CHECKPOINT, or its own "
            f"artefact as --peer {peer.name}=PATH ({peer.artefact})"
        )
    progress(f"prepare {peer.name}", 0.0)
    return peer.prepare(source, _cache(_checked_source(source, bundle)))


def _checked_source(source: Path, bundle: Bundle) -> str:
    """The SHA-256 of the checkpoint, from which the bundle must have been made."""
    from pocketslm.models.checkpoint import checkpoint_sha256, open_checkpoint

    found = checkpoint_sha256(open_checkpoint(source))
    expected = bundle.manifest.source.get("sha256") if bundle.manifest else found
    if found != expected:
        raise UsageError(
            f"{source} (SHA-256 {found[:12]}) is not what {bundle.path} was exported from "
            f"({str(expected)[:12]}); give that checkpoint, or the peer's own artefact as "
            "--peer NAME=PATH to compare different ones on purpose"
        )
    return found


def _cache(source_sha256: str) -> Path:
    from pocketslm.cache import cache_dir

    return cache_dir() / "peers" / source_sha256


def _files(path: Path) -> list[Path]:
    return sorted(p for p in path.rglob("*") if p.is_file()) if path.is_dir() else [path]


def _size(path: Path) -> int:
    return sum(file.stat().st_size for file in _files(path))


def _sha256(path: Path) -> str:
    """The digest of a bundle's manifest, which holds the digests of its files; otherwise the digest
    of the files in the order of their names.
    """
    files = [path / MANIFEST] if (path / MANIFEST).exists() else _files(path)
    digest = hashlib.sha256()
    for file in files:
        with file.open("rb") as opened:
            while chunk := opened.read(1 << 20):
                digest.update(chunk)
    return digest.hexdigest()
