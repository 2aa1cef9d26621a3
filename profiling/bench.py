"""Benchmarks in llama-bench's manner: prompt and generation speed, memory and load time.

Each test of each runtime has a process of its own, so that its peak memory is its own. With peers,
the processes of one test are loaded side by side and take turns repetition by repetition: a
machine that slows down or speeds up meanwhile does so for all of them.
"""

from __future__ import annotations

import hashlib
import json
import time
import uuid
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np

from pocketslm import __version__
from pocketslm.errors import BackendError, BundleError, UsageError
from pocketslm.profiling.engine import Job, PocketSlm, Runtime
from pocketslm.profiling.machine import software, this_machine
from pocketslm.profiling.peers import parse_peer
from pocketslm.profiling.process import Loaded, Sample, Worker
from pocketslm.profiling.records import Measurement, append_records
from pocketslm.runtime.backends import usable_cores
from pocketslm.runtime.bundle import GENAI_CONFIG, MANIFEST, Bundle, open_bundle

Progress = Callable[[str, float], None]

SEED = 0
TIMEOUT_S = 600.0
# Before each repetition: the others' threads spin for some 20 ms after their work, then park.
SETTLE_S = 0.1


def bench(
    path: str | Path,
    *,
    n_prompt: Sequence[int] = (512,),
    n_gen: Sequence[int] = (128,),
    n_depth: int | None = None,
    repetitions: int = 5,
    threads: Sequence[int] = (),
    backend: str = "auto",
    context: int | None = None,
    peers: Sequence[str] = (),
    source: Path | None = None,
    timeout_s: float = TIMEOUT_S,
    record: Path | None = None,
    progress: Progress = lambda step, fraction: None,
) -> list[Measurement]:
    """Measure a bundle and, beside it, peers: ours first for each test and number of threads.

    n_prompt, n_gen: lengths to test; an empty one leaves that kind of test out. n_depth: tokens in
    the cache before generation, by default the longest prompt tested, else none. repetitions:
    counted ones, after one that is not. threads: empty takes every core that this process may use.
    context: a KV cache larger than the tests need. peers: ``NAME`` or ``NAME=ARTEFACT``; without
    an artefact it is made of ``source``, the checkpoint that the bundle was exported from.
    timeout_s: for one repetition, or for loading and the warm-up. record: a file that rows are
    appended to as soon as they are measured. progress is called with what is
    being done and the fraction of all that is done.

    Every runtime gets the same random token ids (seed 0). Raises UsageError, BundleError,
    BackendError, CheckpointError.
    """
    bundle = open_bundle(path, verify=False)
    tests = _plan(n_prompt, n_gen, n_depth, bundle, context)
    threads = tuple(threads) or (usable_cores(),)
    _at_least("threads", 1, *threads)
    _at_least("repetitions", 1, repetitions)
    if not timeout_s > 0:
        raise UsageError(f"timeout is {timeout_s}, expected seconds above 0")
    contenders = [_ours(bundle, backend), *_prepare_peers(peers, source, bundle, progress)]
    session = _Session(backend, repetitions, timeout_s, progress, len(tests) * len(threads))
    if record is not None:
        append_records(record, ())  # where it cannot be written, say so before measuring
    rows = []
    for count in threads:
        for test in tests:
            measured = session.measure(contenders, test, count)
            rows += measured
            if record is not None:
                append_records(record, measured)
    return rows


@dataclass(frozen=True)
class _Test:
    """Fields as in Measurement; ids: see Job."""

    n_prompt: int
    n_gen: int
    n_depth: int
    context: int
    ids: list[int]


@dataclass(frozen=True)
class _Contender:
    """A runtime with what it runs."""

    runtime: Runtime
    path: Path
    model: str
    sha256: str
    size_bytes: int
    quality: dict[str, Any] | None = None


class _Session:
    """The rows of one call of :func:`bench`."""

    def __init__(
        self, backend: str, repetitions: int, timeout_s: float, progress: Progress, groups: int
    ) -> None:
        self._backend, self._repetitions, self._timeout_s = backend, repetitions, timeout_s
        self._progress, self._groups, self._done = progress, groups, 0
        self._common: dict[str, Any] = {
            "run": uuid.uuid4().hex,
            "started": datetime.now(UTC).isoformat(timespec="seconds"),
            "pocketslm": __version__,
            "machine": this_machine(),
            "software": software(),
        }

    def measure(self, contenders: list[_Contender], test: _Test, threads: int) -> list[Measurement]:
        """One test of every contender, in turns."""
        name = f"pp{test.n_prompt}" if test.n_prompt else f"tg{test.n_gen}"
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
        self._done += 1
        self._progress(name, self._done / self._groups)
        return [
            self._row(contender, test, threads, loaded, taken)
            for contender, loaded, taken in zip(contenders, loads, samples, strict=True)
        ]

    def _job(self, contender: _Contender, test: _Test, threads: int) -> Job:
        return Job(
            runtime=contender.runtime.name,
            artefact=str(contender.path),
            backend=self._backend,
            threads=threads,
            context=test.context,
            n_prompt=test.n_prompt,
            n_gen=test.n_gen,
            n_depth=test.n_depth,
            ids=test.ids,
        )

    def _row(
        self,
        contender: _Contender,
        test: _Test,
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
            samples_ns=tuple(sample.sample_ns for sample in samples),
            step_ns=tuple(step for sample in samples for step in sample.step_ns),
            load_ns=loaded.load_ns,
            base_rss_bytes=loaded.base_rss_bytes,
            peak_rss_bytes=max(sample.peak_rss_bytes for sample in samples),
            rss_anon_bytes=samples[-1].rss_anon_bytes,
            rss_file_bytes=samples[-1].rss_file_bytes,
            quality=contender.quality,
        )


def _plan(
    n_prompt: Sequence[int],
    n_gen: Sequence[int],
    n_depth: int | None,
    bundle: Bundle,
    context: int | None,
) -> list[_Test]:
    """The tests, each with just the context that it needs unless one is given."""
    _at_least("n_prompt", 1, *n_prompt)
    _at_least("n_gen", 1, *n_gen)
    if not n_prompt and not n_gen:
        raise UsageError("neither n_prompt nor n_gen has a length, expected at least one test")
    depth = max(n_prompt, default=0) if n_depth is None else n_depth
    _at_least("n_depth", 0, depth)
    counts = [(n, 0, 0, n) for n in n_prompt] + [(0, n, depth, depth + n) for n in n_gen]
    for prompt, gen, _, needed in counts:
        if context is not None and needed > context:
            raise UsageError(
                f"context is {context} and {f'pp{prompt}' if prompt else f'tg{gen}'} needs "
                f"{needed} tokens; give a larger context or shorter lengths"
            )
    rng = np.random.default_rng(SEED)
    ids = rng.integers(0, _vocab_size(bundle), max(*n_prompt, depth, 1)).tolist()
    return [
        _Test(prompt, gen, deep, context or needed, ids[: prompt or deep or 1])
        for prompt, gen, deep, needed in counts
    ]


def _vocab_size(bundle: Bundle) -> int:
    if bundle.manifest:
        size = bundle.manifest.architecture.get("vocab_size")
    else:
        config = json.loads((bundle.path / GENAI_CONFIG).read_text(encoding="utf-8"))
        size = config["model"].get("vocab_size")
    if not isinstance(size, int) or size < 1:
        raise BundleError(f"{bundle.path} does not say its vocabulary's size: {size!r}")
    return size


def _ours(bundle: Bundle, backend: str) -> _Contender:
    manifest = bundle.manifest
    return _Contender(
        PocketSlm(),
        bundle.path,
        bundle.name,
        _sha256(bundle.path),
        bundle.graph_bytes(bundle.graph(backend)),
        manifest.quality if manifest else None,
    )


def _prepare_peers(
    peers: Sequence[str], source: Path | None, bundle: Bundle, progress: Progress
) -> list[_Contender]:
    wanted = [parse_peer(text) for text in peers]
    for peer, path in wanted:
        if reason := peer.available():
            raise BackendError(f"peer {peer.name}: {reason}")
        if path is not None and not path.exists():
            raise UsageError(f"{path} does not exist, expected {peer.artefact} for {peer.name}")
        if path is None and source is None:
            raise UsageError(
                f"peer {peer.name} has nothing to run; give --source CHECKPOINT, or its own "
                f"artefact as --peer {peer.name}=PATH ({peer.artefact})"
            )
    cache: Path | None = None
    ready = []
    for peer, path in wanted:
        if path is None:
            assert source is not None
            progress(f"prepare {peer.name}", 0.0)
            cache = cache or _cache(_checked_source(source, bundle))
            path = peer.prepare(source, cache)
        ready.append(_Contender(peer, path, bundle.name, _sha256(path), _size(path)))
    return ready


def _checked_source(source: Path, bundle: Bundle) -> str:
    """SHA-256 of the checkpoint, which must be the one that the bundle was made from."""
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
    """Of a bundle's manifest, which holds its files' own; else of the files, in name order."""
    files = [path / MANIFEST] if (path / MANIFEST).exists() else _files(path)
    digest = hashlib.sha256()
    for file in files:
        with file.open("rb") as opened:
            while chunk := opened.read(1 << 20):
                digest.update(chunk)
    return digest.hexdigest()


def _at_least(name: str, least: int, *values: int) -> None:
    for value in values:
        if value < least:
            raise UsageError(f"{name} is {value}, expected at least {least}")
