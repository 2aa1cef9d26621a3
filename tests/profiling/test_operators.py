"""Time by operator: what the clocks tell belongs to the timed part, and to nothing else."""

from __future__ import annotations

import time
from importlib.util import find_spec
from pathlib import Path

import pytest

import support
from pocketslm.export.pipeline import export_bundle
from pocketslm.export.recipe import Recipe
from pocketslm.models.checkpoint import open_checkpoint
from pocketslm.profiling.engine import Job
from pocketslm.profiling.operators import open_profiled, sum_events
from pocketslm.profiling.process import Worker
from pocketslm.profiling.worker import repeat

EXECUTORCH = find_spec("executorch") is not None
TARGETS = ("native", "onnx", "executorch") if EXECUTORCH else ("native", "onnx")
EXPECTED = {
    "native": {"embedding", "qkv", "attention", "output", "gate_up", "down", "head"},
    "onnx": {"MatMulNBits", "GroupQueryAttention"},
    "executorch": {"llama::custom_sdpa.out", "llama::update_cache.out", "delegate"},
}


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("operators")
    source = open_checkpoint(support.write_hf(folder / "hf"))
    export_bundle(source, folder / "bundle", Recipe(targets=TARGETS))
    return folder / "bundle"


def job(bundle: Path, backend: str, **changes: object) -> Job:
    fields: dict[str, object] = {
        "runtime": "pocketslm",
        "artefact": str(bundle),
        "backend": backend,
        "threads": 1,
        "context": 16,
        "n_prompt": 0,
        "n_gen": 3,
        "n_depth": 8,
        "ids": list(range(8)),
    }
    return Job(**(fields | changes))  # type: ignore[arg-type]


@pytest.mark.parametrize("backend", TARGETS)
def test_a_worker_tells(bundle: Path, backend: str) -> None:
    with Worker(job(bundle, backend), 60.0) as worker:
        worker.load()
        times = worker.operators().operator_ns
        assert worker.run().sample_ns > 0
    assert times is not None
    assert all(times[name] > 0 for name in EXPECTED[backend])


def test_only_the_timed_part_counts(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of three steps after eight tokens, and the same warm-up, three calls of each layer."""
    seen: list[int] = []

    def count(events: list[dict[str, object]], after_ns: int) -> dict[str, int]:
        for event in events:
            event["dur"] = 1
        counted = sum_events(events, after_ns)
        seen.append(counted["GroupQueryAttention"] // 1000)
        seen.append(sum_events(events, -(10**18))["GroupQueryAttention"] // 1000)
        return counted

    monkeypatch.setattr("pocketslm.profiling.operators.sum_events", count)
    asked = job(bundle, "onnx")
    with open_profiled(asked) as profiled:
        assert profiled is not None
        repeat(profiled.engine, asked)
        repeat(profiled.engine, asked, profiled.start)
        profiled.read()
    layers = support.TINY.num_hidden_layers
    assert seen == [3 * layers, 8 * layers]


@pytest.mark.skipif(not EXECUTORCH, reason="executorch is not installed")
def test_executorch_s_operators_are_timed_within_the_step(bundle: Path) -> None:
    """Every call outside the delegate, of a prompt and three steps; the time of the steps."""
    from pocketslm.profiling.delegate import operators_outside
    from pocketslm.runtime.backends.executorch import operator_times

    asked = job(bundle, "executorch")
    with open_profiled(asked) as profiled:
        assert profiled is not None
        assert not operator_times()
        begin = time.perf_counter_ns()
        repeat(profiled.engine, asked, profiled.start)
        times = profiled.read()
        assert 0 < sum(times.values()) < time.perf_counter_ns() - begin
        all_of_it = operator_times()
    calls = operators_outside(bundle / "model.pte")
    made = {name: count for name, (count, _) in all_of_it.items()}
    assert made == {name: 4 * count for name, count in calls.items()}
    assert times.keys() == {*calls, "delegate"}
    assert all(0 < times[name] < ns for name, (_, ns) in all_of_it.items())


def test_a_peer_tells_nothing(bundle: Path) -> None:
    with open_profiled(job(bundle, "", runtime="llama.cpp")) as profiled:
        assert profiled is None
