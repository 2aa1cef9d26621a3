"""ExecuTorch programs: numbers against the PyTorch model, ExecuTorch's own runner, refusals."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from architectures import ROWS, write_folder
from hypothesis import given, settings
from hypothesis import strategies as st

import support
from pocketslm.errors import BackendError, BundleError, ExportError
from pocketslm.export import pipeline
from pocketslm.export.pipeline import export_bundle
from pocketslm.export.recipe import Recipe
from pocketslm.models.checkpoint import open_checkpoint
from pocketslm.models.config import LayerSize
from pocketslm.models.reference import load_reference
from pocketslm.models.tensors import QuantTensor, pack_codes
from pocketslm.runtime.backends import Session, open_session
from pocketslm.runtime.bundle import open_bundle, read_manifest
from pocketslm.runtime.config import GenerationConfig
from pocketslm.runtime.model import Model
from pocketslm.terminal import without_warnings

if importlib.util.find_spec("executorch") is None:
    pytest.skip("executorch is not installed", allow_module_level=True)

# Two fp32 implementations: the largest difference of a logit.
MAX_FLOAT_ERROR = 1e-3
# Activations rounded to int8, one scale a token: of the logits' standard deviation.
MAX_INT8_ERROR = 0.06
# Queries, keys and values rounded to int8, one scale a head and position: the same.
MAX_CACHE_ERROR = 0.02
# The same, and int8 weights with one scale a row in place of their groups.
MAX_ROW_ERROR = 0.08
# Scales rounded to bfloat16, of their size: half a step of 8 bits.
MAX_SCALE_ERROR = 2.0**-8
IDS = np.random.default_rng(7).integers(0, support.TINY.vocab_size, 150)
TARGET = ("executorch",)


@pytest.fixture(scope="module")
def lowering() -> ModuleType:
    """Importing it takes seconds, which is too long for a process that only collects the tests."""
    with without_warnings():
        from pocketslm.export.lower import executorch
    return executorch


def logits_of(session: Session, ids: np.ndarray[Any, Any] = IDS) -> np.ndarray[Any, Any]:
    session.truncate(0)
    return session.forward(ids, all_logits=True)


def reference_logits(source: Path, recipe: Recipe) -> np.ndarray[Any, Any]:
    """PyTorch in fp32 with the weights as the recipe stores them."""
    checkpoint = open_checkpoint(source)
    read = checkpoint.weight
    checkpoint.weight = lambda name: recipe.apply(name, read(name))  # type: ignore[method-assign]
    model = load_reference(checkpoint)
    with torch.no_grad():
        logits, _ = model(torch.from_numpy(IDS)[None], model.empty_cache())
    array: np.ndarray[Any, Any] = logits[0].numpy()
    return array


def relative_error(ours: np.ndarray[Any, Any], theirs: np.ndarray[Any, Any]) -> float:
    """Root mean square difference over the reference's standard deviation; NaN stays NaN."""
    return float(np.sqrt(np.mean((ours - theirs) ** 2)) / theirs.std())


def test_float_logits_are_the_models(tiny_hf: Path, tmp_path: Path) -> None:
    recipe = Recipe(weights="float", head="float", targets=TARGET)
    export_bundle(open_checkpoint(tiny_hf), tmp_path / "b", recipe)
    ours = logits_of(open_session(open_bundle(tmp_path / "b"), threads=2))
    theirs = reference_logits(tiny_hf, recipe)
    assert np.abs(ours - theirs).max() < MAX_FLOAT_ERROR
    assert not np.abs(ours[::-1] - theirs).max() < MAX_FLOAT_ERROR  # the comparison can fail


VARIANTS: dict[str, dict[str, Any]] = {
    "untied": {"tie_word_embeddings": False},
    "biases": {"attention_bias": True, "output_bias": True, "mlp_bias": True},
    "qwen2": {"architecture": "qwen2", "attention_bias": True},
    "sizes by layer": {"layer_sizes": (LayerSize(2, 1, 96), LayerSize(4, 2, 48))},
}


@pytest.mark.parametrize("name", VARIANTS)
def test_variants_lower_too(name: str, tmp_path: Path) -> None:
    config = support.tiny(**VARIANTS[name])
    source = support.write_hf(tmp_path / "hf", config)
    recipe = Recipe(weights="float", head="float", targets=TARGET)
    export_bundle(open_checkpoint(source), tmp_path / "b", recipe)
    ours = logits_of(open_session(open_bundle(tmp_path / "b"), threads=2))
    assert np.abs(ours - reference_logits(source, recipe)).max() < MAX_FLOAT_ERROR


def test_an_int8_cache_is_close(tiny_hf: Path, tmp_path: Path) -> None:
    logits = {}
    for kind, says in (("fp16", "fp32"), ("int8", "int8")):
        recipe = Recipe(weights="float", head="float", targets=TARGET, kv_cache=kind)
        export_bundle(open_checkpoint(tiny_hf), tmp_path / kind, recipe)
        bundle = open_bundle(tmp_path / kind)
        assert bundle.graph("executorch").kv_cache == says
        session = open_session(bundle, threads=2)
        logits[kind] = logits_of(session)
        session.truncate(0)
        whole = session.forward(IDS)  # in two pieces
        assert relative_error(whole, logits[kind][-1:]) < MAX_CACHE_ERROR
    error = relative_error(logits["int8"], logits["fp16"])
    assert 0 < error < MAX_CACHE_ERROR  # 0: it would not be int8


RECIPES = {
    "8da4w": (Recipe(weights="int4", head="int4", targets=TARGET), MAX_INT8_ERROR),
    "zero points": (Recipe(weights="int4", head="int4", grid="zp", targets=TARGET), MAX_INT8_ERROR),
    "minimums": (Recipe(weights="int4", head="float", grid="min", targets=TARGET), MAX_INT8_ERROR),
    "8da8w": (Recipe(weights="int8", head="int8", targets=TARGET), MAX_ROW_ERROR),
    "groups that do not fit": (Recipe(group_size=64, targets=TARGET), MAX_ROW_ERROR),
}


@pytest.mark.parametrize("name", RECIPES)
def test_logits_equal_the_stored_weights(name: str, tiny_hf: Path, tmp_path: Path) -> None:
    recipe, allowed = RECIPES[name]
    export_bundle(open_checkpoint(tiny_hf), tmp_path / "b", recipe)
    session = open_session(open_bundle(tmp_path / "b"), "executorch", threads=1)
    error = relative_error(logits_of(session), reference_logits(tiny_hf, recipe))
    assert error < allowed
    # A prompt in one piece, longer than a chunk, and after going back.
    last = session.forward
    session.truncate(0)
    whole = last(IDS)
    session.truncate(140)
    assert relative_error(last(IDS[140:]), whole) < MAX_FLOAT_ERROR


def test_notes_say_what_was_lost(tiny_hf: Path, tmp_path: Path) -> None:
    recipe = Recipe(weights="int4", head="int8", targets=TARGET)
    manifest = export_bundle(open_checkpoint(tiny_hf), tmp_path / "b", recipe)
    assert [n for n in manifest.notes if "one scale a row" in n] == [
        "executorch: 1 matrices: int8 g32 sym was rounded to int8 with one scale a row"
    ]
    assert not any("bfloat16" in note for note in manifest.notes)  # chosen so from the start


def test_capped_scores_need_an_fp32_cache(tmp_path: Path) -> None:
    folder, _ = write_folder(tmp_path / "model", ROWS["gemma2"])
    recipe = Recipe(targets=("executorch",), kv_cache="int8")
    with pytest.raises(ExportError, match="capped scores reads an fp32 cache"):
        export_bundle(open_checkpoint(folder), tmp_path / "bundle", recipe)


def test_a_convolution_can_be_cut_back(tmp_path: Path) -> None:
    folder, _ = write_folder(tmp_path / "model", ROWS["lfm2"])
    recipe = Recipe(weights="float", head="float", targets=("executorch",))
    export_bundle(open_checkpoint(folder), tmp_path / "bundle", recipe)
    session = open_session(open_bundle(tmp_path / "bundle"), "executorch", threads=1)
    ids = np.random.default_rng(5).integers(0, 264, 40)
    whole = session.forward(ids)[-1]
    for kept in (0, 1, 20, 39):
        session.truncate(kept)
        again = session.forward(ids[kept:])[-1]
        assert np.abs(again - whole).max() <= 1e-4 * np.abs(whole).max()


def test_the_runner_finds_its_methods(tiny_hf: Path, tmp_path: Path) -> None:
    recipe = Recipe(targets=TARGET, context=96)
    export_bundle(open_checkpoint(tiny_hf), tmp_path / "b", recipe)
    from pocketslm.runtime.backends import executorch as backend

    program = backend.Program(tmp_path / "b" / "model.pte")

    def value(name: str) -> list[Any]:
        return program.numbers(name)

    eos = sorted(Model.load(tmp_path / "b").tokenizer.eos_token_ids)
    assert value("get_eos_ids") == eos
    assert value("get_vocab_size") == [support.TINY.vocab_size]
    assert value("get_max_context_len") == value("get_max_seq_len") == [96]
    assert value("use_kv_cache") == value("use_sdpa_with_kv_cache") == [1]


def test_one_bundle_holds_every_graph(tiny_hf: Path, tmp_path: Path) -> None:
    """With the same weights in each: greedy decoding in fp32 agrees."""
    recipe = Recipe(weights="float", head="float", targets=("native", "onnx", "executorch"))
    export_bundle(open_checkpoint(tiny_hf), tmp_path / "b", recipe)
    assert [graph.backend for graph in read_manifest(tmp_path / "b").graphs] == list(recipe.targets)
    config = GenerationConfig(max_new_tokens=24)
    texts = set()
    for backend in ("onnx", "executorch"):
        model = Model.load(tmp_path / "b", backend, threads=1)
        texts.add(tuple(record.token for record in model.generate("the rain in", config)))
    assert len(texts) == 1


def test_a_bare_file_opens(tiny_hf: Path, tmp_path: Path) -> None:
    export_bundle(open_checkpoint(tiny_hf), tmp_path / "b", Recipe(targets=TARGET, context=64))
    bundled = Model.load(tmp_path / "b", threads=1)
    (tmp_path / "b" / "pocketslm.json").unlink()
    bare = Model.load(tmp_path / "b" / "model.pte", threads=1)
    assert bare.bundle.context == bare.engine.session.context == 64
    config = GenerationConfig(max_new_tokens=8)
    tokens = [[r.token for r in model.generate("the", config)] for model in (bundled, bare)]
    assert tokens[0] == tokens[1]


def test_it_runs_without_torch(tiny_hf: Path, tmp_path: Path) -> None:
    """In a process that loads torch's libraries but none of its Python; torch may still come."""
    export_bundle(open_checkpoint(tiny_hf), tmp_path / "b", Recipe(targets=TARGET))
    code = (
        "import sys; from pathlib import Path; import numpy as np;"
        "from pocketslm.runtime.backends import open_session;"
        "from pocketslm.runtime.bundle import open_bundle;"
        "session = open_session(open_bundle(Path(sys.argv[1])), 'executorch', threads=2);"
        "first = session.forward(np.arange(9)); assert 'torch' not in sys.modules;"
        "import torch; assert torch.ones(64, 64).mm(torch.ones(64, 64))[0, 0] == 64;"
        "session.truncate(0); assert (session.forward(np.arange(9)) == first).all()"
    )
    command = [sys.executable, "-c", code, str(tmp_path / "b")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")


def test_programs_do_not_get_each_others_weights(tmp_path: Path) -> None:
    """XNNPACK keeps packed weights by name, for all programs of a process."""
    sessions, references = [], []
    recipe = Recipe(weights="float", head="float", targets=TARGET)
    for seed in (1, 2):
        source = support.write_hf(tmp_path / f"hf{seed}", seed=seed)
        export_bundle(open_checkpoint(source), tmp_path / f"b{seed}", recipe)
        sessions.append(open_session(open_bundle(tmp_path / f"b{seed}"), threads=1))
        references.append(reference_logits(source, recipe))
    for session, theirs in zip(sessions, references, strict=True):
        assert np.abs(logits_of(session) - theirs).max() < MAX_FLOAT_ERROR


@pytest.mark.parametrize("keep", [0, 20, 5000, -1])
def test_a_damaged_file_is_refused(keep: int, tiny_hf: Path, tmp_path: Path) -> None:
    export_bundle(open_checkpoint(tiny_hf), tmp_path / "b", Recipe(targets=TARGET))
    path = tmp_path / "b" / "model.pte"
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(BundleError, match="cut short"):
        open_bundle(path)


def test_a_missing_library_is_said_first(
    tiny_hf: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pipeline, "find_spec", lambda name: None)
    with pytest.raises(ExportError, match=r"pip install pocketslm\[executorch\]"):
        export_bundle(open_checkpoint(tiny_hf), tmp_path / "b", Recipe(targets=TARGET))
    assert not (tmp_path / "b").exists()


def test_a_bundle_without_the_graph_says_so(tiny_hf: Path, tmp_path: Path) -> None:
    export_bundle(open_checkpoint(tiny_hf), tmp_path / "b", Recipe(targets=("onnx",)))
    with pytest.raises((BackendError, BundleError), match="--target executorch"):
        open_session(open_bundle(tmp_path / "b"), "executorch")


@pytest.mark.parametrize("kind", ["sym", "zero_points", "minimums"])
def test_int4_forms_keep_their_values(kind: str, lowering: ModuleType) -> None:
    """Also negative scales, as Q4_0 has, and groups of zeros; only scales are rounded."""
    rng = np.random.default_rng(3)
    scales = rng.normal(size=(8, 3)).astype(np.float16)
    scales[2, 1] = 0
    other: dict[str, Any] = {}
    if kind == "zero_points":
        other[kind] = rng.integers(0, 16, (8, 3)).astype(np.uint8)
    elif kind == "minimums":
        other[kind] = rng.normal(size=(8, 3)).astype(np.float16)
    codes = rng.integers(0, 16, (8, 96)).astype(np.uint8)
    weight = QuantTensor(pack_codes(codes, 4), scales, 4, 32, **other)
    form, offsets = lowering.filters.product_form(weight)
    assert form.scales is not None
    held = (form.scales.astype(np.uint32) << 16).view(np.float32)
    assert (held > 0).all()
    stored = QuantTensor(form.codes, held, 4, 32).dequantize()
    if offsets is not None:
        stored += np.repeat(offsets, 32, axis=1)
    allowed = MAX_SCALE_ERROR * 8 * np.repeat(np.abs(scales.astype(np.float32)), 32, axis=1)
    error = np.abs(stored - weight.dequantize())
    assert (error <= allowed + 1e-6).all()
    assert not (np.abs(stored[::-1] - weight.dequantize()) <= allowed + 1e-6).all()


def test_bfloat16_is_torchs(lowering: ModuleType) -> None:
    values = np.random.default_rng(1).normal(size=1000).astype(np.float32)
    theirs = torch.from_numpy(values).bfloat16().view(torch.int16).numpy().view(np.uint16)
    np.testing.assert_array_equal(lowering.filters.bfloat16(values), theirs)


@settings(max_examples=60, deadline=None)
@given(
    lives=st.lists(
        st.tuples(st.integers(1, 300), st.integers(0, 12), st.integers(0, 12)),
        min_size=1,
        max_size=24,
    )
)
def test_tensors_alive_at_once_do_not_overlap(
    lowering: ModuleType, lives: list[tuple[int, int, int]]
) -> None:
    builder = lowering.ProgramBuilder()
    values = [builder.tensor([size]) for size, _, _ in lives]
    for step in range(13):
        used = [
            v for v, (_, a, b) in zip(values, lives, strict=True) if step in (min(a, b), max(a, b))
        ]
        builder.call("aten::any", *used)
    total = builder._plan_memory()
    places = []
    for value, (size, a, b) in zip(values, lives, strict=True):
        at = builder._values[value].val.allocation_info.memory_offset
        assert at % 64 == 0
        assert at + 4 * size <= total
        places.append((at, at + 4 * size, min(a, b), max(a, b)))
    for i, (begin, end, first, last) in enumerate(places):
        for other_begin, other_end, other_first, other_last in places[i + 1 :]:
            together = first <= other_last and other_first <= last
            assert not together or end <= other_begin or other_end <= begin


def test_named_constants_of_a_delegate_live_on(
    lowering: ModuleType, tiny_hf: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """XNNPACK's weight cache would free those that no product packs, as norms in some files."""
    recipe = Recipe(targets=TARGET, context=256)
    export_bundle(open_checkpoint(tiny_hf), tmp_path / "inputs", recipe)
    constants: dict[int, tuple[str, np.ndarray[Any, Any]]] = {}
    builder, segment = lowering.ProgramBuilder, lowering.Segment
    constant, enter = builder.constant, segment.input

    def noted(self: Any, key: str, array: np.ndarray[Any, Any]) -> int:
        value = constant(self, key, array)
        constants[value] = key, array
        return value

    def inside(self: Any, value: int, shape: Any) -> int:
        if value in constants:
            return self._bias(*constants[value])
        return enter(self, value, shape)

    monkeypatch.setattr(builder, "constant", noted)
    monkeypatch.setattr(segment, "input", inside)
    export_bundle(open_checkpoint(tiny_hf), tmp_path / "constants", recipe)
    assert constants
    logits = [
        logits_of(open_session(open_bundle(tmp_path / name), "executorch"))
        for name in ("inputs", "constants")
    ]
    np.testing.assert_array_equal(*logits)


# One process for both, before anything else in it has used BLAS.
_RUNNERS = r"""
import json, sys
from pocketslm.runtime.config import GenerationConfig
from pocketslm.runtime.model import Model
bundle, threads, *prompts = sys.argv[1:]
model = Model.load(bundle, threads=int(threads))
from executorch.extension.llm import runner as llm
theirs = llm.TextLLMRunner(
    model_path=f"{bundle}/model.pte", tokenizer_path=f"{bundle}/tokenizer.json"
)
options = llm.GenerationConfig(
    echo=False, max_new_tokens=32, temperature=0.0, num_bos=0, num_eos=0
)
for prompt in prompts:
    ids = model.tokenizer.encode(prompt, add_special_tokens=False)
    ours = "".join(r.text for r in model.generate(ids, GenerationConfig(max_new_tokens=32)))
    said = []
    theirs.reset()
    theirs.generate(prompt, options, said.append)
    print("\n=" + json.dumps([ours, "".join(said)]))
"""


@pytest.mark.real
def test_text_llm_runner_says_what_we_say(smollm2_gguf: Path, tmp_path: Path) -> None:
    """ExecuTorch's own runner, with its own tokenizer, on the bundle's files as they are."""
    export_bundle(
        open_checkpoint(smollm2_gguf), tmp_path / "b", Recipe(targets=TARGET, context=512)
    )
    prompts = [
        "The capital of France is",
        "Once upon a time",
        "Water boils at",
        "def fibonacci(n):",
    ]
    said = {}
    for threads in "12":
        printed = subprocess.run(
            [sys.executable, "-c", _RUNNERS, str(tmp_path / "b"), threads, *prompts],
            capture_output=True,
            text=True,
            timeout=300,
            check=False,
        )
        assert printed.returncode == 0, printed.stderr[-2000:]
        texts = [json.loads(line[1:]) for line in printed.stdout.split("\n") if line[:1] == "="]
        for ours, theirs in texts:
            assert len(ours) > 20
            assert theirs.removesuffix("<|im_end|>") == ours
        said[threads] = texts
    assert len(said["1"]) == len(prompts)
    assert said["1"] == said["2"]
