"""The time of a repetition by operator, as the runtime itself counts it."""

from __future__ import annotations

import json
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from pocketslm.profiling.engine import Engine, Job, SessionEngine, engine_over
from pocketslm.profiling.records import OURS
from pocketslm.runtime.backends import open_session
from pocketslm.runtime.bundle import Bundle, Graph, open_bundle


@dataclass(frozen=True)
class Profiled:
    """An engine that measures operators. ``start`` begins; ``read`` returns nanoseconds by
    operator, once.
    """

    engine: Engine
    start: Callable[[], None]
    read: Callable[[], dict[str, int]]


@contextmanager
def open_profiled(job: Job) -> Iterator[Profiled | None]:
    """Open a second session of the job; None if the runtime does not measure operators."""
    if job.runtime != OURS or job.backend == "runner":
        yield None
        return
    bundle = open_bundle(job.artefact, verify=False)
    graph = bundle.graph(job.backend)
    if graph.backend == "native":
        yield _native(bundle, job)
    elif graph.backend.startswith("onnx"):
        with TemporaryDirectory() as folder:
            yield _onnx(bundle, graph, job, folder)
    else:
        yield _executorch(bundle, graph, job)


def _native(bundle: Bundle, job: Job) -> Profiled:
    """The operators' own clock."""
    from pocketslm.runtime.backends.native import NativeSession

    session = open_session(bundle, "native", job.threads, job.context, job.parallel)
    assert isinstance(session, NativeSession)

    def read() -> dict[str, int]:
        times = asdict(session.times())
        return {name.removesuffix("_ns"): ns for name, ns in times.items() if name.endswith("_ns")}

    engine = engine_over(session, job, generates=bundle.generates)
    return Profiled(engine, session.profile, read)


def _onnx(bundle: Bundle, graph: Graph, job: Job, folder: str) -> Profiled:
    """onnxruntime's profile, by type of operator."""
    from pocketslm.runtime.backends.onnx import OnnxSession

    session = OnnxSession(bundle, graph, job.threads, job.context, f"{folder}/profile")
    # It reads one of two clocks of the system, depending on the C++ library it was built with.
    began = session.profile_start_ns
    clock = min((time.time_ns, time.monotonic_ns), key=lambda one: abs(one() - began))
    started: list[int] = []

    def start() -> None:
        started.append(clock() - began)

    def read() -> dict[str, int]:
        events = json.loads(Path(session.end_profile()).read_text("utf-8"))
        return sum_events(events, started[-1])

    return Profiled(SessionEngine(session, generates=bundle.generates), start, read)


def _executorch(bundle: Bundle, graph: Graph, job: Job) -> Profiled:
    """Load kernels that time the ones they replace. The rest of the time belongs to the delegate.

    ExecuTorch's wheels are built without its event tracer, so there is no ETDump to ask.
    """
    from pocketslm.runtime.backends import executorch

    session = executorch.open_session(bundle, graph, job.threads, job.context, timed=True)
    began: list[tuple[int, dict[str, tuple[int, int]]]] = []

    def start() -> None:
        began.append((time.perf_counter_ns(), executorch.operator_times()))

    def read() -> dict[str, int]:
        begin, before = began[-1]
        taken = time.perf_counter_ns() - begin
        after = executorch.operator_times()
        times = {name: ns - before.get(name, (0, 0))[1] for name, (_, ns) in after.items()}
        return times | {"delegate": taken - sum(times.values())}

    return Profiled(SessionEngine(session, generates=bundle.generates), start, read)


def sum_events(events: list[dict[str, Any]], after_ns: int) -> dict[str, int]:
    """Add up onnxruntime's profile, whose times are microseconds since its beginning."""
    found: Counter[str] = Counter()
    for event in events:
        kernel = event["cat"] == "Node" and event["name"].endswith("_kernel_time")
        if kernel and event["ts"] * 1000 >= after_ns:
            found[event["args"]["op_name"]] += event["dur"] * 1000
    return dict(found.most_common())
