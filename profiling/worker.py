"""The worker process: one job, timed one repetition at a time.

Protocol, in JSON lines: the parent writes a Job; the worker loads, warms up and answers
``{"backend", "load_ns", "base_rss_bytes"}``; to each further line of the parent it answers with
one repetition, ``{"sample_ns", "step_ns", "peak_rss_bytes", ...}``; end of input ends it. In place
of any answer ``{"error", "message"}`` may come: the name and text of a pocketslm error.
"""

from __future__ import annotations

import json
import os
import sys
from dataclasses import asdict
from itertools import pairwise
from time import perf_counter_ns
from typing import IO, Any

from pocketslm.errors import PocketSlmError
from pocketslm.profiling.engine import Engine, Job
from pocketslm.profiling.memory import memory
from pocketslm.profiling.peers import runtime_named


def serve(requests: IO[str], answers: IO[str]) -> None:
    """Answer until the requests end."""
    try:
        job = Job(**json.loads(next(requests)))
        engine, loaded = load(job)
        repeat(engine, job)  # warm-up: first touches of memory, not counted
        _write(answers, loaded)
        for _ in requests:
            sample_ns, step_ns = repeat(engine, job)
            _write(answers, {"sample_ns": sample_ns, "step_ns": step_ns} | asdict(memory()))
    except PocketSlmError as error:
        _write(answers, {"error": type(error).__name__, "message": str(error)})


def load(job: Job) -> tuple[Engine, dict[str, Any]]:
    """Open the job's engine, and say what that took."""
    runtime = runtime_named(job.runtime)
    runtime.import_library(job)
    base = memory().peak_rss_bytes
    start = perf_counter_ns()
    engine = runtime.open(job)
    load_ns = perf_counter_ns() - start
    return engine, {"backend": engine.backend, "load_ns": load_ns, "base_rss_bytes": base}


def repeat(engine: Engine, job: Job) -> tuple[int, list[int]]:
    """Time one repetition from an empty cache: nanoseconds in all, and of each decode step."""
    engine.reset()
    if job.n_prompt:
        start = perf_counter_ns()
        engine.prefill(job.ids)
        return perf_counter_ns() - start, []
    if job.n_depth:
        engine.prefill(job.ids)
    marks = [perf_counter_ns()]
    if not job.n_depth:  # nothing precedes: the first step is that of the first token
        engine.prefill(job.ids)
        marks.append(perf_counter_ns())
    while len(marks) <= job.n_gen:
        engine.step()
        marks.append(perf_counter_ns())
    steps = [after - before for before, after in pairwise(marks)]
    return marks[-1] - marks[0], steps


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
