"""Embeddings of bundles, against transformers and against the PyTorch model."""

from __future__ import annotations

import base64
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from architectures import ROWS, write_folder
from embedding_support import FLOATS, TEXTS, exported
from native_runner import running

from pocketslm.cli import main
from pocketslm.errors import (
    BackendError,
    BundleError,
    ContextOverflowError,
    ExportError,
    UsageError,
)
from pocketslm.export.evaluate import evaluate_bundle
from pocketslm.export.pipeline import export_bundle
from pocketslm.export.prune.folder import PruneConfig, prune_folder
from pocketslm.export.recipe import Recipe
from pocketslm.models.catalog import fetch
from pocketslm.models.checkpoint import open_checkpoint
from pocketslm.models.config import Pooling
from pocketslm.models.reference import load_reference
from pocketslm.runtime.backends import open_session
from pocketslm.runtime.backends.runner import program
from pocketslm.runtime.bundle import GENAI_CONFIG, MANIFEST, open_bundle
from pocketslm.runtime.model import Model


@pytest.fixture(scope="module")
def bert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pooling = Pooling("mean", normalize=True, max_tokens=32)
    return exported(tmp_path_factory.mktemp("bert"), "bert", pooling)


@pytest.mark.parametrize("backend", ["native", "onnx"])
@pytest.mark.parametrize(
    ("name", "pooling"),
    [
        ("bert", Pooling("mean")),
        ("bert", Pooling("cls", normalize=True)),
        ("bert", Pooling("last", lowercase=True)),
        ("qwen3 embedding", Pooling("last", normalize=True)),
        ("qwen3 embedding", Pooling("mean")),
    ],
)
def test_an_embedding_is_the_pooled_hidden_states(
    name: str, pooling: Pooling, backend: str, tmp_path: Path
) -> None:
    bundle = exported(tmp_path, name, pooling, words=name == "bert")
    model = Model.load(bundle, backend, threads=1)
    assert model.bundle.config is not None
    assert model.bundle.config.pooling == pooling
    got = model.embed(TEXTS)
    assert got.dtype == np.float32
    reference = load_reference(open_checkpoint(tmp_path / "model"))
    for text, vector in zip(TEXTS, got, strict=True):
        text = text.lower() if pooling.lowercase else text
        ids = model.tokenizer.encode(text, add_special_tokens=True)
        states, _ = reference(torch.tensor([ids]), reference.empty_cache())
        one = {"mean": states[0].mean(0), "cls": states[0, 0], "last": states[0, -1]}[pooling.kind]
        one = one / one.norm() if pooling.normalize else one
        assert np.abs(vector - one.numpy()).max() <= 2e-3 * float(one.abs().max())
    # In another order, each text is still read for itself.
    np.testing.assert_array_equal(model.embed(TEXTS[::-1])[::-1], got)
    assert not (bundle / GENAI_CONFIG).exists()  # which runs what generates text alone
    assert model.embed([]).shape == (0, 64)


def test_a_text_that_is_too_long_is_refused_or_cut(bert: Path) -> None:
    model = Model.load(bert, threads=1)
    with pytest.raises(ContextOverflowError, match="text 2 has .* tokens, the model reads 30"):
        model.embed(["short", "cat " * 40])
    ids = model.tokenizer.encode("cat " * 40)
    cut = model.tokenizer.decode(ids[:30])
    assert model.tokenizer.encode(cut) == ids[:30]
    np.testing.assert_array_equal(model.embed(["cat " * 40], truncate=True), model.embed([cut]))


def test_texts_that_cannot_be_embedded_are_refused(bert: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="a list of texts, not one text"):
        Model.load(bert, threads=1).embed("one")
    bare = exported(tmp_path, "qwen3 embedding", Pooling("last"), words=False)
    with pytest.raises(UsageError, match="text 2 has no tokens that the model reads"):
        Model.load(bare, threads=1).embed(["a", ""])


def test_a_graph_of_another_size_than_its_manifest_says_is_refused(
    bert: Path, tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(bert, tmp_path / "bundle"))
    manifest = json.loads((folder / MANIFEST).read_text())
    manifest["architecture"]["hidden_size"] = 96
    (folder / MANIFEST).write_text(json.dumps(manifest))
    with pytest.raises(BundleError, match="gives 64 values a token, the manifest says 96"):
        Model.load(folder, threads=1).embed(["a"])


@pytest.mark.parametrize(
    ("name", "pooling"),
    [
        ("bert", Pooling("mean", normalize=True, max_tokens=32)),
        ("bert", Pooling("cls")),
        ("qwen3 embedding", Pooling("last", normalize=True)),
        ("qwen3 embedding", Pooling("mean")),
    ],
)
def test_the_runner_embeds_as_the_package_does(name: str, pooling: Pooling, tmp_path: Path) -> None:
    bundle = exported(tmp_path, name, pooling, words=name == "bert")
    expected = Model.load(bundle, "native", threads=1).embed([*TEXTS, "cat " * 40], truncate=True)
    says: dict[str, Any] = {"pooling": pooling.kind, "normalize": pooling.normalize}
    limit = {"max_tokens": pooling.max_tokens} if pooling.max_tokens else {}
    with running([str(program())]) as runner:
        assert runner.ask(op="load", path=str(bundle / "model.slm"), threads=1)["event"] == "loaded"
        for text, vector in zip([*TEXTS, "cat " * 40], expected, strict=True):
            answer = runner.ask(op="embed", prompt=text, truncate=True, **says, **limit)
            assert answer["event"] == "embedding", answer
            np.testing.assert_allclose(answer["embedding"], vector, rtol=1e-5, atol=1e-6)
        packed = runner.ask(op="embed", prompt=TEXTS[0], base64=True, **says)
        values = np.frombuffer(base64.b64decode(packed["base64"]), "<f4")
        np.testing.assert_allclose(values, expected[0], rtol=1e-5, atol=1e-6)
        for request, message in (
            ({"prompt": "a", "pooling": "max"}, "'pooling' must be mean, cls or last"),
            ({"prompt": "a"}, "'pooling' must be mean, cls or last"),
            ({"prompt": "cat " * 40, "max_tokens": 8, **says}, "at most 8; split the text"),
            ({"tokens": [], **says}, "must not be empty"),
            ({"prompt": "a", "pool": "mean", **says}, "'pool' is unknown here"),
        ):
            assert message in runner.ask(op="embed", **request)["message"]


def test_the_runner_has_no_embeddings_of_a_model_that_generates(tiny_bundle: Path) -> None:
    with running([str(program())]) as runner:
        runner.ask(op="load", path=str(tiny_bundle / "model.slm"), threads=1)
        answer = runner.ask(op="embed", tokens=[1, 2], pooling="mean")
        assert "the model generates text" in answer["message"]


def test_each_kind_of_model_says_what_it_is_for(
    bert: Path, tiny_bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    encoder = Model.load(bert, threads=1)
    message = "needs a model that generates text, this one gives embeddings"
    for attempt in (
        lambda: encoder.generate("a"),
        lambda: encoder.chat([{"role": "user", "content": "a"}]),
        lambda: evaluate_bundle(bert, source=None, text=Path(__file__)),
        lambda: prune_folder(
            open_checkpoint(bert.parent / "model"),
            tmp_path / "pruned",
            PruneConfig(layers=1),
            Path(__file__),
        ),
    ):
        with pytest.raises(UsageError, match=message):
            attempt()
    assert main(["doc", "summarize", str(bert)]) == 2
    assert message in capsys.readouterr().err
    with pytest.raises(UsageError, match="generates text, it has no embeddings"):
        Model.load(tiny_bundle, threads=1).embed(["a"])
    with pytest.raises(BackendError, match="'runner' does not run models of embeddings"):
        open_session(open_bundle(bert), "runner")


@pytest.mark.parametrize(
    ("recipe", "message"),
    [
        (Recipe(targets=("native", "executorch")), "no executorch graph: the model gives"),
        (Recipe(targets=("onnx",), dtype="fp16"), "an encoder's attention computes in fp32"),
        (Recipe(method="gptq", calibration="lee"), "need a model that generates text"),
    ],
)
def test_exports_that_embeddings_do_not_have(recipe: Recipe, message: str, tmp_path: Path) -> None:
    folder, _ = write_folder(tmp_path / "model", ROWS["bert"])
    with pytest.raises(ExportError, match=message):
        export_bundle(open_checkpoint(folder), tmp_path / "bundle", recipe)


def test_an_encoder_without_a_pooling_is_not_exported(tmp_path: Path) -> None:
    folder, _ = write_folder(tmp_path / "model", ROWS["bert"])
    (folder / "modules.json").unlink()
    with pytest.raises(ExportError, match="no modules.json, which says how embeddings are pooled"):
        export_bundle(open_checkpoint(folder), tmp_path / "bundle", FLOATS)


def test_embeddings_are_rounded_to_int8_by_default(tmp_path: Path) -> None:
    bundle = open_bundle(exported(tmp_path, "bert", Pooling("mean", normalize=True), Recipe()))
    assert bundle.manifest is not None
    assert bundle.manifest.weights.keys() == {"int8 g32 sym", "fp32"}
    assert [graph.backend for graph in bundle.graphs] == ["native", "onnx"]
    native, onnx = (Model.load(bundle.path, name, threads=1) for name in ("native", "onnx"))
    assert (native.embed(TEXTS) * onnx.embed(TEXTS)).sum(1).min() >= 0.99
    assert bundle.manifest.notes == ["float weights were rounded to int8 g32 sym"]


def test_the_command_prints_vectors_or_cosines(
    bert: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    import io

    expected = Model.load(bert, threads=1).embed(TEXTS)
    assert main(["embed", str(bert), *TEXTS, "-t", "1"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert np.array_equal(np.array([json.loads(line) for line in lines], np.float32), expected)
    monkeypatch.setattr("sys.stdin", io.StringIO("\n".join(TEXTS)))
    assert main(["embed", str(bert), "-", "--compare", "-t", "1"]) == 0
    shown = [line.split("  ", 1) for line in capsys.readouterr().out.splitlines()]
    assert [text for _, text in shown] == TEXTS[1:]
    cosines = expected[1:] @ expected[0]
    assert np.abs(np.array([float(value) for value, _ in shown]) - cosines).max() < 1e-4
    assert main(["embed", str(bert), "one", "--compare"]) == 2
    assert "at least two texts" in capsys.readouterr().err


@pytest.mark.real
def test_minilm_gives_the_embeddings_of_transformers(tmp_path: Path) -> None:
    """Also of a text that is cut at the 256 tokens that its files allow."""
    from transformers import AutoModel, AutoTokenizer

    folder = fetch("all-minilm-l6-v2")
    articles = fetch("lee").read_text(encoding="utf-8").splitlines()
    texts = [part for part in ". ".join(articles).split(". ") if len(part) > 20][:19]
    texts.append(articles[0])
    tokenizer = AutoTokenizer.from_pretrained(folder)
    theirs = AutoModel.from_pretrained(folder).eval()
    expected = []
    for text in texts:
        batch = tokenizer(text, return_tensors="pt", truncation=True, max_length=256)
        with torch.no_grad():
            state = theirs(**batch).last_hidden_state[0].mean(0)
        expected.append((state / state.norm()).numpy())
    least = {}
    for name, recipe in (("float", FLOATS), ("int8", Recipe())):
        export_bundle(open_checkpoint(folder), tmp_path / name, recipe)
        for backend in ("native", "onnx"):
            model = Model.load(tmp_path / name, backend, threads=2)
            with pytest.raises(ContextOverflowError, match="the model reads 254 of a text"):
                model.embed(texts)
            found = model.embed(texts, truncate=True)
            least[name, backend] = float((found * np.stack(expected)).sum(1).min())
    assert min(least["float", "native"], least["float", "onnx"]) >= 0.9999
    assert min(least["int8", "native"], least["int8", "onnx"]) >= 0.995
