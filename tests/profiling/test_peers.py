"""Every runtime's engine, ours and the peers', held to the same contract."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest

import support
from pocketslm.errors import BackendError, PocketSlmError, UsageError
from pocketslm.export.pipeline import export_bundle
from pocketslm.models.checkpoint import open_checkpoint
from pocketslm.profiling.bench import bench
from pocketslm.profiling.engine import Engine, Job, runtime_named
from pocketslm.profiling.peers import PEERS

N_GEN = 6
IDS = np.random.default_rng(1).integers(0, 256, 20).tolist()


def needs(*modules: str) -> pytest.MarkDecorator:
    missing = [module for module in modules if find_spec(module) is None]
    return pytest.mark.skipif(bool(missing), reason=f"not installed: {missing}")


RUNTIMES = [
    pytest.param("pocketslm"),
    pytest.param("ort-genai", marks=needs("onnxruntime_genai")),
    pytest.param("llama.cpp", marks=needs("llama_cpp")),
]


@pytest.fixture(scope="module")
def kept_bundle(tiny_gguf: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny GGUF file's blocks, carried over."""
    out = tmp_path_factory.mktemp("kept") / "bundle"
    export_bundle(open_checkpoint(tiny_gguf), out)
    return out


def job(name: str, artefact: Path, context: int = len(IDS) + N_GEN) -> Job:
    return Job(name, str(artefact), "auto", 1, context, 0, N_GEN, len(IDS), IDS)


@pytest.fixture
def artefacts(kept_bundle: Path, tiny_gguf: Path) -> dict[str, Path]:
    """The same model in the form that each runtime takes."""
    return {"pocketslm": kept_bundle, "ort-genai": kept_bundle, "llama.cpp": tiny_gguf}


def open_engine(name: str, artefacts: dict[str, Path]) -> Engine:
    request = job(name, artefacts[name])
    runtime = runtime_named(name)
    assert name not in PEERS or PEERS[name].available() is None
    runtime.import_library(request)
    return runtime.open(request)


def generate(engine: Engine, ids: list[int]) -> list[int]:
    engine.reset()
    return [engine.prefill(ids), *(engine.step() for _ in range(N_GEN))]


@pytest.mark.parametrize("name", RUNTIMES)
def test_steps_continue_the_prompt(name: str, artefacts: dict[str, Path]) -> None:
    """A step must run the token before it: the same as running everything as one prompt."""
    engine = open_engine(name, artefacts)
    tokens = generate(engine, IDS)
    assert len(set(tokens)) > 1  # else the following holds for an engine that ignores its input
    for count, token in enumerate(tokens[:N_GEN]):
        engine.reset()
        assert engine.prefill(IDS + tokens[:count]) == token


@pytest.mark.parametrize("name", RUNTIMES)
def test_reset_forgets(name: str, artefacts: dict[str, Path]) -> None:
    engine = open_engine(name, artefacts)
    first = generate(engine, IDS)
    other = generate(engine, IDS[::-1])
    assert generate(engine, IDS) == first
    assert other != first


@pytest.mark.parametrize("name", RUNTIMES[1:])
def test_peers_run_the_same_model(name: str, artefacts: dict[str, Path]) -> None:
    """Greedy tokens agree, so the work that is timed is the same."""
    ours = generate(open_engine("pocketslm", artefacts), IDS)
    assert generate(open_engine(name, artefacts), IDS) == ours


@pytest.mark.parametrize("name", RUNTIMES)
def test_files_that_cannot_be_loaded(name: str, tmp_path: Path) -> None:
    for artefact in (tmp_path / "absent", tmp_path):
        with pytest.raises(PocketSlmError) as caught:
            open_engine(name, {name: artefact})
        assert str(artefact) in str(caught.value)
        assert "\n" not in str(caught.value)


@needs("onnxruntime_genai", "llama_cpp")
def test_bench_beside_peers(
    kept_bundle: Path, tiny_gguf: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From the checkpoint alone: each peer's own artefact is made, measured, and kept."""
    monkeypatch.setenv("POCKETSLM_CACHE", str(tmp_path))
    rows = bench(
        kept_bundle,
        n_prompt=(8,),
        n_gen=(4,),
        repetitions=2,
        threads=(1,),
        peers=("ort-genai", "llama.cpp"),
        source=tiny_gguf,
    )
    assert [(row.test, row.runtime) for row in rows] == [
        (test, runtime)
        for test in ("pp8", "tg4 @ d8")
        for runtime in ("pocketslm", "ort-genai", "llama.cpp")
    ]
    assert len({row.artefact_sha256 for row in rows}) == 3
    (folder,) = tmp_path.glob("peers/*/*")  # nothing else is left of the build
    assert (folder / "genai_config.json").exists()
    before = folder.stat().st_mtime_ns
    assert PEERS["ort-genai"].prepare(tiny_gguf, folder.parent) == folder
    assert folder.stat().st_mtime_ns == before


@needs("onnxruntime_genai")
def test_builder_that_fails(tmp_path: Path) -> None:
    hf = support.write_hf(tmp_path / "hf")
    (hf / "tokenizer.json").write_text("{}")
    with pytest.raises(BackendError, match="model builder failed: .*; run it yourself") as caught:
        PEERS["ort-genai"].prepare(hf, tmp_path / "cache")
    assert "\n" not in str(caught.value)
    assert not list((tmp_path / "cache").iterdir())


def test_llama_cpp_finds_the_file_of_a_folder(tiny_gguf: Path, tmp_path: Path) -> None:
    peer = PEERS["llama.cpp"]
    assert peer.prepare(tiny_gguf, tmp_path) == tiny_gguf
    assert peer.prepare(tiny_gguf.parent, tmp_path) == tiny_gguf
    with pytest.raises(UsageError, match="not a .gguf file"):
        peer.prepare(tmp_path, tmp_path)


@pytest.fixture(scope="module")
def toy_pte(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file with the inputs and metadata of export_llm's: 8 tokens at once, a cache of 32."""
    import torch
    from executorch.exir import to_edge

    class Toy(torch.nn.Module):
        """Logits [1, 1, 50] that depend on every cached token and its position."""

        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("cache", torch.zeros(32))

        def forward(self, tokens: torch.Tensor, start: torch.Tensor) -> torch.Tensor:
            self.cache.index_put_((torch.arange(tokens.shape[1]) + start,), tokens[0].float())
            places = torch.arange(32)
            past = torch.where(places < start + tokens.shape[1], self.cache, 0.0)
            mixed = (past * (places + 1.0)).sum()
            return torch.sin(mixed * (torch.arange(50) + 1.0)).reshape(1, 1, 50)

    example = torch.ones(1, 4, dtype=torch.long), torch.tensor([0])
    length = torch.export.Dim("length", min=1, max=8)
    program = torch.export.export(Toy(), example, dynamic_shapes=({1: length}, None))
    edge = to_edge(program, constant_methods={"get_max_seq_len": 8, "get_max_context_len": 32})
    path = tmp_path_factory.mktemp("toy") / "toy.pte"
    path.write_bytes(edge.to_executorch().buffer)
    return path


@needs("executorch")
@pytest.mark.filterwarnings("ignore")  # those of its exporter
def test_executorch(toy_pte: Path, tmp_path: Path) -> None:
    """The contract above, with a prompt that does not fit one call."""
    engine = open_engine("executorch", {"executorch": toy_pte})
    tokens = generate(engine, IDS)
    assert len(set(tokens)) > 1
    assert generate(engine, IDS) == tokens
    for count, token in enumerate(tokens[:N_GEN]):
        engine.reset()
        assert engine.prefill(IDS + tokens[:count]) == token
    with pytest.raises(BackendError, match="holds 32 tokens, the test needs 33"):
        runtime_named("executorch").open(job("executorch", toy_pte, context=33))
    (tmp_path / "bad.pte").write_bytes(bytes(100))
    for name in ("absent.pte", "bad.pte"):
        with pytest.raises(BackendError, match="cannot load"):
            open_engine("executorch", {"executorch": tmp_path / name})
