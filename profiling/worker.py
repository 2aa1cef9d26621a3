"""The worker process: one job, timed one repetition at a time.

The protocol is JSON lines. The parent writes a Job. The worker loads, warms up and answers
``{"backend", "load_ns", "base_rss_bytes"}``. It answers each further line with one repetition, the
fields of process.Sample. It answers the line "operators" with ``{"operator_ns"}``, the time of each
operator in one more repetition, or null if the runtime does not measure it. The end of input ends
the worker. Any answer may be ``{"error", "message"}`` instead: the name and text of a pocketslm
error.

A runtime's memory is measured here, so nothing is imported that it does not need.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from time import perf_counter_ns
from typing import IO, Any

from pocketslm.errors import BackendError, PocketSlmError
from pocketslm.profiling.engine import Engine, Job, runtime_named
from pocketslm.profiling.memory import memory, spent


def serve(requests: IO[str], answers: IO[str]) -> None:
    """Answer until the requests end."""
    try:
        job = Job(**json.loads(next(requests)))
        engine, loaded = load(job)
        repeat(engine, job)  # warm-up: first touches of memory, not counted
        _write(answers, loaded)
        for request in requests:
            if request.strip() == "operators":
                _write(answers, {"operator_ns": operator_ns(job)})
                continue
            before = spent()
            times = repeat(engine, job)
            used = spent() - before
            _write(answers, asdict(times) | asdict(memory()) | asdict(used))
    except PocketSlmError as error:
        _write(answers, {"error": type(error).__name__, "message": str(error)})


def load(job: Job) -> tuple[Engine, dict[str, Any]]:
    """Open the job's engine and measure that."""
    runtime = runtime_named(job.runtime)
    runtime.import_library(job)
    if job.cold:
        _drop_from_page_cache(Path(job.artefact))
    base = memory().peak_rss_bytes
    start = perf_counter_ns()
    engine = runtime.open(job)
    load_ns = perf_counter_ns() - start
    return engine, {"backend": engine.backend, "load_ns": load_ns, "base_rss_bytes": base}


@dataclass(frozen=True)
class Times:
    """Nanoseconds of one repetition. Fields are as in process.Sample."""

    sample_ns: int
    prefill_ns: int | None
    step_ns: list[int]


def operator_ns(job: Job) -> dict[str, int] | None:
    """Nanoseconds by operator of the timed part of one repetition, in a session of its own."""
    from pocketslm.profiling.operators import open_profiled

    with open_profiled(job) as profiled:
        if profiled is None:
            return None
        repeat(profiled.engine, job)  # as in serve
        repeat(profiled.engine, job, profiled.start)
        return profiled.read()


def repeat(engine: Engine, job: Job, begin: Callable[[], None] = lambda: None) -> Times:
    """Time one repetition from an empty cache; ``begin`` is called right before what is timed."""
    engine.reset()
    if job.n_depth:
        engine.prefill(job.ids)
    begin()
    marks = [perf_counter_ns()]
    if not job.n_depth:  # if generation starts from nothing, the first step runs the first token
        engine.prefill(job.ids)
        marks.append(perf_counter_ns())
    for _ in range(job.n_gen - (0 if job.n_prompt or job.n_depth else 1)):
        engine.step()
        marks.append(perf_counter_ns())
    laps = [after - before for before, after in pairwise(marks)]
    if job.n_prompt and job.n_gen:
        return Times(sum(laps), laps[0], laps[1:])
    return Times(sum(laps), None, laps if job.n_gen else [])


def _drop_from_page_cache(path: Path) -> None:
    """Drop a file, or the files of a folder. The system may keep pages that others have mapped."""
    if not hasattr(os, "posix_fadvise"):
        raise BackendError("this system cannot drop a file from its page cache; leave out --cold")
    for file in [path] if path.is_file() else [p for p in path.rglob("*") if p.is_file()]:
        with file.open("rb") as opened:
            os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def _write(answers: IO[str], answer: dict[str, Any]) -> None:
    answers.write(json.dumps(answer) + "\n")
    answers.flush()


def main() -> None:
    """Serve stdin; stdout is kept from the libraries, whose prints go to stderr."""
    with os.fdopen(os.dup(1), "w", encoding="utf-8") as answers:
        os.dup2(2, 1)
        serve(sys.stdin, answers)


if __name__ == "__main__":
    main()
