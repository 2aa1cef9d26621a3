"""Bundles: numbers against the PyTorch model, other runtimes, and failures half-way."""

from __future__ import annotations

import errno
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import support
from pocketslm.errors import BackendError, CheckpointError, ContextOverflowError, ExportError
from pocketslm.export.evaluate import compare, evaluate, evaluate_bundle, windows_of
from pocketslm.export.pipeline import export_bundle
from pocketslm.export.recipe import Recipe
from pocketslm.models.checkpoint import open_checkpoint
from pocketslm.models.config import LayerSize, ModelConfig
from pocketslm.models.reference import load_reference
from pocketslm.profiling.peers.ort_genai import OrtGenai
from pocketslm.runtime.backends import Session, open_session
from pocketslm.runtime.bundle import open_bundle, read_manifest
from pocketslm.runtime.config import GenerationConfig
from pocketslm.runtime.model import Model

# Two fp32 implementations.
MAX_FLOAT_ERROR = 1e-3
# Activations rounded to int8 in groups of 32: of the logits' standard deviation.
MAX_INT8_ERROR = 0.04
# fp16 activations.
MAX_FP16_ERROR = 0.005
IDS = np.random.default_rng(5).integers(0, support.TINY.vocab_size, 140)


def logits_of(session: Session, pieces: tuple[int, ...] = ()) -> np.ndarray[Any, Any]:
    session.truncate(0)
    parts = np.split(IDS, pieces)
    return np.concatenate([session.forward(part, all_logits=True) for part in parts])


def reference_logits(model: Any) -> np.ndarray[Any, Any]:
    with torch.no_grad():
        logits, _ = model(torch.from_numpy(IDS)[None], model.empty_cache())
    array: np.ndarray[Any, Any] = logits[0].numpy()
    return array


def relative_error(ours: np.ndarray[Any, Any], theirs: np.ndarray[Any, Any]) -> float:
    """Root mean square difference over the reference's standard deviation; NaN stays NaN."""
    return float(np.sqrt(np.mean((ours - theirs) ** 2)) / theirs.std())


def stored_reference(source: Path, recipe: Recipe) -> Any:
    """The PyTorch model with the weights as the recipe stores them."""
    checkpoint = open_checkpoint(source)
    read = checkpoint.weight
    checkpoint.weight = lambda name: recipe.apply(name, read(name))  # type: ignore[method-assign]
    return load_reference(checkpoint)


RECIPES = {
    "float": (Recipe(weights="float", head="float"), MAX_FLOAT_ERROR),
    "int4": (Recipe(weights="int4", head="int8"), MAX_INT8_ERROR),
    "int4 asymmetric": (Recipe(weights="int4", head="int4", grid="zp"), MAX_INT8_ERROR),
    "int8 g64": (Recipe(weights="int8", head="int8", group_size=64), MAX_INT8_ERROR),
    "int8 asymmetric": (Recipe(weights="int8", head="int8", grid="zp"), MAX_INT8_ERROR),
    "int4 head float": (Recipe(weights="int4", head="float", group_size=128), MAX_INT8_ERROR),
    "fp16 int4": (Recipe(weights="int4", head="int8", dtype="fp16"), MAX_INT8_ERROR),
    "fp16 float": (Recipe(weights="float", head="float", dtype="fp16"), MAX_FP16_ERROR),
}


@pytest.mark.parametrize("backend", ["onnx", "native"])
@pytest.mark.parametrize("name", RECIPES)
def test_logits_equal_the_stored_weights(
    name: str, backend: str, tiny_hf: Path, tmp_path: Path
) -> None:
    """Each graph computes what its own weights say: only the activations' rounding differs."""
    recipe, tolerance = RECIPES[name]
    if backend == "native":  # its KV cache is fp16
        tolerance = max(tolerance, MAX_FP16_ERROR)
    export_bundle(open_checkpoint(tiny_hf), tmp_path / "b", recipe)
    expected = reference_logits(stored_reference(tiny_hf, recipe))
    session = open_session(open_bundle(tmp_path / "b"), backend, threads=2)
    whole = logits_of(session)
    assert relative_error(whole, expected) <= tolerance
    # Another cut of the prompt, single tokens too, gives the same through the cache.
    assert relative_error(logits_of(session, (1, 2, 60, 61)), expected) <= tolerance


def test_the_logit_comparison_can_fail(tiny_hf: Path, tiny_bundle: Path) -> None:
    model = load_reference(open_checkpoint(tiny_hf))
    expected = reference_logits(model)
    session = open_session(open_bundle(tiny_bundle), "onnx", threads=2)
    got = logits_of(session)
    assert relative_error(got, expected) <= MAX_FLOAT_ERROR
    got[3, 4] = np.nan
    assert not relative_error(got, expected) <= MAX_FLOAT_ERROR
    model.model.layers[1].mlp.up_proj.weight *= 1.2
    assert not relative_error(logits_of(session), reference_logits(model)) <= MAX_INT8_ERROR


@pytest.mark.parametrize(
    "changes",
    [
        {"tie_word_embeddings": False},
        {"attention_bias": True, "output_bias": True, "mlp_bias": True},
        {"architecture": "qwen2", "attention_bias": True},
        {"num_key_value_heads": 4},
        {"layer_sizes": (LayerSize(2, 1, 96), LayerSize(4, 2, 48))},
    ],
)
def test_variants_lower_too(changes: dict[str, Any], tmp_path: Path) -> None:
    config = support.tiny(**changes)
    folder = support.write_hf(tmp_path / "hf", config)
    export_bundle(open_checkpoint(folder), tmp_path / "b", Recipe(weights="float", head="float"))
    session = open_session(open_bundle(tmp_path / "b"), "onnx", threads=2)
    expected = reference_logits(load_reference(open_checkpoint(folder)))
    assert relative_error(logits_of(session), expected) <= MAX_FLOAT_ERROR


@pytest.mark.parametrize("kind", ["Q4_0", "Q4_1", "Q8_0"])
def test_gguf_blocks_reach_the_graph(kind: str, tmp_path: Path) -> None:
    """The codes and scales in the data file dequantize to exactly the GGUF's values."""
    source = support.write_gguf(tmp_path / "x.gguf", kind=kind)
    manifest = export_bundle(open_checkpoint(source), tmp_path / "b")
    assert manifest.notes == []
    expected = reference_logits(load_reference(open_checkpoint(source)))
    got = logits_of(open_session(open_bundle(tmp_path / "b"), "onnx", threads=2))
    assert relative_error(got, expected) <= MAX_INT8_ERROR
    stored = _stored_matrix(tmp_path / "b", "model.layers.0.self_attn.o_proj.weight")
    original = open_checkpoint(source).weight("model.layers.0.self_attn.o_proj.weight")
    np.testing.assert_allclose(stored, original.dequantize(), rtol=0, atol=1e-7)  # type: ignore[union-attr]


def _stored_matrix(bundle: Path, name: str) -> np.ndarray[Any, Any]:
    """A MatMulNBits weight of the graph, dequantized by the operator's own definition."""
    import onnx
    from onnx import numpy_helper

    model = onnx.load(bundle / "model.onnx")
    parts = {
        init.name.removeprefix(f"{name}."): numpy_helper.to_array(init)
        for init in model.graph.initializer
        if init.name.startswith(f"{name}.")
    }
    codes, scales = parts["codes"], parts["scales"]
    if codes.shape[2] == 16:
        codes = np.stack([codes & 15, codes >> 4], -1).reshape(*codes.shape[:2], 32)
        zero = 8.0
    else:
        zero = 128.0
    matrix = (codes.astype(np.float64) - zero) * scales[..., None]
    matrix += parts.get("offsets", np.zeros_like(scales))[..., None]
    return matrix.reshape(len(codes), -1)


def test_a_tied_head_is_stored_once(tiny_gguf: Path, tmp_path: Path) -> None:
    import onnx

    export_bundle(open_checkpoint(tiny_gguf), tmp_path / "b")
    model = onnx.load(tmp_path / "b" / "model.onnx", load_external_data=False)
    places = {
        init.name: {entry.key: entry.value for entry in init.external_data}
        for init in model.graph.initializer
    }
    embedding = places["model.embed_tokens.weight.codes2d"]
    head = places["model.embed_tokens.weight.codes"]
    assert embedding["offset"] == head["offset"]
    assert embedding["location"] == "model.onnx.data"


def test_manifest_round_trip(tiny_bundle: Path) -> None:
    manifest = read_manifest(tiny_bundle)
    assert json.loads(manifest.to_json())["size_bytes"] == manifest.size_bytes
    assert ModelConfig.from_dict(manifest.architecture) == support.TINY
    assert Recipe.from_dict(manifest.recipe).context == support.TINY.max_position_embeddings


def test_rebuilding_from_the_recipe_gives_the_same_bytes(tiny_gguf: Path, tmp_path: Path) -> None:
    first = export_bundle(open_checkpoint(tiny_gguf), tmp_path / "a", Recipe(context=64))
    again = export_bundle(
        open_checkpoint(tiny_gguf), tmp_path / "b", Recipe.from_dict(first.recipe)
    )
    assert first == again


def test_nothing_is_left_of_a_failed_export(
    tiny_hf: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from pocketslm.export.lower import onnx_graph

    def full_disk(self: object, name: str, array: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(onnx_graph.DataFile, "add", full_disk)
    with pytest.raises(ExportError, match="No space left on device"):
        export_bundle(open_checkpoint(tiny_hf), tmp_path / "out" / "b")
    assert list((tmp_path / "out").iterdir()) == []

    def interrupt(self: object, name: str, array: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(onnx_graph.DataFile, "add", interrupt)
    with pytest.raises(KeyboardInterrupt):
        export_bundle(open_checkpoint(tiny_hf), tmp_path / "out" / "b")
    assert list((tmp_path / "out").iterdir()) == []


def test_an_existing_folder_is_not_overwritten_unasked(tiny_hf: Path, tmp_path: Path) -> None:
    checkpoint = open_checkpoint(tiny_hf)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "letter.txt").write_text("keep me")
    with pytest.raises(ExportError, match="exists already"):
        export_bundle(checkpoint, tmp_path / "mine", overwrite=True)
    assert (tmp_path / "mine" / "letter.txt").exists()
    export_bundle(checkpoint, tmp_path / "b", Recipe(context=32))
    with pytest.raises(ExportError, match="--overwrite"):
        export_bundle(checkpoint, tmp_path / "b")
    manifest = export_bundle(checkpoint, tmp_path / "b", Recipe(context=64), overwrite=True)
    assert manifest.graphs[0].context == 64
    assert sorted(path.name for path in tmp_path.iterdir()) == ["b", "mine"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"weights": "int7"}, "weights is 'int7'"),
        ({"group_size": 48}, "group size 48"),
        ({"dtype": "bf16"}, "dtype 'bf16'"),
        ({"targets": ("onnx", "tflite")}, "tflite"),
        ({"targets": ()}, "targets"),
        ({"targets": ("tflite",)}, "targets"),
        ({"context": 1}, "context 1"),
        ({"context": 100_000}, "longer than the model's 256"),
    ],
)
def test_recipes_that_make_no_sense(
    options: dict[str, Any], message: str, tiny_hf: Path, tmp_path: Path
) -> None:
    with pytest.raises(ExportError, match=message):
        export_bundle(open_checkpoint(tiny_hf), tmp_path / "b", Recipe(**options))
    assert not (tmp_path / "b").exists()


def test_quality_of_a_float_bundle_is_that_of_its_source(tiny_hf: Path, tmp_path: Path) -> None:
    export_bundle(open_checkpoint(tiny_hf), tmp_path / "b", Recipe(weights="float", head="float"))
    text = tmp_path / "text.txt"
    text.write_text("The quick brown fox jumps over the lazy dog. " * 40)
    quality = evaluate_bundle(
        tmp_path / "b",
        source=open_checkpoint(tiny_hf),
        text=text,
        window=64,
        windows=4,
        backend="onnx",
    )
    assert quality.tokens == 256
    assert abs(quality.kl) < 1e-6
    assert quality.perplexity == pytest.approx(quality.source_perplexity, rel=1e-4)
    assert quality.top1 > 0.99
    assert read_manifest(tmp_path / "b").quality == quality.to_dict()


@pytest.mark.parametrize("backend", ["native", "onnx", "runner"])
def test_quality_of_what_is_not_finite_is_an_error(
    backend: str, tiny_hf: Path, tmp_path: Path
) -> None:
    """Of the bundle, and of the source: its final norm is finite, its logits are not. A NaN."""
    from safetensors.torch import load_file, save_file

    def altered(value: float) -> Path:
        folder = tmp_path / f"norm-{value}"
        shutil.copytree(tiny_hf, folder)
        tensors = load_file(folder / "model.safetensors")
        tensors["model.norm.weight"].fill_(value)
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        return folder

    recipe = Recipe(weights="float", head="float")
    text = tmp_path / "text.txt"
    text.write_text("nothing")
    good, bad = open_checkpoint(tiny_hf), open_checkpoint(altered(3e38))
    windows = windows_of(range(128), 64, 2)
    for name, checkpoint in (("good", good), ("bad", bad)):
        export_bundle(checkpoint, tmp_path / name, recipe)

    def session(name: str) -> Session:
        return open_session(open_bundle(tmp_path / name), backend, 1)

    with pytest.raises(BackendError, match="not finite"):
        evaluate(good, session("bad"), windows, text)
    with pytest.raises(CheckpointError, match="logits are not finite"):
        evaluate(bad, session("good"), windows, text)
    with pytest.raises(CheckpointError, match="holds numbers that are NaN or infinite"):
        evaluate(open_checkpoint(altered(float("nan"))), session("good"), windows, text)
    assert evaluate(good, session("good"), windows, text).kl < 1e-6


def test_the_quality_measure_is_the_definition() -> None:
    """Two positions over three tokens, by hand; and NaN does not pass for good."""
    p = torch.tensor([[0.5, 0.25, 0.25], [0.1, 0.8, 0.1]])
    q = torch.tensor([[0.25, 0.5, 0.25], [0.1, 0.8, 0.1]])
    source, bundle, kl, same = compare(p.log(), q.log(), np.array([0, 1]))
    assert source == pytest.approx(-np.log(0.25))
    assert bundle == pytest.approx(-np.log(0.5))
    assert kl == pytest.approx(0.5 * np.log(2) + 0.25 * np.log(0.5))
    assert same == 1
    assert np.isnan(compare(p.log(), q.log() * float("nan"), np.array([0, 1]))[2])
    many, ids = torch.randn(2, 150, 7).double().log_softmax(-1), np.arange(150) % 7
    sums = np.stack([-many[:, t, ids[t + 1]].numpy() for t in range(149)]).sum(0)
    np.testing.assert_allclose(compare(*many, ids)[:2], sums, rtol=1e-12)
    divergence = torch.nn.functional.kl_div(many[1], many[0], reduction="sum", log_target=True)
    assert compare(*many, ids)[2] == pytest.approx(float(divergence))


def test_windows() -> None:
    assert [list(w) for w in windows_of(range(10), 3, 2)] == [[0, 1, 2], [3, 4, 5]]
    assert len(windows_of(range(10), 3, 99)) == 3
    for ids, window in ((range(2), 3), (range(9), 1)):
        with pytest.raises(Exception, match="expected at least"):
            windows_of(ids, window, 1)


@pytest.mark.parametrize("backend", ["onnx", "native"])
def test_context_longer_than_the_graphs(backend: str, tiny_bundle: Path) -> None:
    session = open_session(open_bundle(tiny_bundle), backend, threads=1)
    with pytest.raises(ContextOverflowError, match="do not fit the context of 256"):
        session.forward(np.zeros(257, np.int64))
    assert session.length == 0


# onnxruntime-genai runs our folders, and we run the folders of its builder.


def greedy(model: Model, prompt: list[int]) -> list[int]:
    """Ours, 24 tokens or up to the end of the answer, whose token genai does not list."""
    config = GenerationConfig(max_new_tokens=24)
    steps = model.engine.generate(prompt, config, model.tokenizer.eos_token_ids)
    return [step.token for step in steps if step.finish != "eos"]


def genai_greedy(folder: Path, prompt: list[int]) -> list[int]:
    og = pytest.importorskip("onnxruntime_genai")
    config = og.Config(str(folder))
    config.overlay('{"model":{"decoder":{"session_options":{"intra_op_num_threads":2}}}}')
    model = og.Model(config)
    params = og.GeneratorParams(model)
    params.set_search_options(max_length=len(prompt) + 24, do_sample=False)
    generator = og.Generator(model, params)
    generator.append_tokens(prompt)
    while not generator.is_done():
        generator.generate_next_token()
    return [int(token) for token in generator.get_sequence(0)][len(prompt) :]


@pytest.mark.real
def test_genai_runs_our_bundle_and_generates_the_same(smollm2_bundle: Path) -> None:
    model = Model.load(smollm2_bundle, "onnx", threads=2)
    for text in ("Why is the sky blue?", "Write a line about autumn.", "What is 12 times 3?"):
        prompt = model.tokenizer.apply_chat_template([{"role": "user", "content": text}])
        assert genai_greedy(smollm2_bundle, prompt) == greedy(model, prompt)


@pytest.mark.real
def test_we_run_a_folder_of_genais_builder(
    smollm2_gguf: Path, smollm2_bundle: Path, tmp_path: Path
) -> None:
    pytest.importorskip("onnxruntime_genai")
    folder = OrtGenai().prepare(smollm2_gguf, tmp_path)
    model = Model.load(folder, threads=2)
    prompt = model.tokenizer.apply_chat_template([{"role": "user", "content": "Hello!"}])
    assert genai_greedy(folder, prompt) == greedy(model, prompt)


@pytest.mark.real
@pytest.mark.parametrize("backend", ["onnx", "native"])
def test_the_real_import_keeps_its_quality(
    backend: str, smollm2_bundle: Path, lee_text: Path
) -> None:
    quality = evaluate_bundle(
        smollm2_bundle, source=None, text=lee_text, windows=2, backend=backend
    )
    print(
        f"\nQ4_1 carried exactly, {quality.backend}: KL {quality.kl:.5f}, "
        f"perplexity {quality.perplexity:.3f} against {quality.source_perplexity:.3f}, "
        f"top-1 {quality.top1:.3f}"
    )
    assert quality.kl <= 0.01
    assert abs(quality.perplexity / quality.source_perplexity - 1) <= 0.01
