"""The one loop that times every runtime: what it runs, in which order, and what it answers."""

from __future__ import annotations

import io
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from pocketslm.errors import BackendError
from pocketslm.profiling import worker
from pocketslm.profiling.engine import Job


class Recorder:
    """An engine that notes what is asked of it; also the runtime that opens it."""

    backend = "recorder"

    def __init__(self) -> None:
        self.calls: list[Any] = []

    def import_library(self, job: Job) -> None:
        self.calls.append("import")

    def open(self, job: Job) -> Recorder:
        self.calls.append("open")
        return self

    def reset(self) -> None:
        self.calls.append("reset")

    def prefill(self, ids: list[int]) -> int:
        self.calls.append(ids)
        return 0

    def step(self) -> int:
        self.calls.append("step")
        return 0


def job(n_prompt: int = 0, n_gen: int = 0, n_depth: int = 0) -> Job:
    ids = list(range(n_prompt or n_depth or 1))
    return Job("pocketslm", "bundle", "auto", 1, 8, n_prompt, n_gen, n_depth, ids)


def test_prompt_is_one_call() -> None:
    engine = Recorder()
    times = worker.repeat(engine, job(n_prompt=3))
    assert engine.calls == ["reset", [0, 1, 2]]
    assert times.sample_ns > 0
    assert times.step_ns == []


def test_generation_after_a_prompt() -> None:
    engine = Recorder()
    times = worker.repeat(engine, job(n_gen=3, n_depth=2))
    assert engine.calls == ["reset", [0, 1], "step", "step", "step"]
    assert len(times.step_ns) == 3
    assert sum(times.step_ns) == times.sample_ns


def test_generation_from_nothing_runs_as_many_tokens() -> None:
    engine = Recorder()
    times = worker.repeat(engine, job(n_gen=3))
    assert engine.calls == ["reset", [0], "step", "step"]
    assert len(times.step_ns) == 3
    assert sum(times.step_ns) == times.sample_ns


def serve(requests: list[str]) -> list[dict[str, Any]]:
    answers = io.StringIO()
    worker.serve(iter(requests), answers)  # type: ignore[arg-type]
    return [json.loads(line) for line in answers.getvalue().splitlines()]


def test_a_prompt_with_tokens_after_it_is_timed_in_parts() -> None:
    engine = Recorder()
    times = worker.repeat(engine, job(n_prompt=3, n_gen=2))
    assert engine.calls == ["reset", [0, 1, 2], "step", "step"]
    assert times.prefill_ns is not None
    assert len(times.step_ns) == 2
    assert times.prefill_ns + sum(times.step_ns) == times.sample_ns


def test_serve(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = Recorder()
    monkeypatch.setattr(worker, "runtime_named", lambda name: engine)
    loaded, *samples = serve([json.dumps(job(n_prompt=1).to_dict()), "run", "run"])
    assert engine.calls == ["import", "open", *["reset", [0]] * 3]  # the first is the warm-up
    assert loaded["backend"] == "recorder"
    assert loaded["load_ns"] > 0
    assert len(samples) == 2
    for sample in samples:
        assert sample["sample_ns"] > 0
        assert sample["peak_rss_bytes"] >= loaded["base_rss_bytes"]


def test_errors_are_answered(monkeypatch: pytest.MonkeyPatch) -> None:
    class Broken(Recorder):
        def prefill(self, ids: list[int]) -> int:
            raise BackendError("no such kernel")

    monkeypatch.setattr(worker, "runtime_named", lambda name: Broken())
    answers = serve([json.dumps(job(n_prompt=1).to_dict())])
    assert answers == [{"error": "BackendError", "message": "no such kernel"}]


def test_prints_of_libraries_stay_out_of_the_protocol() -> None:
    code = """
import os, sys
from pocketslm.profiling import worker
def serve(requests, answers):
    print("from python", flush=True)
    os.write(1, b"from a library")
    answers.write("answer")
worker.serve = serve
worker.main()
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "answer"
    assert "from python" in done.stderr
    assert "from a library" in done.stderr


def test_a_worker_of_ours_is_small(tiny_bundle: Path) -> None:
    """Its memory is what is measured, so it holds nothing that the runtime does not need."""
    job = Job("pocketslm", str(tiny_bundle), "native", 1, 32, 8, 4, 8, list(range(8)))
    code = """
import sys
from pathlib import Path
from pocketslm.profiling import worker
worker.main()
heavy = {"numpy", "hashlib", "subprocess", "tempfile", "csv", "pocketslm.profiling.peers"}
print(sorted(heavy & set(sys.modules)), "pocketslm.runtime.backends.native" in sys.modules)
"""
    done = subprocess.run(
        [sys.executable, "-c", code],
        input=json.dumps(job.to_dict()) + "\nrun\n",
        capture_output=True,
        text=True,
        check=True,
    )
    *answers, loaded = [*done.stdout.splitlines(), done.stderr.strip()]
    assert all("error" not in json.loads(answer) for answer in answers)
    assert loaded == "[] True"


def test_importing_stays_light() -> None:
    code = """
import sys
from pathlib import Path
import pocketslm.profiling.bench, pocketslm.profiling.tables, pocketslm.profiling.worker
heavy = {"torch", "transformers", "onnxruntime", "onnxruntime_genai", "llama_cpp", "executorch"}
print(sorted(heavy & set(sys.modules)))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"
