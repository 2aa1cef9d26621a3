"""The same numbers through every door: the library, onnxruntime, its generator, ExecuTorch."""

from __future__ import annotations

import importlib.util
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import onnxruntime as ort
import pytest
from native_support import mixed_kinds, tiny_config, tiny_weights, write_tiny

from pocketslm.errors import BackendError, ContextOverflowError, ExportError, UsageError
from pocketslm.export.lower import native as native_lowering
from pocketslm.export.lower import onnx_native
from pocketslm.export.lower.trace import trace
from pocketslm.export.pipeline import export_bundle
from pocketslm.export.recipe import Recipe
from pocketslm.models.checkpoint import open_checkpoint
from pocketslm.models.config import LayerSize, ModelConfig
from pocketslm.models.tensors import Weight
from pocketslm.runtime.backends import open_session
from pocketslm.runtime.backends.native import NativeModel
from pocketslm.runtime.backends.native_library import library_path
from pocketslm.runtime.bundle import open_bundle
from pocketslm.runtime.config import GenerationConfig
from pocketslm.runtime.model import Model

TOKENS = np.random.default_rng(3).integers(0, 100, 90)
CAPACITY = 100  # positions of a cache, not a multiple of the 16 of a block


class OnnxGraph:
    """``pocketslm.onnx`` in onnxruntime; caches begin as NaN, which nothing may read."""

    def __init__(self, folder: Path, config: ModelConfig, *, threads: str = "2") -> None:
        options = ort.SessionOptions()
        options.log_severity_level = 4
        options.intra_op_num_threads = 1
        options.register_custom_ops_library(str(library_path()))
        options.add_session_config_entry("pocketslm.threads", threads)
        self.session = ort.InferenceSession(str(folder / onnx_native.GRAPH_FILE), options)
        self.names = [n for v in self.session.get_inputs() if (n := v.name).startswith("past")]
        self.caches = {
            name: np.full(
                (
                    1,
                    config.attentions[i // 2].kv_heads,
                    CAPACITY,
                    config.attentions[i // 2].head_dim,
                ),
                np.nan,
                np.float16,
            )
            for i, name in enumerate(self.names)
        }
        self.length = 0

    def feeds(self, tokens: np.ndarray, rows: int) -> dict[str, np.ndarray]:
        return {
            "input_ids": tokens[None].astype(np.int64),
            "attention_mask": np.ones((1, self.length + len(tokens)), np.int64),
            "logits_to_keep": np.array([rows]),
            **self.caches,
        }

    def forward(self, tokens: np.ndarray, rows: int = 1) -> np.ndarray:
        logits, *present = self.session.run(None, self.feeds(tokens, rows))
        self.caches = dict(zip(self.names, present, strict=True))
        self.length += len(tokens)
        return logits[0]


def write_graph(folder: Path, config: ModelConfig) -> OnnxGraph:
    write_tiny(folder / "model.slm", config, mixed_kinds)
    onnx_native.lower(config, folder)
    return OnnxGraph(folder, config)


@pytest.mark.parametrize(
    "config",
    [tiny_config(), tiny_config().with_sizes([LayerSize(4, 2, 96), LayerSize(2, 1, 64)])],
    ids=["plain", "layers of two widths"],
)
def test_onnxruntime_gives_the_bits_of_the_library(config: ModelConfig, tmp_path: Path) -> None:
    graph = write_graph(tmp_path, config)
    native = NativeModel(tmp_path / "model.slm").session(threads=2)
    np.testing.assert_array_equal(graph.forward(TOKENS[:37]), native.forward(TOKENS[:37]))
    for token in TOKENS[37:50, None]:
        np.testing.assert_array_equal(graph.forward(token), native.forward(token))
    part = TOKENS[50:60]
    native.forward(part[:6])
    expected = native.forward(part[6:], all_logits=True)
    np.testing.assert_array_equal(graph.forward(part, rows=4), expected)
    # Going back is a matter of the mask.
    graph.length = 20
    native.truncate(20)
    np.testing.assert_array_equal(graph.forward(part), native.forward(part))


def test_a_cache_is_written_in_place_where_past_is_present(tmp_path: Path) -> None:
    config = tiny_config()
    graph = write_graph(tmp_path, config)
    binding = graph.session.io_binding()
    for name, value in graph.feeds(TOKENS[:9], 1).items():
        binding.bind_ortvalue_input(name, ort.OrtValue.ortvalue_from_numpy(value))
    shared = {name: ort.OrtValue.ortvalue_from_numpy(value) for name, value in graph.caches.items()}
    binding.bind_output("logits")
    for name, value in shared.items():
        binding.bind_ortvalue_input(name, value)
        binding.bind_ortvalue_output(name.replace("past_key_values", "present"), value)
    graph.session.run_with_iobinding(binding)
    copied = graph.forward(TOKENS[:9])
    np.testing.assert_array_equal(binding.get_outputs()[0].numpy()[0], copied)
    for name, value in shared.items():
        np.testing.assert_array_equal(value.numpy(), graph.caches[name])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"input_ids": np.zeros((2, 3), np.int64)}, "only a batch of 1"),
        ({"input_ids": np.zeros((1, 0), np.int64)}, "from 0 to the tokens given"),
        ({"input_ids": np.array([[1, 2, 100]])}, "token 100 is outside the vocabulary of 100"),
        ({"input_ids": np.array([[1, 2, -1]])}, "token -1 is outside"),
        ({"attention_mask": np.array([[0, 1, 1]])}, "padding is not supported"),
        ({"attention_mask": np.array([[2, 0, 1]])}, "ones for all tokens so far"),
        ({"attention_mask": np.array([[2**63 - 1, 2**63 - 1, 5]])}, "ones for all tokens so far"),
        ({"attention_mask": np.array([[1, 1, -1, 3]])}, "ones for all tokens so far"),
        ({"attention_mask": np.ones((1, 2), np.int64)}, "ones for all tokens so far"),
        ({"attention_mask": np.ones((1, CAPACITY + 1), np.int64)}, "has room for 100 positions"),
        ({"attention_mask": np.ones((1, CAPACITY), np.int64)}, "do not fit the context of 96"),
        ({"logits_to_keep": np.array([4])}, "from 0 to the tokens given"),
        ({"logits_to_keep": np.array([-1])}, "from 0 to the tokens given"),
        ({"past_key_values.1.value": np.zeros((1, 2, 90, 16), np.float16)}, "cache tensor 3"),
    ],
)
def test_faulty_inputs_are_errors(change: dict[str, Any], message: str, tmp_path: Path) -> None:
    graph = write_graph(tmp_path, tiny_config())
    expected = graph.forward(TOKENS[:3])
    graph.length = 0
    with pytest.raises(Exception, match=message):
        graph.session.run(None, graph.feeds(TOKENS[:3], 1) | change)
    np.testing.assert_array_equal(graph.forward(TOKENS[:3]), expected)


def fewer_outputs(node: onnx.NodeProto) -> None:
    del node.output[3:]


def an_absent_output(node: onnx.NodeProto) -> None:
    node.output[2] = ""


def an_absent_input(node: onnx.NodeProto) -> None:
    node.input[5] = ""


def fewer_caches(node: onnx.NodeProto) -> None:
    del node.input[6:]
    del node.output[3:]


def another_cache(node: onnx.NodeProto) -> None:
    node.input.append(node.input[4])
    node.output.append("another")


@pytest.mark.parametrize(
    "change", [fewer_outputs, an_absent_output, an_absent_input, fewer_caches, another_cache]
)
def test_a_graph_that_uses_the_operator_in_another_way_is_an_error(
    change: Callable[[onnx.NodeProto], None], tmp_path: Path
) -> None:
    write_graph(tmp_path, tiny_config())
    path = tmp_path / onnx_native.GRAPH_FILE
    model = onnx.load(path, load_external_data=False)
    change(model.graph.node[0])
    made = set(model.graph.node[0].output)
    kept = [value for value in model.graph.output if value.name in made]
    del model.graph.output[:]
    model.graph.output.extend(kept)
    path.write_bytes(model.SerializeToString())
    with pytest.raises(Exception, match=r"the graph (has|leaves)|INVALID_GRAPH|Decoder"):
        OnnxGraph(tmp_path, tiny_config()).forward(TOKENS[:3])


def test_logits_that_are_not_finite_are_an_error(tmp_path: Path) -> None:
    config = tiny_config()
    graph = write_graph(tmp_path, config)
    graph.forward(TOKENS[:3])
    given = tiny_weights(config, mixed_kinds)

    def large(name: str, shape: tuple[int, ...]) -> Weight:
        if name == "model.norm.weight":
            return np.full(shape, 3e38, np.float32)
        return given(name, shape)

    traced = trace(config, config.max_position_embeddings)
    native_lowering.lower(traced, large, tmp_path / "model.slm")
    with pytest.raises(Exception, match="logits are not finite"):
        OnnxGraph(tmp_path, config).forward(TOKENS[:3])


def test_faulty_models_and_settings_are_errors(tmp_path: Path) -> None:
    config = tiny_config()
    write_graph(tmp_path, config)
    with pytest.raises(Exception, match='pocketslm.threads is "many", expected 1 to 64'):
        OnnxGraph(tmp_path, config, threads="many")
    content = bytearray((tmp_path / "model.slm").read_bytes())
    content[0] ^= 1
    (tmp_path / "model.slm").write_bytes(content)
    with pytest.raises(Exception, match="wrong magic bytes"):
        OnnxGraph(tmp_path, config)
    (tmp_path / "model.slm").write_bytes(content[:-64])
    with pytest.raises(Exception, match="file_length"):
        OnnxGraph(tmp_path, config)


HAS_EXECUTORCH = importlib.util.find_spec("executorch") is not None
needs_executorch = pytest.mark.skipif(not HAS_EXECUTORCH, reason="executorch is not installed")
DOORS = ["onnx-pocketslm", pytest.param("executorch-pocketslm", marks=needs_executorch)]


@pytest.fixture(scope="module")
def bundle_path(tiny_hf: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("bindings") / "bundle"
    targets = ("native", "onnx", "onnx-pocketslm")
    if HAS_EXECUTORCH:
        targets += ("executorch-pocketslm",)
    export_bundle(open_checkpoint(tiny_hf), out, Recipe(targets=targets))
    return out


@pytest.mark.parametrize("backend", DOORS)
def test_a_bundle_runs_it_as_a_backend(backend: str, bundle_path: Path) -> None:
    bundle = open_bundle(bundle_path)
    graph = bundle.graph(backend)
    assert bundle.graph_bytes(graph) > (bundle_path / "model.slm").stat().st_size
    native = open_session(bundle, "native", threads=2, context=70)
    session = open_session(bundle, backend, threads=2, context=70)
    assert session.backend.endswith(" + pocketslm")
    assert session.context == 70
    for run in (native, session):
        run.forward(TOKENS[:20])
        run.truncate(11)
    expected = native.forward(TOKENS[:40]).copy()
    np.testing.assert_array_equal(session.forward(TOKENS[:40]), expected)
    for token in TOKENS[:19, None]:
        np.testing.assert_array_equal(session.forward(token), native.forward(token))
    with pytest.raises(ContextOverflowError):
        session.forward(TOKENS[:1])


def test_all_logits_through_onnxruntime(bundle_path: Path) -> None:
    bundle = open_bundle(bundle_path)
    native = open_session(bundle, "native", threads=2)
    session = open_session(bundle, "onnx-pocketslm", threads=2)
    expected = native.forward(TOKENS, all_logits=True)
    np.testing.assert_array_equal(session.forward(TOKENS, all_logits=True), expected)


def test_what_is_missing_is_named(
    bundle_path: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("POCKETSLM_LIBRARY", str(tmp_path / "none.so"))
    with pytest.raises(BackendError, match="onnxruntime cannot use the native operators"):
        open_session(open_bundle(bundle_path), "onnx-pocketslm")
    for target in ("onnx-pocketslm", "executorch-pocketslm"):
        with pytest.raises(ExportError, match=f"target {target} reads .* add the target native"):
            Recipe(targets=(target,))


@needs_executorch
def test_a_faulty_call_of_executorch_is_an_error_and_changes_nothing(bundle_path: Path) -> None:
    session: Any = open_session(open_bundle(bundle_path), "executorch-pocketslm", threads=2)
    tokens = TOKENS[:5]

    def forward(ids: npt.NDArray[np.int64], start: int) -> npt.NDArray[np.float32]:
        logits = np.empty(session.vocab_size, np.float32)
        session._program.forward(ids, start, logits)
        return logits

    expected = forward(tokens, 0)
    for ids, start in ((tokens + 300, 0), (tokens, -1), (tokens, 255)):
        with pytest.raises(UsageError, match="forward failed"):
            forward(ids, start)
        np.testing.assert_array_equal(forward(tokens, 0), expected)


@needs_executorch
def test_executorch_programs_do_not_get_each_others_models(tmp_path: Path) -> None:
    """Decoders outlive programs: a new program may lie where an old one was."""
    from pocketslm.export.lower import executorch_native
    from pocketslm.runtime.backends import executorch

    for index, scheme in enumerate((mixed_kinds, lambda name, values: values, mixed_kinds)):
        config = tiny_config()
        write_tiny(tmp_path / "model.slm", config, scheme)
        path = tmp_path / f"{index}.pte"
        executorch_native.lower(
            config, tmp_path / "model.slm", path, context=CAPACITY, bos=1, eos=[2]
        )
        session = executorch.ExecuTorchSession(path, 2, None, native=True)
        native = NativeModel(tmp_path / "model.slm").session(threads=2)
        np.testing.assert_array_equal(session.forward(TOKENS[:9]), native.forward(TOKENS[:9]))
        del session


def genai_tokens(folder: Path, prompt: list[int], count: int) -> list[int]:
    """As the documentation says: the library beside the graph, and an overlay that names both."""
    og = pytest.importorskip("onnxruntime_genai")
    library = folder / "libpocketslm.so"
    if not library.exists():
        os.link(library_path(), library)
    settings = {
        "custom_ops_library": library.name,
        "intra_op_num_threads": 1,
        "pocketslm.threads": "2",
    }
    decoder = {"filename": onnx_native.GRAPH_FILE, "session_options": settings}
    config = og.Config(str(folder))
    config.overlay(json.dumps({"model": {"decoder": decoder}}))
    model = og.Model(config)
    params = og.GeneratorParams(model)
    params.set_search_options(max_length=len(prompt) + count, do_sample=False)
    generator = og.Generator(model, params)
    generator.append_tokens(prompt)
    while not generator.is_done():
        generator.generate_next_token()
    return [int(token) for token in generator.get_sequence(0)][len(prompt) :]


def greedy(model: Model, prompt: list[int], count: int) -> list[int]:
    """Ours, without the token that ends an answer, which genai does not list."""
    config = GenerationConfig(max_new_tokens=count)
    steps = model.engine.generate(prompt, config, model.tokenizer.eos_token_ids)
    return [step.token for step in steps if step.finish != "eos"]


def test_genai_runs_the_native_operators(bundle_path: Path) -> None:
    prompt = [int(token) for token in TOKENS[:24]]
    model = Model.load(bundle_path, "native", threads=2)
    assert genai_tokens(bundle_path, prompt, 40) == greedy(model, prompt, 40)


@pytest.mark.real
def test_the_real_model_gives_the_same_numbers_through_all_three(
    smollm2_bundle: Path, tmp_path: Path
) -> None:
    bundle = open_bundle(smollm2_bundle)
    assert bundle.manifest is not None
    os.link(smollm2_bundle / "model.slm", tmp_path / "model.slm")
    config = ModelConfig.from_dict(bundle.manifest.architecture)
    onnx_native.lower(config, tmp_path)
    graph = OnnxGraph(tmp_path, config)
    native = NativeModel(tmp_path / "model.slm").session(threads=2)
    tokens = np.random.default_rng(1).integers(0, config.vocab_size, 60)
    doors: list[Any] = [graph]
    if HAS_EXECUTORCH:
        from pocketslm.export.lower import executorch_native
        from pocketslm.runtime.backends import executorch

        path = tmp_path / executorch_native.GRAPH_FILE
        executorch_native.lower(
            config, tmp_path / "model.slm", path, context=CAPACITY, bos=1, eos=[2]
        )
        doors.append(executorch.ExecuTorchSession(path, 2, None, native=True))
    for part in (tokens, *tokens[:8, None]):
        expected = native.forward(part)
        for door in doors:
            np.testing.assert_array_equal(door.forward(part), expected)
