"""A benchmark from end to end on a tiny model, what it plans, and what it refuses."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any, Self

import pytest
from architectures import ROWS, write_folder

import support
from pocketslm.errors import BackendError, BundleError, UsageError
from pocketslm.export.pipeline import export_bundle
from pocketslm.export.recipe import Recipe
from pocketslm.models.checkpoint import open_checkpoint
from pocketslm.profiling import bench as module
from pocketslm.profiling.bench import bench
from pocketslm.profiling.engine import Job, runtime_named
from pocketslm.profiling.peers import PEERS, parse_peer
from pocketslm.profiling.process import Loaded, Sample
from pocketslm.profiling.records import Measurement, read_records
from pocketslm.profiling.tables import format_rows
from pocketslm.profiling.worker import repeat
from pocketslm.runtime.bundle import MANIFEST


class FakeWorker:
    """Takes the place of a process; notes jobs and turns."""

    jobs: list[Job]
    turns: list[str]

    def __init__(self, job: Job, timeout_s: float) -> None:
        self.job = job
        FakeWorker.jobs.append(job)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        FakeWorker.turns.append("end " + self.job.runtime)

    def load(self) -> Loaded:
        return Loaded("fake", 1_000_000, 10)

    def run(self) -> Sample:
        FakeWorker.turns.append(self.job.runtime)
        count = len([turn for turn in FakeWorker.turns if turn == self.job.runtime])
        # The peak is a middle repetition's, to see that it is kept.
        peak = 30 if count == 2 else 20
        prefill = 50 if self.job.n_prompt and self.job.n_gen else None
        return Sample(count * 100, [25] * self.job.n_gen, peak, prefill)


@pytest.fixture
def workers(monkeypatch: pytest.MonkeyPatch) -> type[FakeWorker]:
    FakeWorker.jobs, FakeWorker.turns = [], []
    monkeypatch.setattr(module, "Worker", FakeWorker)
    monkeypatch.setattr(module, "SETTLE_S", 0)
    return FakeWorker


@pytest.fixture
def anything_goes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every peer counts as installed."""
    monkeypatch.setattr("pocketslm.profiling.engine.find_spec", lambda name: object())


def test_end_to_end(tiny_bundle: Path, tmp_path: Path) -> None:
    steps = []
    record = tmp_path / "records.jsonl"
    rows = bench(
        tiny_bundle,
        n_prompt=(16, 130),
        n_gen=(4,),
        repetitions=2,
        threads=(1, 2),
        backends=("onnx",),
        record=record,
        progress=lambda step, fraction: steps.append((step, fraction)),
    )
    assert [(row.test, row.threads) for row in rows] == [
        (test, threads) for threads in (1, 2) for test in ("pp16", "pp130", "tg4 @ d130")
    ]
    for row in rows:
        assert row.runtime == "pocketslm"
        assert row.backend.startswith("onnxruntime ")
        assert row.artefact == tiny_bundle.name
        assert len(row.samples_ns) == 2
        assert row.base_rss_bytes is not None
        assert row.peak_rss_bytes is not None
        assert 1 << 20 < row.base_rss_bytes < row.peak_rss_bytes
        assert row.context == (row.n_prompt or 134)
        assert Measurement.from_json(row.to_json()) == row
    assert read_records(record) == rows
    assert len({row.run for row in rows}) == 1
    assert len(format_rows(rows).splitlines()) == 2 + len(rows)
    fractions = [fraction for _, fraction in steps]
    assert fractions == sorted(fractions)
    assert (fractions[0], fractions[-1]) == (0, 1)


def test_of_a_model_of_embeddings_prompts_are_measured(tmp_path: Path) -> None:
    folder, _ = write_folder(tmp_path / "model", ROWS["bert"])
    export_bundle(open_checkpoint(folder), tmp_path / "bundle", Recipe())
    said: list[str] = []
    rows = bench(
        tmp_path / "bundle",
        n_prompt=[16],
        repetitions=2,
        backends=["native", "onnx"],
        operators=True,
        say=said.append,
    )
    assert [(row.n_prompt, row.n_gen) for row in rows] == [(16, 0)] * 2
    assert all(row.samples_ns and row.operator_ns for row in rows)
    assert said == ["model gives embeddings: only prompts are measured"]
    with pytest.raises(UsageError, match="only prompts"):
        bench(tmp_path / "bundle", n_both=[(8, 8)])
    with pytest.raises(UsageError, match="without peers"):
        bench(tmp_path / "bundle", peers=["llama.cpp"])


def test_errors_of_the_worker_are_the_users(tiny_bundle: Path) -> None:
    with pytest.raises(UsageError, match="context 4096 is not within the graph's 1 to 256"):
        bench(tiny_bundle, n_prompt=(4096,), n_gen=(), repetitions=1)


def test_damaged_graph(tiny_bundle: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(tiny_bundle, copy)
    graph = copy / "model.onnx"
    graph.write_bytes(b"\0" * graph.stat().st_size)
    with pytest.raises(BackendError, match="cannot load"):
        bench(copy, n_prompt=(4,), n_gen=(), repetitions=1, backends=("onnx",))


@pytest.mark.usefixtures("anything_goes")
def test_turns_go_there_and_back(tiny_bundle: Path, workers: type[FakeWorker]) -> None:
    rows = bench(
        tiny_bundle,
        n_prompt=(8,),
        n_gen=(),
        repetitions=3,
        peers=(f"ort-genai={tiny_bundle}", f"llama.cpp={tiny_bundle}"),
    )
    a, b, c = "pocketslm", "ort-genai", "llama.cpp"
    assert workers.turns[:9] == [a, b, c, c, b, a, a, b, c]
    assert sorted(workers.turns[9:]) == sorted(f"end {name}" for name in (a, b, c))
    assert [row.runtime for row in rows] == [a, b, c]
    assert {row.samples_ns for row in rows} == {(100, 200, 300)}
    assert {row.peak_rss_bytes for row in rows} == {30}


@pytest.mark.usefixtures("anything_goes")
def test_everyone_gets_the_same(tiny_bundle: Path, workers: type[FakeWorker]) -> None:
    arguments: dict[str, Any] = {"n_prompt": (8, 4), "n_gen": (2,), "repetitions": 1}
    bench(tiny_bundle, **arguments, threads=(3,), peers=(f"llama.cpp={tiny_bundle}",))
    by_runtime: dict[str, list[dict[str, Any]]] = {"pocketslm": [], "llama.cpp": []}
    for job in workers.jobs:
        fields = job.to_dict()
        by_runtime[fields.pop("runtime")].append(fields)
    assert by_runtime["pocketslm"] == by_runtime["llama.cpp"]
    prompt, shorter, generation = by_runtime["pocketslm"]
    assert len(set(prompt["ids"])) > 4
    assert max(prompt["ids"]) < support.TINY.vocab_size
    assert shorter["ids"] == prompt["ids"][:4]
    assert generation["ids"] == prompt["ids"]
    assert [fields["context"] for fields in (prompt, shorter, generation)] == [8, 4, 10]
    assert {fields["threads"] for fields in (prompt, shorter, generation)} == {3}
    bench(tiny_bundle, **arguments)
    assert workers.jobs[-1].ids == generation["ids"]


@pytest.mark.parametrize(
    ("n_prompt", "n_depth", "expected", "tokens"),
    [
        ((), None, 0, 1),
        ((8, 16), None, 16, 16),
        ((8,), (0,), 0, 1),
        ((8,), (5,), 5, 5),
        ((), (2, 5), 5, 5),
    ],
)
def test_depth_of_generation(
    tiny_bundle: Path,
    workers: type[FakeWorker],
    n_prompt: tuple[int, ...],
    n_depth: tuple[int, ...] | None,
    expected: int,
    tokens: int,
) -> None:
    row = bench(tiny_bundle, n_prompt=n_prompt, n_gen=(3,), n_depth=n_depth, repetitions=1)[-1]
    assert row.n_depth == expected
    assert row.context == expected + 3
    assert len(workers.jobs[-1].ids) == tokens


def test_a_prompt_with_generation_after_it(tiny_bundle: Path, workers: type[FakeWorker]) -> None:
    (row,) = bench(tiny_bundle, n_prompt=(), n_gen=(), n_both=((6, 4),), repetitions=1)
    assert (row.test, row.context) == ("pp6+tg4", 10)
    assert len(workers.jobs[-1].ids) == 6


def test_several_texts_at_once(tiny_bundle: Path, workers: type[FakeWorker]) -> None:
    rows = bench(tiny_bundle, n_prompt=(4,), n_gen=(2,), parallel=(2, 3), repetitions=1)
    assert [row.test for row in rows] == ["pp4", "tg2 @ d4", "tg2 x2 @ d4", "tg2 x3 @ d4"]
    assert [job.parallel for job in workers.jobs] == [1, 1, 2, 3]


def test_what_several_texts_run(tiny_bundle: Path) -> None:
    ids = [5, 6, 7]
    job = Job("pocketslm", str(tiny_bundle), "native", 1, 16, 0, 4, 3, ids, parallel=3)
    engine = runtime_named("pocketslm").open(job)
    times = repeat(engine, job)
    assert len(times.step_ns) == 4
    engine.reset()
    made = [engine.prefill(ids), *(engine.step() for _ in range(4))]
    alone = runtime_named("pocketslm").open(replace(job, parallel=1))
    assert made == [alone.prefill(ids), *(alone.step() for _ in range(4))]
    with pytest.raises(BackendError, match="makes one text at a time"):
        runtime_named("pocketslm").open(replace(job, backend="onnx"))


def test_every_run_has_processes_and_a_name_of_its_own(
    tiny_bundle: Path, workers: type[FakeWorker]
) -> None:
    rows = bench(tiny_bundle, n_prompt=(4,), n_gen=(), repetitions=1, runs=3)
    assert len({row.run for row in rows}) == len(rows) == len(workers.jobs) == 3


def test_context_may_be_larger(tiny_bundle: Path, workers: type[FakeWorker]) -> None:
    rows = bench(tiny_bundle, n_prompt=(8,), n_gen=(2,), repetitions=1, context=64)
    assert [row.context for row in rows] == [64, 64]
    assert [job.context for job in workers.jobs] == [64, 64]


def test_quality_is_carried_along(
    tiny_bundle: Path, tmp_path: Path, workers: type[FakeWorker]
) -> None:
    copy = tmp_path / "judged"
    shutil.copytree(tiny_bundle, copy)
    manifest = json.loads((copy / MANIFEST).read_text())
    manifest["quality"] = {"perplexity": 29.07}
    (copy / MANIFEST).write_text(json.dumps(manifest))
    (row,) = bench(copy, n_prompt=(4,), n_gen=(), repetitions=1)
    assert row.quality == {"perplexity": 29.07}
    assert row.size_bytes == manifest["files"]["model.slm"]["bytes"]  # of the graph that ran


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"n_prompt": (), "n_gen": ()}, "no length of a prompt or a generation"),
        ({"n_prompt": (0,)}, "n_prompt is 0, expected at least 1"),
        ({"n_gen": (-3,)}, "n_gen is -3"),
        ({"n_depth": (-1,)}, "n_depth is -1"),
        ({"repetitions": 0}, "repetitions is 0"),
        ({"threads": (2, 0)}, "threads is 0"),
        ({"timeout_s": 0}, "timeout is 0"),
        ({"timeout_s": float("nan")}, "timeout is nan"),
        ({"context": 12, "n_prompt": (8,), "n_gen": (5,)}, "tg5 needs 13 tokens"),
        ({"parallel": (1,)}, "parallel is 1, expected at least 2"),
        ({"parallel": (2,), "n_gen": ()}, "no length of that is given"),
        ({"parallel": (2,), "peers": ("llama.cpp",)}, "without peers"),
        ({"peers": ("vllm",)}, "'vllm' is not understood"),
        ({"peers": ("llama.cpp=",)}, "'llama.cpp=' is not understood"),
    ],
)
def test_refused_options(
    tiny_bundle: Path, workers: type[FakeWorker], options: dict[str, Any], message: str
) -> None:
    with pytest.raises(UsageError) as caught:
        bench(tiny_bundle, **options)
    assert message in str(caught.value)
    assert not workers.jobs


def test_not_a_bundle(tmp_path: Path) -> None:
    with pytest.raises(BundleError):
        bench(tmp_path)


def test_unknown_backend(tiny_bundle: Path) -> None:
    with pytest.raises(BundleError, match="no graph for backend 'abacus'"):
        bench(tiny_bundle, backends=("abacus",), n_prompt=(4,), n_gen=(), repetitions=1)


@pytest.mark.parametrize("name", PEERS)
def test_peer_that_is_not_installed(
    tiny_bundle: Path, monkeypatch: pytest.MonkeyPatch, name: str, workers: type[FakeWorker]
) -> None:
    monkeypatch.setattr("pocketslm.profiling.engine.find_spec", lambda name: None)
    assert "pip install" in str(PEERS[name].available())
    with pytest.raises(BackendError, match=rf"peer {name}: .* is not installed; install it with"):
        bench(tiny_bundle, peers=(name,))
    assert not workers.jobs


@pytest.mark.usefixtures("anything_goes")
@pytest.mark.parametrize("name", PEERS)
def test_peer_without_anything_to_run(
    tiny_bundle: Path, tmp_path: Path, name: str, workers: type[FakeWorker]
) -> None:
    with pytest.raises(UsageError, match=rf"give --source CHECKPOINT, or .* --peer {name}=PATH"):
        bench(tiny_bundle, peers=(name,))
    with pytest.raises(UsageError, match="does not exist, expected a"):
        bench(tiny_bundle, peers=(f"{name}={tmp_path / 'absent'}",))
    assert not workers.jobs


@pytest.mark.usefixtures("anything_goes")
def test_source_must_be_the_bundles(
    tiny_bundle: Path, tiny_hf: Path, tiny_gguf: Path, workers: type[FakeWorker]
) -> None:
    with pytest.raises(UsageError, match="is not what .* was exported from"):
        bench(tiny_bundle, peers=("llama.cpp",), source=tiny_gguf)
    with pytest.raises(UsageError, match="not a .gguf file"):  # the right one, of the wrong kind
        bench(tiny_bundle, peers=("llama.cpp",), source=tiny_hf)
    with pytest.raises(UsageError, match="export it with .* --peer executorch=FILE.pte"):
        bench(tiny_bundle, peers=("executorch",), source=tiny_hf)
    assert not workers.jobs


def test_names() -> None:
    assert parse_peer("llama.cpp") == (PEERS["llama.cpp"], None)
    assert parse_peer("llama.cpp=a=b.gguf") == (PEERS["llama.cpp"], Path("a=b.gguf"))
    assert runtime_named("pocketslm").name == "pocketslm"
    with pytest.raises(
        UsageError, match="one of: ort-genai, llama.cpp, llama.cpp-q4_0, executorch"
    ):
        runtime_named("vllm")
